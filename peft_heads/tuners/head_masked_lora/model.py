"""The head-masked LoRA tuner."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..._compat import current_loading, expand_all_linear
from ...functional.sharding import whole_entry
from ...heads.detect import default_targets, task_head_names
from ...heads.traversal import named_targets
from ..common.classifiers import check_quantizable, quantize_task_heads, settle_task_heads
from ..common.copies import adding, check_weights, copy_adapter, copy_heads, is_copy
from ..common.head_mask import complete_masks, deactivates, masks_for_file, masks_for_model
from ..common.model import LabelledTuner
from ..common.quantizer import WeightQuantizer, one_pass
from ..common.saved_keys import is_adapter_key, rename_modules
from ..common.saved_settings import check_settings, split_settings, write_settings
from ..common.targets import warn_of_overlooked
from .combination import check_copy, check_ranks, check_sum, clear_deactivated, complete_sum, summand_config
from .config import FULL_PRECISION, HeadMaskedLoraConfig
from .layer import HeadMaskedLinear
from .packed import is_packed, read_packed, write_packed
from .state_dict import check_state_dict, make_plain_lora
from .targets import find_head_layouts, unknown_architecture


class HeadMaskedLoraModel(LabelledTuner, LoraModel):
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

        >>> vit = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k")  # needs the Hub  # doctest: +SKIP
        >>> model = get_peft_model(vit, HeadMaskedLoraConfig(ne=1))
        ```
    """

    def _prepare_adapter_config(self, peft_config: HeadMaskedLoraConfig, model_config: dict) -> HeadMaskedLoraConfig:
        self.begin_adapter(peft_config)
        # of a configuration that comes from no file there are no codes to be read
        peft_config.packed = peft_config.packed and peft_config.source is not None
        self.follow_folder(peft_config)
        if peft_config.target_modules is None and not peft_config.target_parameters:
            # PEFT's own table of defaults is asked for architectures without a recognisable attention layer
            peft_config.choose("target_modules", set(self._default_targets(peft_config)) or None)
            model_type = self.get_model_config(self.model).get("model_type")
            if not peft_config.target_modules and model_type not in self.target_module_mapping:
                raise unknown_architecture(self.model)
            warn_of_overlooked(self.model)
        if peft_config.modules_to_save is None:
            peft_config.choose("modules_to_save", task_head_names(self.model) or None)
        if peft_config.classifier_bits != FULL_PRECISION:
            check_quantizable(self.model, peft_config.modules_to_save, peft_config.classifier_bits)
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        expand_all_linear(peft_config, self.model)
        targets = [n for n, _ in named_targets(self.model) if self._check_target_module_exists(peft_config, n)]
        # of every projection, targeted or not: what is injected after a state dict follows its keys, not the config
        peft_config.head_layouts = find_head_layouts(self.model, peft_config, targets)
        if peft_config.quantizes:
            peft_config.quantizer = WeightQuantizer(peft_config.adapter_bits, awaits_codes=peft_config.packed)
        else:
            peft_config.quantizer = None
        return peft_config

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # what PeftModel has around a forward pass
        quantizes = not torch.compiler.is_compiling() and any(
            getattr(c, "quantizer", None) for c in self.peft_config.values()
        )
        with super()._enable_peft_forward_hooks(*args, **kwargs), one_pass() if quantizes else nullcontext():
            yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        bits = self.peft_config[adapter_name].classifier_bits
        if bits != FULL_PRECISION:
            quantize_task_heads(model, adapter_name, bits)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        with self.unloading(merge, adapter_names):
            model = super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)
        return settle_task_heads(model)

    def _default_targets(self, peft_config: HeadMaskedLoraConfig) -> list[str]:
        """Where they are full names, those of `layers_to_transform`, which PEFT asks about the ends of names alone."""
        names = default_targets(self.model)
        if peft_config.layers_to_transform is None:
            return names
        by_ending = copy.copy(peft_config)
        by_ending.target_modules = {name.rpartition(".")[2] for name in names}
        return [name for name in names if "." not in name or self._check_target_module_exists(by_ending, name)]

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs: Any
    ) -> None:
        if (
            (_needs_masks(lora_config, current_key) or lora_config.changes_lora)
            and isinstance(target, LoraLayer)
            and not isinstance(target, HeadMaskedLinear)
        ):
            raise ValueError(
                f"{current_key} was given a plain LoRA layer by an earlier adapter, which cannot carry the head masks, "
                f"the k-bit weights or the bottleneck dropout of adapter {adapter_name!r}; add the head-masked adapter first"
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    # Static upstream, but called through `self`, which is what makes dispatch by position in the model possible.
    def _create_new_module(self, lora_config, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        name = kwargs.get("target_name")
        has_heads = name in lora_config.head_layouts
        if not (has_heads or lora_config.changes_lora) or kwargs.get("parameter_name") is not None:
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
        if _needs_masks(lora_config, name):
            raise ValueError(
                f"{name} is a {type(base_layer).__name__} with weights of type {type(base_layer.weight).__name__}, "
                "for which head masks are not implemented (expected torch.nn.Linear); load the model without "
                "quantization, exclude the module, or pass ne=0 (on a fused projection with fused_parts=qkv)"
            )
        if lora_config.changes_lora:
            raise ValueError(
                f"{name} is a {type(base_layer).__name__}, for which adapter_bits={lora_config.adapter_bits} and "
                f"bottleneck_dropout={lora_config.bottleneck_dropout} are not implemented (expected torch.nn.Linear); "
                "exclude the module, or pass adapter_bits=32, bottleneck_dropout=0"
            )
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **options: Any,
    ) -> None:
        """Combine adapters linearly, as [`peft.LoraModel.add_weighted_adapter`] does, which see for the other arguments.

        One adapter with weight 1 gives an exact copy: rank, scaling, masks, biases, DoRA's magnitudes, the modules that
        it trains in full, and their labels. This is where head-masked LoRA deviates from stock LoRA, also with `ne=0`:
        stock LoRA gives another adapter with rsLoRA, `lora_bias`, DoRA or `rank_pattern`, and the base model's
        classifier.

        The update of a sum of several, biases included, is the sum of the updates: exactly with `"cat"`, and with
        `"svd"` if `svd_rank` suffices; `"linear"` adds the factors, `(Σ √(w s) B)(Σ √(w s) A)`, which is less exact by
        nature. A head is active in the sum where it is in any of the summands. A module that one of them has trained in
        full, such as the classifier, is copied.

        Args:
            adapters: Names of the summands.
            weights: One number for each.
            adapter_name: Name of the sum; nothing is done if it exists. It is not trained until it is set active.
            combination_type: As PEFT has it.
            svd_rank: As PEFT has it; a copy has its adapter's rank.
            options: As PEFT has them.

        Raises:
            ValueError: The adapters cannot be combined. Nothing has changed then.
        """
        if adapter_name in self.peft_config:
            return  # as the parent does
        check_weights(self.peft_config, adapters, weights)
        if is_copy(adapters, weights):
            check_copy(self.peft_config, adapters[0])
        else:
            check_sum(self, self.peft_config, adapters, combination_type)
        _, rank, _ = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        self._remember_labels()
        if is_copy(adapters, weights):  # not initialised, which could change the base weight a second time
            copy_adapter(self, adapters[0], adapter_name, init_lora_weights=False)
            return
        if len(adapters) > 1:
            check_ranks(self, adapters, combination_type, rank)
        clear_deactivated(self.model, adapters)
        configs = {name: self.peft_config[name] for name in adapters}
        with adding(self, adapter_name):
            try:
                for name in configs:
                    self.peft_config[name] = summand_config(self.model, configs, adapters, name)
                super().add_weighted_adapter(
                    adapters, weights, adapter_name, combination_type, svd_rank=svd_rank, **options
                )
            finally:
                self.peft_config.update(configs)
            complete_sum(self.model, adapters, weights, adapter_name)
            copy_heads(self, adapters, adapter_name)

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
        # Parts of a sharded model, unless the caller has put them together. In place: PEFT goes on to take what is
        # trained in full from the same dict.
        in_full = f".modules_to_save.{adapter_name}."
        state_dict |= {
            key: whole_entry(model, key, value)
            for key, value in state_dict.items()
            if is_adapter_key(key) or in_full in key
        }
        to_return = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        to_return = {
            key: whole_entry(model, key, value) for key, value in to_return.items()
        }  # biases of the base model
        make_plain_lora(model, adapter_name, to_return, state_dict)
        config.packed = is_packed(model, adapter_name, state_dict)
        if config.packed:
            write_packed(model, adapter_name, to_return, state_dict)
            is_noted = config.mask_scope == "head"
        else:  # otherwise its weights are those of stock LoRA
            is_noted = config.has_few_bits or deactivates(to_return)
        if is_noted:
            write_settings("lora_settings", config.noted_settings, to_return)
        cls.describe_for_files(model, config, adapter_name)
        return masks_for_file(to_return)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict, noted = split_settings(state_dict)
        state_dict = rename_modules(model, state_dict)
        state_dict, config.packed = read_packed(model, adapter_name, state_dict)
        if current_loading() is not None:
            state_dict = complete_masks(model, config, adapter_name, state_dict)
        state_dict = masks_for_model(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_state_dict(model, config, adapter_name, remapped)
        without_meaning = () if deactivates(remapped) else ("mask_scope=head",)
        check_settings(config.noted_settings, noted, without_meaning)
        cls.take_heads_and_labels(model, config, adapter_name, remapped)
        return remapped


def _needs_masks(config: HeadMaskedLoraConfig, name: str) -> bool:
    """Whether the adapter must leave rows of a projection alone: deactivated heads, or parts of a fused one."""
    layout = config.head_layouts.get(name)
    return layout is not None and (config.masks_heads or not layout.covers_all_rows)


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether PEFT's plain LoRA layer is what the module gets; quantised layers often subclass `nn.Linear`."""
    return type(layer) is nn.Linear and type(layer.weight.data) is torch.Tensor
