"""What is particular about the weights of an RLRR adapter in a file."""

from __future__ import annotations

import torch
from torch import nn

from ...heads.maskable import check_mask
from ..head_mask import masked_layers
from .config import RLRRConfig


def write_deactivated(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Write zeros into the rows of `S_out` and f that belong to deactivated heads, whatever stands there."""
    for name, layer in masked_layers(model, adapter_name):
        for part in ("rlrr_left", "rlrr_shift"):
            key = f"{name}.{part}.{adapter_name}"
            if key in state_dict:
                rows = state_dict[key]
                off = layer.deactivated_rows(adapter_name).to(rows.device)
                state_dict[key] = torch.where(off.view(-1, *[1] * (rows.dim() - 1)), 0, rows)


def check_state_dict(
    model: nn.Module, config: RLRRConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the file's masks are there, fit the adapter, and agree with its weights."""
    lost = [key for key, value in state_dict.items() if key.endswith("rlrr_head_mask.mask") and not value.all()]
    if lost:
        raise ValueError(
            f"the adapter file deactivates heads ({lost[0]}, …), but adapter {adapter_name!r} carries no mask there: "
            f"it was created with ne={config.ne}, ratio={config.ratio}; create it with the settings it was saved with"
        )
    for name, layer in masked_layers(model, adapter_name):
        mask = state_dict.get(f"{name}.rlrr_head_mask.{adapter_name}.mask")
        if mask is None:
            raise ValueError(
                f"the adapter file has no head mask for {name}, which an adapter with ne={config.ne}, "
                f"ratio={config.ratio} must have; was it edited, or saved with ne=0?"
            )
        layout = layer.head_layout[adapter_name]
        check_mask(name, mask, layout.num_heads)
        for part in ("rlrr_left", "rlrr_shift"):
            rows = state_dict.get(f"{name}.{part}.{adapter_name}")
            if rows is None or rows.shape[0] != layout.out_features:
                continue  # PEFT reports missing keys and mismatched shapes
            off = layout.deactivated_rows(mask).to(rows.device)
            if rows[off].count_nonzero():
                raise ValueError(
                    f"the adapter file contradicts itself: in {name} the mask deactivates heads "
                    f"{(~mask).nonzero().flatten().tolist()}, whose rows of {part} must be zero, but "
                    f"{int(rows[off].count_nonzero())} of {int(rows[off].numel())} entries are not; the mask or the "
                    "weights were edited"
                )
