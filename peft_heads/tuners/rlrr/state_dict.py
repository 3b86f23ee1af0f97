"""What is particular about the weights of an RLRR adapter in a file."""

from __future__ import annotations

import torch
from torch import nn

from ...functional.rows import without_rows
from ...heads.layout import ProjectionLayout
from ..common.head_mask import check_saved_masks, masked_layers
from .config import RLRRConfig


def write_deactivated(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Write zeros into the rows of `S_out` and f that belong to deactivated heads, whatever stands there."""
    for name, layer in masked_layers(model, adapter_name):
        for part in ("rlrr_left", "rlrr_shift"):
            key = f"{name}.{part}.{adapter_name}"
            if key in state_dict:
                rows = state_dict[key]
                off = layer.deactivated_rows(adapter_name).to(rows.device)
                state_dict[key] = without_rows(rows, off)


def check_state_dict(
    model: nn.Module, config: RLRRConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the file's masks fit the adapter and agree with its weights."""
    check_saved_masks(
        model,
        config,
        adapter_name,
        state_dict,
        parameters=("rlrr_left.{adapter_name}", "rlrr_shift.{adapter_name}"),
        zero_rows=ProjectionLayout.deactivated_rows,
    )
