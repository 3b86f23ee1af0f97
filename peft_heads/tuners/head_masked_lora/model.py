"""The head-masked LoRA tuner."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...backbones.neurons import is_plain_linear
from ...backbones.structure import find_backbone
from ...backbones.targets import default_targets, shortest_names
from ...heads.layout import ProjectionLayout
from ..common.classifiers import check_quantizable, quantize_classifiers, quantized_classifiers, settle_classifiers
from ..common.model import VisionTuner
from ..common.quantizer import WeightQuantizer, one_pass
from ..common.state import AdapterState
from .combination import HeadMaskedSums
from .config import FULL_PRECISION, HeadMaskedLoraConfig
from .layer import HeadMaskedLinear
from .neuron_layer import NeuronMaskedLinear
from .neuron_masks import add_neuron_masks, find_neuron_layouts, without_masks
from .state_dict import HeadMaskedWeights
from .targets import check_plain_lora, find_head_layouts, needs_masks, unknown_architecture


@dataclass
class HeadMaskedLoraState(AdapterState):
    """State of a head-masked LoRA adapter.

    Attributes:
        quantizer: The one quantiser that all layers of a k-bit adapter share; None in full precision.
        neuron_layouts: `{module name: neurons}` of the first layer of every MLP; empty if neurons are not pruned.
    """

    quantizer: WeightQuantizer | None = None
    neuron_layouts: dict[str, ProjectionLayout] = field(default_factory=dict)

    def layout_of(self, name: str | None) -> ProjectionLayout | None:
        """Heads or neurons of a module; None if it has neither."""
        return self.neuron_layouts.get(name) or self.head_layouts.get(name)


class HeadMaskedLoraModel(HeadMaskedSums, HeadMaskedWeights, VisionTuner, LoraModel):
    """LoRA with a binary mask per attention head, created from a pre-trained vision transformer.

    Query, key and value projections get a [`HeadMaskedLinear`]; other targets (MLP, output projection, convolution)
    get PEFT's own LoRA layer and are never scored or masked. Where neurons are pruned, the first layer of every MLP gets
    a [`NeuronMaskedLinear`], targeted or not.

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

    state_class = HeadMaskedLoraState

    def begin_adapter(self, peft_config: HeadMaskedLoraConfig) -> HeadMaskedLoraState:
        # of a configuration that comes from no file there are no codes to be read
        peft_config.packed = peft_config.packed and peft_config.carried.source is not None
        return super().begin_adapter(peft_config)

    def default_modules(self, peft_config: HeadMaskedLoraConfig) -> list[str]:
        if peft_config.prunes_neurons:
            return shortest_names(list(find_backbone(self.model).matrices), self.model)
        names = default_targets(self.model)
        # PEFT's own table of defaults is asked for architectures without a recognisable attention layer
        if not names and self.get_model_config(self.model).get("model_type") not in self.target_module_mapping:
            raise unknown_architecture(self.model)
        return names

    def check_config(self, peft_config: HeadMaskedLoraConfig) -> None:
        if peft_config.classifier_bits != FULL_PRECISION:
            check_quantizable(self.model, peft_config.modules_to_save, peft_config.classifier_bits)

    def prepare_targets(
        self, peft_config: HeadMaskedLoraConfig, state: HeadMaskedLoraState, targets: list[str]
    ) -> None:
        if peft_config.prunes_neurons:
            state.neuron_layouts = find_neuron_layouts(self.model, peft_config)
        state.head_layouts = find_head_layouts(self.model, peft_config, targets)
        if peft_config.quantizes:
            state.quantizer = WeightQuantizer(peft_config.adapter_bits, awaits_codes=peft_config.packed)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("state_dict") is not None:  # whose keys say which layers get LoRA
            kwargs["state_dict"] = without_masks(kwargs["state_dict"])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        add_neuron_masks(self, adapter_name)
        bits = self.peft_config[adapter_name].classifier_bits
        if bits != FULL_PRECISION:
            quantize_classifiers(model, adapter_name, bits)

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs: Any
    ) -> None:
        state = self.adapter_states[adapter_name]
        layout = state.layout_of(current_key)
        if isinstance(target, HeadMaskedLinear):
            # PEFT is going to call `update_layer`, to which it passes nothing of ours
            target.expect_adapter(adapter_name, layout, state.quantizer)
        elif isinstance(target, LoraLayer) and (needs_masks(lora_config, layout) or lora_config.changes_lora):
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
        state = self.adapter_states[adapter_name]
        layout = state.layout_of(name)
        if not (layout or lora_config.changes_lora) or kwargs.get("parameter_name") is not None:
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if is_plain_linear(base_layer):
            kwargs.pop("device_map", None)
            if lora_config.fan_in_fan_out:  # as PEFT's own dispatcher does
                warnings.warn(
                    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                    "Setting fan_in_fan_out to False."
                )
                lora_config.fan_in_fan_out = False
            layer_class = NeuronMaskedLinear if name in state.neuron_layouts else HeadMaskedLinear
            return layer_class(
                target, adapter_name, config=lora_config, layout=layout, quantizer=state.quantizer, **kwargs
            )
        check_plain_lora(name, base_layer, lora_config, layout)
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # what PeftModel has around a forward pass
        quantizes = not torch.compiler.is_compiling() and any(config.quantizes for config in self.peft_config.values())
        with super()._enable_peft_forward_hooks(*args, **kwargs), one_pass() if quantizes else nullcontext():
            yield

    def forget_codes(self, adapter_name: str = "default") -> None:
        """Decide the codes of an adapter's k-bit weights again with the next pass, also with gradients.

        To be called after weights have been written through `.data` between two passes with gradients.
        """
        if adapter_name not in self.adapter_states:
            raise ValueError(f"there is no adapter {adapter_name!r}; the model has {', '.join(self.adapter_states)}")
        heads = quantized_classifiers(self.model, adapter_name)
        for quantizer in (self.adapter_states[adapter_name].quantizer, *(head.quantizer for head in heads)):
            if quantizer is not None:
                quantizer.forget()

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        with self.unloading(merge, adapter_names):
            model = super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)
        return settle_classifiers(model)
