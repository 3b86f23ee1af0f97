"""The head-masked LoRA tuner."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..._compat import expand_all_linear
from ...heads.maskable import check_mask, deactivated_heads, read_masks
from ...heads.resolve import (
    FUSED_PROJECTIONS,
    NUM_HEADS_ATTRIBUTES,
    PROJECTION_ROLES,
    bypassed_projections,
    default_targets,
    matches_pattern,
    named_targets,
    resolve_heads,
    task_head_names,
)
from ...heads.selection import groups_kept_whole, plan_groups
from ..task_heads import check_mixed_batch, default_labels, fit_task_heads, get_labels, set_labels
from .config import HeadMaskedLoraConfig
from .layer import HeadMaskedLinear


class HeadMaskedLoraModel(LoraModel):
    """LoRA with a binary mask per attention head, created from a pre-trained vision transformer.

    Query, key and value projections get a [`HeadMaskedLinear`]; other targets (MLP, output projection, convolution)
    get PEFT's own LoRA layer and are never scored or masked.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`HeadMaskedLoraConfig`]): The configuration of the tuner.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create empty adapter weights on meta device.

    Example:

        ```py
        >>> from transformers import AutoModelForImageClassification
        >>> from peft import get_peft_model
        >>> from peft_heads import HeadMaskedLoraConfig

        >>> vit = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k")
        >>> model = get_peft_model(vit, HeadMaskedLoraConfig(ne=1))
        ```
    """

    def _prepare_adapter_config(self, peft_config: HeadMaskedLoraConfig, model_config: dict) -> HeadMaskedLoraConfig:
        if not hasattr(self, "base_labels"):
            self.base_labels = get_labels(self.model)
            self._labels_of: str | None = None  # the adapter whose labels the model's configuration shows
        if peft_config.target_modules is None and not peft_config.target_parameters:
            # PEFT's own table of defaults is asked for architectures without a recognisable attention layer
            peft_config.target_modules = set(default_targets(self.model)) or None
            self._check_default_targets(peft_config)
        if peft_config.modules_to_save is None:
            peft_config.modules_to_save = task_head_names(self.model) or None
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        expand_all_linear(peft_config, self.model)
        self._resolve_head_layouts(peft_config)
        return peft_config

    def _check_default_targets(self, peft_config: HeadMaskedLoraConfig) -> None:
        """Say what was found where no attention layer is recognised and PEFT knows no defaults for the model."""
        model_type = self.get_model_config(self.model).get("model_type")
        if peft_config.target_modules or model_type in self.target_module_mapping:
            return
        linear = _patterns(name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))
        raise ValueError(
            f"no attention layer was recognised in {type(self.model).__name__}: no module owns a query, a key and a "
            f"value projection ({', '.join(PROJECTION_ROLES)}) or a fused one ({', '.join(FUSED_PROJECTIONS)}) and "
            f"says its number of heads ({', '.join(NUM_HEADS_ATTRIBUTES)}). Its linear layers: {linear or 'none'}. "
            "Name the query and value projections and their heads yourself, e.g. "
            'HeadMaskedLoraConfig(target_modules=["to_q", "to_v"], num_heads={"to_q": 12, "to_v": 12})'
        )

    def _resolve_head_layouts(self, peft_config: HeadMaskedLoraConfig) -> None:
        """Find the heads of the targets before anything is replaced, so that an error leaves the model untouched."""
        layouts = resolve_heads(self.model, peft_config.num_heads, peft_config.fused_parts)
        targets = [n for n, _ in named_targets(self.model) if self._check_target_module_exists(peft_config, n)]
        # of every projection, targeted or not: what is injected after a state dict follows its keys, not the config
        peft_config.head_layouts = layouts
        bypassed = [name for name in bypassed_projections(self.model) if name in targets]
        if bypassed:
            raise ValueError(
                f"{_patterns(bypassed)}: the attention layer reads the weight of this projection instead of calling "
                "it, because it keeps a bias of its own, so that no adapter can work there. With timm, create the "
                "model with qkv_bias_separate=True where it has that option (BEiT, EVA)"
            )
        if not peft_config.masks_heads:
            return
        peft_config.check_compatible()  # again: options may have been set since the configuration was made
        unmasked = [
            parameter
            for parameter in peft_config.target_parameters or []
            if any(f".{name}".endswith(f".{parameter.rpartition('.')[0]}") for name in layouts)
        ]
        if unmasked:
            raise ValueError(
                f"target_parameters={unmasked} cannot be combined with head masks: PEFT's wrapper of a single "
                "parameter carries none; name the modules in target_modules, or pass ne=0"
            )
        if not any(name in layouts for name in targets):
            raise ValueError(
                "no target has attention heads, so there is nothing to deactivate. "
                f"Targets: {_patterns(targets) or 'none'}. Projections with heads in this model: "
                f"{_patterns(layouts) or 'none found'}. Target those; where heads are not found, say how many there are, e.g. "
                'num_heads=12 or num_heads={"to_q": 12}; or pass ne=0 for plain LoRA'
            )
        headless = [name for name in targets if name not in layouts]
        if headless:
            warnings.warn(
                f"these targets have no attention heads and get a plain LoRA layer, never masked: {_patterns(headless)}"
            )
        groups = plan_groups(
            {
                key: part
                for name, layout in layouts.items()
                if name in targets
                for key, part in layout.named_parts(name).items()
            },
            ne=peft_config.ne,
            ratio=peft_config.ratio,
            granularity=peft_config.granularity,
            joint=peft_config.joint,
        )
        kept = groups_kept_whole(groups, peft_config.ne)
        if kept:
            warnings.warn(kept)
        patterns = peft_config.num_heads if isinstance(peft_config.num_heads, dict) else {}
        unmatched = [pattern for pattern in patterns if not any(matches_pattern(pattern, name) for name in targets)]
        if unmatched:
            warnings.warn(f"these num_heads keys did not match any target and were ignored: {', '.join(unmatched)}")

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs: Any
    ) -> None:
        has_heads = lora_config.masks_heads and current_key in lora_config.head_layouts
        if has_heads and isinstance(target, LoraLayer) and not isinstance(target, HeadMaskedLinear):
            raise ValueError(
                f"{current_key} was given a plain LoRA layer by an earlier adapter, which cannot carry the head masks "
                f"of adapter {adapter_name!r}; add the head-masked adapter first"
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    # Static upstream, but called through `self`, which is what makes dispatch by position in the model possible.
    def _create_new_module(self, lora_config, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        name = kwargs.get("target_name")
        if name not in lora_config.head_layouts or kwargs.get("parameter_name") is not None:
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if _is_plain_linear(base_layer):
            kwargs.pop("device_map", None)
            if lora_config.fan_in_fan_out:  # as PEFT's own dispatcher does
                warnings.warn(
                    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                    "Setting fan_in_fan_out to False."
                )
                lora_config.fan_in_fan_out = False
            return HeadMaskedLinear(target, adapter_name, config=lora_config, **kwargs)
        if lora_config.masks_heads:
            raise ValueError(
                f"{name} is a {type(base_layer).__name__} with weights of type {type(base_layer.weight).__name__}, "
                "for which head masks are not implemented (expected torch.nn.Linear); load the model without "
                "quantization, exclude the module, or pass ne=0"
            )
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s); the model's labels become those of the adapter, or of the first of them."""
        shown = self.peft_config.get(self._labels_of)
        if shown is not None:  # they may have been renamed in the meantime
            shown.adapter_files.id2label = get_labels(self.model)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._show_labels()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._show_labels()

    def _show_labels(self) -> None:
        self._labels_of = next(iter(self.active_adapters), None)
        if self._labels_of in self.peft_config:
            set_labels(self.model, self.peft_config[self._labels_of].adapter_files.id2label or self.base_labels)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names"):
            check_mixed_batch(self.model, kwargs["adapter_names"])
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        # The parent reads lora_B as it stands. Rows of deactivated heads do nothing whatever their value, so writing
        # zeros there changes no adapter and makes the sum right.
        scopes = {getattr(self.peft_config.get(name), "mask_scope", "adapter") for name in adapters}
        if "head" in scopes:
            raise ValueError("adapters with mask_scope='head' cannot be combined: their update is not a sum of deltas")
        parts = {getattr(self.peft_config.get(name), "fused_parts", "") for name in adapters}
        if len(parts) > 1 and any(layout.is_fused for layout in self.peft_config[adapters[0]].head_layouts.values()):
            raise ValueError(
                f"adapters that adapt different parts of a fused projection cannot be combined: fused_parts is "
                f"{' in one, '.join(repr(part) for part in sorted(parts))} in another"
            )
        for layer in self.modules():
            if isinstance(layer, HeadMaskedLinear):
                for name in set(adapters) & set(layer.lora_head_mask):
                    for param in layer.head_parameters(name):
                        param.data = layer.mask_rows(name, param.data)
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        for layer in self.modules():  # a head is active in the sum where it is in any of the summands
            if isinstance(layer, HeadMaskedLinear) and adapter_name in layer.lora_head_mask:
                summands = [layer.get_head_mask(name) for name in adapters if name in layer.head_layout]
                layer.set_head_mask(adapter_name, torch.stack(summands).any(dim=0))

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, *args, **kwargs):
        if peft_config.masks_heads:
            raise ValueError(
                "path_initial_model_for_weight_conversion undoes an initialisation that changed the base weights; "
                "with head masks there is none, and the file would carry no masks: save without it"
            )
        return super()._convert_state_dict_for_initial_model(peft_model, peft_config, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        to_return = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = {}
        for name, layer in _head_masked_layers(model, adapter_name):
            layers[name.removeprefix("base_model.model.")] = layer
            mask = layer.get_head_mask(adapter_name)
            for suffix in ("weight", "bias"):
                key = f"{name}.lora_B.{adapter_name}.{suffix}"
                if key in to_return and not layer.active_rows(adapter_name).all():
                    rows = to_return[key]
                    to_return[key] = layer.head_layout[adapter_name].mask_rows(rows, mask.to(rows.device))
            key = f"{name}.lora_magnitude_vector.{adapter_name}"  # of DoRA: what leaves the frozen row as it is
            if key in to_return:
                magnitude = to_return[key]
                norm = torch.linalg.norm(layer.get_base_layer().weight.detach(), dim=1).to(magnitude)
                to_return[key] = torch.where(layer.active_rows(adapter_name).to(magnitude.device), magnitude, norm)

        base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        config.adapter_files.masks = read_masks(layers, adapter_name)
        config.adapter_files.model_class = type(base_model).__name__
        shown = getattr(getattr(model, "base_model", None), "_labels_of", adapter_name)
        if shown == adapter_name:
            config.adapter_files.id2label = get_labels(base_model)
        return to_return

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        num_labels = fit_task_heads(model, adapter_name, remapped)
        if num_labels is not None and len(config.adapter_files.id2label or {}) != num_labels:
            config.adapter_files.id2label = default_labels(num_labels)
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, HeadMaskedLoraModel) and tuner._labels_of == adapter_name:
            tuner._show_labels()
        lost = [k for k, v in remapped.items() if k.endswith("lora_head_mask.mask") and not v.all()]
        if lost:
            raise ValueError(
                f"the adapter file deactivates heads ({lost[0]}, …), but adapter {adapter_name!r} carries no mask "
                f"there: it was created with ne={config.ne}, ratio={config.ratio}; create it with the settings it was "
                "saved with"
            )
        for name, layer in _head_masked_layers(model, adapter_name):
            mask = remapped.get(f"{name}.lora_head_mask.{adapter_name}.mask")
            if mask is None:
                raise ValueError(
                    f"the adapter file has no head mask for {name}, which an adapter with ne={config.ne}, "
                    f"ratio={config.ratio} must have; was it made by another method, or edited? A plain LoRA adapter "
                    "is loaded with config=HeadMaskedLoraConfig.from_lora(path)"
                )
            layout = layer.head_layout[adapter_name]
            check_mask(name, mask, layout.num_heads)
            for suffix in ("weight", "bias"):
                rows = remapped.get(f"{name}.lora_B.{adapter_name}.{suffix}")
                if rows is None or rows.shape[0] != layout.out_features:
                    continue  # PEFT reports missing keys and mismatched shapes
                off = ~layout.active_rows(mask).to(rows.device)
                if rows[off].count_nonzero():
                    masks = dict(zip(layout.named_parts(name), layout.split(mask), strict=True))
                    off_heads = [f"heads {heads} of {key}" for key, heads in deactivated_heads(masks).items()]
                    raise ValueError(
                        f"the adapter file contradicts itself: in {name} the mask deactivates "
                        f"{', '.join(off_heads) or 'nothing'} and fused_parts is {config.fused_parts!r}; the deactivated "
                        f"rows of lora_B.{suffix} must be zero, but {int(rows[off].count_nonzero())} of "
                        f"{int(rows[off].numel())} entries are not; the mask or the weights were edited"
                    )
        return remapped


def _head_masked_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, HeadMaskedLinear]]:
    """`(name in the model's state dict, layer)` of the layers that carry a mask for the adapter."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, HeadMaskedLinear) and adapter_name in module.lora_head_mask
    ]


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether PEFT's plain LoRA layer is what the module gets; quantised layers often subclass `nn.Linear`."""
    return type(layer) is nn.Linear and type(layer.weight.data) is torch.Tensor


def _patterns(names: Any) -> str:
    """Module names with layer numbers folded: `vit.layers.*.attention.q_proj`."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
