"""What is particular about the weights of a head-masked adapter in a file."""

from __future__ import annotations

import torch
from torch import nn

from ...functional.sharding import whole_entry
from ...heads.traversal import own_modules
from ..common.classifiers import QuantizedLinear
from ..common.head_mask import check_saved_masks, masked_layers
from .config import HeadMaskedLoraConfig
from .layer import HeadMaskedLinear


def make_plain_lora(
    model: nn.Module,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    model_state_dict: dict[str, torch.Tensor],
) -> None:
    """Write into `state_dict` what makes the weights right for a reader that knows nothing of masks.

    Rows that the adapter must not change become zeros, and DoRA's magnitude there that of the frozen row.

    Args:
        model: The model with the adapter in it.
        adapter_name: The adapter.
        state_dict: Its weights.
        model_state_dict: The model's, of which the frozen weights are taken: where the model is sharded they may have
            been put together on this process alone.
    """
    for name, layer in masked_layers(model, adapter_name):
        layout, mask = layer.head_layout[adapter_name], layer.get_head_mask(adapter_name)
        active = layout.active_rows(mask)
        if active.all():
            continue
        for suffix in ("weight", "bias"):
            key = f"{name}.lora_B.{adapter_name}.{suffix}"
            if key in state_dict:
                state_dict[key] = layout.mask_rows(state_dict[key], mask.to(state_dict[key].device))
        key = f"{name}.lora_magnitude_vector.{adapter_name}"
        if key in state_dict:
            magnitude = state_dict[key]
            base = f"{name}.base_layer.weight"
            frozen = model_state_dict.get(base, layer.get_base_layer().weight.detach())
            weight = whole_entry(model, base, frozen)
            norm = torch.linalg.norm(weight, dim=1).to(magnitude)
            state_dict[key] = torch.where(active.to(magnitude.device), magnitude, norm)


def write_quantized(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Write into an adapter's `state_dict` the values by which k-bit weights act, for a reader that quantises nothing.

    They are no state to train on from: quantised again, they would be others.
    """
    with torch.no_grad():
        for name, module in own_modules(model):
            if isinstance(module, HeadMaskedLinear) and adapter_name in module.lora_quantizer:
                state_dict[f"{name}.lora_A.weight"] = module.quantized_down(adapter_name)
                state_dict[f"{name}.lora_B.weight"] = module.quantized_up(adapter_name)
            head = getattr(module, "modules_to_save", {})
            if adapter_name in head and isinstance(head[adapter_name], QuantizedLinear):
                state_dict[f"{name}.weight"] = head[adapter_name].quantized_weight()


def check_state_dict(
    model: nn.Module, config: HeadMaskedLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the file's masks fit the adapter and agree with its weights."""
    check_saved_masks(
        model,
        config,
        adapter_name,
        state_dict,
        parameters=("lora_B.{adapter_name}.weight", "lora_B.{adapter_name}.bias"),
        zero_rows=lambda layout, mask: ~layout.active_rows(mask),
    )
