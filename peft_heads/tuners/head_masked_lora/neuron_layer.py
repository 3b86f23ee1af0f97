"""The layer on an MLP's first projection that carries a binary mask per neuron."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS

from ...heads.protocol import ScoredParameter
from .config import HeadMaskedLoraConfig
from .layer import HeadMaskedLinear
from .masked_forward import VanillaVariant


class NeuronMaskedLinear(HeadMaskedLinear):
    """The first layer of an MLP, with LoRA or without, and one binary mask entry per neuron.

    The output row and the bias of a neuron that is off are zero, so that nothing of it is left behind an activation that
    maps 0 to 0. An adapter of rank 0 is its mask alone: it has no `lora_A` and no `lora_B` here, and no parameters.

    Other adapters may have plain LoRA on the same layer.
    """

    head_masks_name = "lora_neuron_mask"
    other_param_names: tuple[str, ...] = (
        *(name for name in HeadMaskedLinear.other_param_names if name != "lora_head_mask"),
        "lora_neuron_mask",
    )

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: HeadMaskedLoraConfig, **kwargs: Any
    ) -> None:
        if r > 0 or adapter_name not in self.head_layout:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            return
        self.add_mask(adapter_name, config)
        self.scaling[adapter_name] = 1.0  # PEFT's hot-swapping writes one for every key of a file
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def is_mask_alone(self, adapter_name: str) -> bool:
        """Whether an adapter has a mask here, and no LoRA."""
        return adapter_name in self.lora_neuron_mask and adapter_name not in self.lora_A

    def set_scale(self, adapter: str, scale: float) -> None:
        if not self.is_mask_alone(adapter):
            super().set_scale(adapter, scale)

    def has_masks(self, config: HeadMaskedLoraConfig) -> bool:
        return config.prunes_neurons

    def scope_of(self, config: HeadMaskedLoraConfig) -> str:
        return "head"

    def silences_rows(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_neuron_mask

    def scored_parameters(self, adapter_name: str) -> list[ScoredParameter]:
        return [] if self.is_mask_alone(adapter_name) else super().scored_parameters(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.get("adapter_names")
        alone = [name for name in adapter_names or self.active_adapters if self.is_mask_alone(name)]
        if not alone or self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        if adapter_names is not None:
            return self._without_neurons(super().forward(x, *args, **kwargs), adapter_names)
        if self.merged:
            return super().forward(x, *args, **kwargs)
        return self._forward_in_turn(x, *args, **kwargs)

    def _forward_in_turn(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output where one of the active adapters, which PEFT would pass over, is its mask alone."""
        variant_kwargs = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}  # as PEFT does
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in self.active_adapters:
            if self.is_mask_alone(name):
                result = torch.where(self.deactivated_rows(name), 0, result)
            elif name in self.lora_A:
                if self.cast_input_dtype_enabled:
                    x = x.to(self.lora_A[name].weight.dtype)
                variant = self.lora_variant.get(name) or VanillaVariant()
                result = variant.forward(self, active_adapter=name, x=x, result=result, **variant_kwargs, **kwargs)
        return result.to(dtype)

    def _without_neurons(self, output: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """The output (batch, …, out) of a batch of several adapters, without what masks alone switch off."""
        none = torch.zeros(output.shape[-1], dtype=torch.bool, device=output.device)
        rows = [self.deactivated_rows(name) if self.is_mask_alone(name) else none for name in adapter_names]
        off = torch.stack(rows).view(len(rows), *[1] * (output.dim() - 2), -1)
        return torch.where(off, 0, output)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's update of the weight, (out, in): zeros where it is its mask alone, and in rows that are off."""
        if self.is_mask_alone(adapter):
            return torch.zeros_like(self.get_base_layer().weight)
        return super().get_delta_weight(adapter)

    def merge_update(self, adapter_name: str, safe_merge: bool) -> None:
        if self.is_mask_alone(adapter_name):
            self.merged_adapters.append(adapter_name)
        else:
            super().merge_update(adapter_name, safe_merge)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.lora_neuron_mask and super().supports_lora_conversion(adapter_name)
