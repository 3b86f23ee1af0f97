"""Switches units of an adapter off: masks, rows and the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch

from ..functional.sharding import zero_rows
from ..heads.protocol import HeadMaskable, check_masks, read_masks, write_masks


@torch.no_grad()
def switch_off(
    layers: dict[str, HeadMaskable], masks: dict[str, torch.Tensor], adapter_name: str, optimizer: Any = None
) -> None:
    """Set masks, set the rows of units that are off to zero, and clear their entries in the optimizer's state.

    Otherwise momentum would move the rows again. The mask hides that, but not from a reader of the raw weights.

    Args:
        layers: `{module name: layer}`, all with heads or all with neurons.
        masks: `{projection: bool (units,)}`, True = active.
        adapter_name: The adapter.
        optimizer: The optimizer of the adapter's parameters, possibly prepared by Accelerate.

    Raises:
        ValueError: A mask is that of an unknown projection, or has a wrong shape or dtype; nothing is changed then.
    """
    write_masks(layers, masks, adapter_name)
    for layer in layers.values():
        if layer.get_head_mask(adapter_name).all():
            continue
        for scored in layer.scored_parameters(adapter_name):
            zero_rows(scored.param, layer.active_rows(adapter_name), optimizer)


def check_deeper(layers: dict[str, HeadMaskable], masks: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Raise ValueError unless masks fit the layers and leave units off that are off already."""
    check_masks(layers, masks, adapter_name)
    for name, present in read_masks(layers, adapter_name).items():
        on_again = (masks[name].cpu() & ~present).nonzero().flatten().tolist() if name in masks else []
        if on_again:
            raise ValueError(
                f"deepen=True leaves off what is off, but the masks would switch unit {on_again[0]} of {name} on again; "
                "select with deepen=True as well"
            )
