"""What is particular about the weights of a head-masked adapter in a file."""

from __future__ import annotations

import torch
from torch import nn

from ...heads.maskable import check_mask, deactivated_heads
from ...sharding import whole
from ..head_mask import masked_layers
from ..task_heads import QuantizedLinear
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
            weight = whole(model_state_dict.get(f"{name}.base_layer.weight", layer.get_base_layer().weight.detach()))
            norm = torch.linalg.norm(weight, dim=1).to(magnitude)
            state_dict[key] = torch.where(active.to(magnitude.device), magnitude, norm)


def write_quantized(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Write into an adapter's `state_dict` the values by which k-bit weights act, for a reader that quantises nothing.

    They are no state to train on from: quantised again, they would be others.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, HeadMaskedLinear) and adapter_name in module.lora_quantizer:
                state_dict[f"{name}.lora_A.weight"] = module.quantized_down(adapter_name)
                state_dict[f"{name}.lora_B.weight"] = module.quantized_up(adapter_name)
            head = getattr(module, "modules_to_save", {})
            if adapter_name in head and isinstance(head[adapter_name], QuantizedLinear):
                state_dict[f"{name}.weight"] = head[adapter_name].quantized_weight()


def check_state_dict(
    model: nn.Module, config: HeadMaskedLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the file's masks are there, fit the adapter, and agree with its weights."""
    lost = [k for k, v in state_dict.items() if k.endswith("lora_head_mask.mask") and not v.all()]
    if lost:
        raise ValueError(
            f"the adapter file deactivates heads ({lost[0]}, …), but adapter {adapter_name!r} carries no mask there: "
            f"it was created with ne={config.ne}, ratio={config.ratio}; create it with the settings it was saved with"
        )
    for name, layer in masked_layers(model, adapter_name):
        mask = state_dict.get(f"{name}.lora_head_mask.{adapter_name}.mask")
        if mask is None:
            raise ValueError(
                f"the adapter file has no head mask for {name}, which an adapter with ne={config.ne}, "
                f"ratio={config.ratio} must have; was it made by another method, or edited? A plain LoRA adapter is "
                "loaded with config=HeadMaskedLoraConfig.from_lora(path)"
            )
        layout = layer.head_layout[adapter_name]
        check_mask(name, mask, layout.num_heads)
        for suffix in ("weight", "bias"):
            rows = state_dict.get(f"{name}.lora_B.{adapter_name}.{suffix}")
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
