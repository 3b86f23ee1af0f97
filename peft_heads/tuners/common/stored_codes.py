"""The stored codes by which a quantised layer acts: its attribute `packed_weight`, as long as its weight is unchanged."""

from __future__ import annotations

import torch
from torch import nn

from ...functional.packing import PackedWeight


def packed_weight(linear: nn.Linear, rows: torch.Tensor | None) -> PackedWeight | None:
    """The stored codes by which a layer acts; None if it has none, or if its weight has changed since."""
    packed = getattr(linear, "packed_weight", None)
    # An offloaded weight cannot be compared. Whoever brings it back asks again.
    if packed is None or linear.weight.is_meta:
        return packed
    if packed.codes.device != linear.weight.device:
        linear.packed_weight = packed = packed.to(linear.weight.device)
    if not packed.is_behind(linear.weight.detach(), rows):
        packed = linear.packed_weight = None
    return packed


def as_packed(linear: nn.Linear, rows: torch.Tensor | None, quantized: torch.Tensor) -> torch.Tensor:
    """The packed values if their weight is unchanged, else `quantized`; the gradient is always that of `quantized`.

    One expression without a branch, which a compiler can trace.
    """
    packed = getattr(linear, "packed_weight", None)
    if packed is None:
        return quantized
    weight = linear.weight.detach()
    same = (weight == packed.latents.to(weight)).all()
    return quantized + torch.where(same, packed.values().to(weight) - quantized.detach(), 0)
