"""What is particular about the weights of a head-masked adapter in a file."""

from __future__ import annotations

import torch
from torch import nn

from ...functional.sharding import whole_entry
from ...heads.traversal import own_modules
from ..common.classifiers import QuantizedLinear
from ..common.head_mask import check_saved_masks, masked_layers
from ..common.mask_keys import deactivates
from .config import HeadMaskedLoraConfig
from .layer import HeadMaskedLinear
from .packed import is_packed, read_packed, write_packed


class HeadMaskedWeights:
    """What the file of an adapter holds, mixed into the tuner."""

    @classmethod
    def zero_inactive_rows(cls, model, adapter_name, state_dict, model_state_dict):
        make_plain_lora(model, adapter_name, state_dict, model_state_dict)

    @classmethod
    def check_masks(cls, model, config, adapter_name, state_dict):
        check_state_dict(model, config, adapter_name, state_dict)

    @classmethod
    def encode(cls, model, config, adapter_name, state_dict, model_state_dict):
        config.packed = is_packed(model, adapter_name, model_state_dict)
        if config.packed:
            write_packed(model, adapter_name, state_dict, model_state_dict)
            is_noted = config.mask_scope == "head"
        else:  # otherwise its weights are those of stock LoRA
            is_noted = config.has_few_bits or deactivates(state_dict)
        return config.noted_settings if is_noted else {}

    @classmethod
    def decode(cls, model, config, adapter_name, state_dict):
        state_dict, config.packed = read_packed(model, adapter_name, state_dict)
        return state_dict

    @classmethod
    def settings_without_meaning(cls, state_dict):
        return () if deactivates(state_dict) else ("mask_scope=head",)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, *args, **kwargs):
        if peft_config.masks_heads:
            raise ValueError(
                "path_initial_model_for_weight_conversion undoes an initialisation that changed the base weights; "
                "with head masks there is none, and the file would carry no masks: save without it"
            )
        return super()._convert_state_dict_for_initial_model(peft_model, peft_config, *args, **kwargs)


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
        model_state_dict: State dict of the model, which holds the frozen weights. Those of a sharded model may have been
            put together on this process alone.
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
