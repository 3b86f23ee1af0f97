"""The RLRR tuner."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..._compat import current_loading, expand_all_linear
from ...backbones.structure import backbone_parts
from ...functional.sharding import whole_entry
from ...heads.detect import exact_targets, task_head_names
from ...heads.traversal import named_targets, own_modules
from ..common.copies import adding, check_weights, copy_adapter, copy_heads, heads_of_sum, is_copy
from ..common.head_mask import complete_masks, masks_for_file, masks_for_model
from ..common.model import LabelledTuner
from ..common.saved_keys import is_adapter_key, rename_modules
from ..common.saved_settings import check_settings, split_settings, write_settings
from ..common.targets import module_patterns, warn_of_overlooked
from .base_layer import RLRRLayer
from .combination import check_summands, modules_of, sum_into
from .config import RLRRConfig
from .folding import fold, plan_folding, plan_merging
from .layer import RLRRConv2d, RLRRLinear, RLRRScale
from .state_dict import check_state_dict, write_deactivated
from .targets import check_module, default_modules, find_head_layouts, moving_statistics


LAYERS = {"linear": RLRRLinear, "convolution": RLRRConv2d, "scale": RLRRScale}


class _ForwardHooks:
    """Mixed batches, for tuners whose layers take `adapter_names`; see PEFT's LoRA."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - {"__base__"} - set(self.peft_config)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        hook = partial(_pass_adapter_names, adapter_names=adapter_names)
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for _, module in own_modules(self.model)
            if isinstance(module, (RLRRLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class RLRRModel(LabelledTuner, _ForwardHooks, BaseTuner):
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
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # modules are found by role

    def _prepare_adapter_config(self, peft_config: RLRRConfig, model_config: dict) -> RLRRConfig:
        self.begin_adapter(peft_config)
        self.follow_folder(peft_config)
        parts = backbone_parts(self.model)
        peft_config.patch_embedding_name = parts.patch_embedding
        if peft_config.modules_to_save is None:
            peft_config.choose("modules_to_save", task_head_names(self.model) or None)
        if peft_config.target_modules is None:
            names = default_modules(self.model, peft_config, parts)
            peft_config.choose("target_modules", self._default_targets(peft_config, names))
            warn_of_overlooked(self.model)
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        expand_all_linear(peft_config, self.model)
        modules = dict(named_targets(self.model))
        targets = [name for name in modules if self._check_target_module_exists(peft_config, name)]
        for name in targets:
            check_module(name, getattr(modules[name], "base_layer", modules[name]), peft_config)
        peft_config.head_layouts = find_head_layouts(self.model, peft_config, targets)
        if not peft_config.inference_mode:
            self._warn_before_training(peft_config, modules, targets)
        return peft_config

    def _warn_before_training(
        self, peft_config: RLRRConfig, modules: dict[str, nn.Module], targets: list[str]
    ) -> None:
        """Warn of what would show after the training only."""
        if warning := moving_statistics(self.model):
            warnings.warn(warning)
        without_bias = [name for name in targets if getattr(modules[name], "bias", None) is None]
        if peft_config.shift_without_bias and (plan := plan_folding(self.model, without_bias)).homeless:
            warnings.warn(
                f"{module_patterns(plan.homeless)}: {plan.why}. The adapter trains and loads all the same, but "
                "merge_and_unload() will refuse: if an ordinary checkpoint is wanted in the end, pass "
                "shift_without_bias=False"
            )

    def _default_targets(self, peft_config: RLRRConfig, names: list[str]) -> set[str] | str:
        """By the ends of names where they are enough; those of `layers_to_transform`, which PEFT asks of ends alone."""
        if peft_config.layers_to_transform is not None:
            by_ending = copy.copy(peft_config)
            by_ending.target_modules = {name.rpartition(".")[2] for name in names}
            found = [name for name in names if self._check_target_module_exists(by_ending, name)]
            if not found:
                pattern = f" with layers_pattern={peft_config.layers_pattern}" if peft_config.layers_pattern else ""
                raise ValueError(
                    f"layers_to_transform={peft_config.layers_to_transform}{pattern}: no block of "
                    f"{type(self.model).__name__} has such a number; it has {module_patterns(names)}"
                )
            return set(found)
        targets = exact_targets(names, self.model)
        return targets if isinstance(targets, str) else set(targets)

    def _create_and_replace(
        self,
        peft_config: RLRRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, RLRRLayer):
            kind = LAYERS[check_module(current_key, target.get_base_layer(), peft_config)]
            if type(target) is not kind:
                raise ValueError(
                    f"{current_key} is a {type(target).__name__} of an earlier adapter, but adapter {adapter_name!r} "
                    f"would have a {kind.__name__} there; give both the same patch_embedding"
                )
            target.update_layer(adapter_name, peft_config, target_name=current_key)
            return
        layer_class = LAYERS[check_module(current_key, target, peft_config)]
        layer = layer_class(target, adapter_name, peft_config, target_name=current_key)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # as PEFT's, without giving a trained head (which may be any module) the weight of what it replaces
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT makes new, trainable parameters, also of an adapter that is not active
        holders = [
            getattr(layer, name)
            for _, layer in own_modules(self.model)
            if isinstance(layer, RLRRLayer)
            for name in layer.adapter_layer_names
        ]
        trained = [(params, params[adapter_name].requires_grad) for params in holders if adapter_name in params]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for params, requires_grad in trained:
            params[adapter_name].requires_grad_(requires_grad)

    def _unload_and_optionally_merge(
        self, merge: bool = True, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        with self.unloading(merge, adapter_names) as to_merge:
            return self._unload_and_fold(merge, to_merge, adapter_names=adapter_names, **kwargs)

    def _unload_and_fold(self, merge: bool, to_merge: list[str], **kwargs: Any) -> nn.Module:
        plan = plan_merging(self.model, to_merge)
        if plan.homeless and merge:
            raise ValueError(
                f"{module_patterns(plan.homeless)}: {plan.why} (expected one, for the trained shift f of RLRR), so that "
                "a merged checkpoint would lose it. Keep the adapter as an adapter, use merge_adapter() in memory, or "
                "train with RLRRConfig(shift_without_bias=False)"
            )
        if plan.homeless:
            warnings.warn(
                f"{module_patterns(plan.homeless)}: {plan.why}, so that a checkpoint of the model into which an adapter "
                "has been merged would lose its shift f; call unmerge_adapter() before unload()"
            )
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        fold(model, plan)
        return model

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Combine adapters linearly, as the paper does: every factor, shift and scale by itself.

        `Ŝ_out Ŝ_in = (Σ w_i S_out^i)(Σ w_i S_in^i)` and `f̂ = Σ w_i f^i`. Of norms and the patch embedding, of which the
        paper says nothing, the changes are summed: `γ̂ = 1 + Σ w_i (γ^i - 1)`, `β̂ = Σ w_i β^i`, so that an adapter that
        changes nothing adds nothing there. To the factors' product it does add: one with `S_out = 0` alone changes
        nothing, but its `S_in` meets the `S_out` of the others. A head is active in the sum where it is in any of the
        summands. The trained classification head, which only one of them may have, is copied. One adapter with weight 1
        gives an exact copy.

        Args:
            adapters: Names of the summands.
            weights: One number for each.
            adapter_name: Name of the sum; nothing is done if it exists.

        Raises:
            ValueError: The adapters cannot be combined.
        """
        if adapter_name in self.peft_config:
            return
        check_weights(self.peft_config, adapters, weights)
        self._remember_labels()
        if is_copy(adapters, weights):
            copy_adapter(self, adapters[0], adapter_name)
            return
        check_summands(self.model, self.peft_config, adapters)
        with adding(self, adapter_name):
            self.peft_config[adapter_name] = dataclasses.replace(
                self.peft_config[adapters[0]],
                target_modules=modules_of(self.model, adapters),
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
                modules_to_save=heads_of_sum(self.peft_config, adapters),
            )
            self.inject_adapter(self.model, adapter_name)
            for _, layer in own_modules(self.model):
                if isinstance(layer, RLRRLayer) and layer.has_adapter(adapter_name):
                    sum_into(layer, adapters, weights, adapter_name)
            copy_heads(self, adapters, adapter_name)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        in_full = f".modules_to_save.{adapter_name}."
        state_dict |= {
            key: whole_entry(model, key, value)
            for key, value in state_dict.items()
            if is_adapter_key(key) or in_full in key
        }
        to_return = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        write_deactivated(model, adapter_name, to_return)
        write_settings("rlrr_settings", config.noted_settings, to_return)
        cls.describe_for_files(model, config, adapter_name)
        return masks_for_file(to_return)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict, noted = split_settings(state_dict)
        state_dict = rename_modules(model, state_dict)
        if current_loading() is not None:
            state_dict = complete_masks(model, config, adapter_name, state_dict)
        state_dict = masks_for_model(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, config, adapter_name, remapped)
        check_settings(config.noted_settings, noted)
        cls.take_heads_and_labels(model, config, adapter_name, remapped)
        return remapped


def _pass_adapter_names(target: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]):
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
