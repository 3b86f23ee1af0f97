"""The RLRR tuner."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...backbones.structure import find_backbone
from ...backbones.targets import exact_targets
from ...heads.traversal import named_targets
from ..common.standalone import StandaloneTuner
from ..common.state import AdapterState
from ..common.targets import module_patterns
from .base_layer import RLRRLayer
from .combination import RLRRSums
from .config import RLRRConfig
from .folding import fold, plan_folding, plan_merging
from .layer import RLRRConv2d, RLRRLinear, RLRRScale
from .state_dict import check_state_dict, write_deactivated
from .targets import check_module, default_modules, find_head_layouts, moving_statistics


LAYERS = {"linear": RLRRLinear, "convolution": RLRRConv2d, "scale": RLRRScale}


@dataclass
class RLRRState(AdapterState):
    """State of an RLRR adapter.

    Attributes:
        patch_embedding: Name of the patch embedding if its output is scaled and shifted.
    """

    patch_embedding: str | None = None


class RLRRModel(RLRRSums, StandaloneTuner):
    """Residual low-rank rescaling of a pre-trained vision model.

    Linear layers and convolutions get factors that rescale their weight and a shift of their bias, layer norms and the
    patch embedding a scale and a shift per channel. All of it folds into the weights: `merge_and_unload` gives an
    ordinary model.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`RLRRConfig`]): The configuration of the tuner.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create empty adapter weights on meta device.

    Example:

        ```py
        >>> from transformers import AutoModelForImageClassification
        >>> from peft import get_peft_model
        >>> from peft_heads import RLRRConfig

        >>> vit = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k")  # needs the Hub  # doctest: +SKIP
        >>> model = get_peft_model(vit, RLRRConfig())
        ```
    """

    prefix: str = "rlrr_"
    tuner_layer_cls = RLRRLayer
    state_class = RLRRState

    def default_modules(self, peft_config: RLRRConfig) -> list[str] | str:
        names = default_modules(self.model, peft_config, find_backbone(self.model))
        return names if peft_config.layers_to_transform is not None else exact_targets(names, self.model)

    def prepare_targets(self, peft_config: RLRRConfig, state: RLRRState, targets: list[str]) -> None:
        if peft_config.patch_embedding:
            state.patch_embedding = find_backbone(self.model).patch_embedding
        modules = dict(named_targets(self.model))
        for name in targets:
            check_module(name, getattr(modules[name], "base_layer", modules[name]), state.patch_embedding)
        state.head_layouts = find_head_layouts(self.model, peft_config, targets)
        if not peft_config.inference_mode:
            self._warn_before_training(peft_config, modules, targets)

    def _warn_before_training(
        self, peft_config: RLRRConfig, modules: dict[str, nn.Module], targets: list[str]
    ) -> None:
        """Warn of what would show after the training only."""
        if warning := moving_statistics(self.model):
            warnings.warn(warning)
        without_bias = [name for name in targets if getattr(modules[name], "bias", None) is None]
        if peft_config.shift_without_bias and (plan := plan_folding(self.model, without_bias)).without_place:
            warnings.warn(
                f"{module_patterns(plan.without_place)}: {plan.why}. The adapter trains and loads all the same, but "
                "merge_and_unload() will refuse: if an ordinary checkpoint is wanted in the end, pass "
                "shift_without_bias=False"
            )

    def create_layer(self, peft_config: RLRRConfig, adapter_name: str, target: nn.Module, name: str) -> RLRRLayer:
        state = self.adapter_states[adapter_name]
        layout = state.head_layouts.get(name)
        if not isinstance(target, RLRRLayer):
            kind = LAYERS[check_module(name, target, state.patch_embedding)]
            return kind(target, adapter_name, peft_config, layout=layout)
        kind = LAYERS[check_module(name, target.get_base_layer(), state.patch_embedding)]
        if type(target) is not kind:
            raise ValueError(
                f"{name} is a {type(target).__name__} of an earlier adapter, but adapter {adapter_name!r} "
                f"would have a {kind.__name__} there; give both the same patch_embedding"
            )
        target.update_layer(adapter_name, peft_config, layout=layout)
        return target

    def _unload_and_optionally_merge(
        self, merge: bool = True, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        with self.unloading(merge, adapter_names) as to_merge:
            return self._unload_and_fold(merge, to_merge, adapter_names=adapter_names, **kwargs)

    def _unload_and_fold(self, merge: bool, to_merge: list[str], **kwargs: Any) -> nn.Module:
        plan = plan_merging(self.model, to_merge)
        if plan.without_place and merge:
            raise ValueError(
                f"{module_patterns(plan.without_place)}: {plan.why} (expected one, for the trained shift f of RLRR), so that "
                "a merged checkpoint would lose it. Keep the adapter as an adapter, use merge_adapter() in memory, or "
                "train with RLRRConfig(shift_without_bias=False)"
            )
        if plan.without_place:
            warnings.warn(
                f"{module_patterns(plan.without_place)}: {plan.why}, so that a checkpoint of the model into which an adapter "
                "has been merged would lose its shift f; call unmerge_adapter() before unload()"
            )
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        fold(model, plan)
        return model

    @classmethod
    def zero_inactive_rows(cls, model, adapter_name, state_dict, model_state_dict):
        write_deactivated(model, adapter_name, state_dict)

    @classmethod
    def check_masks(cls, model, config, adapter_name, state_dict):
        check_state_dict(model, config, adapter_name, state_dict)
