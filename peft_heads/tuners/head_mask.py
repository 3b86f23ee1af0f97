"""The mask of an adapter layer's heads, whatever the method: where it lives, and how it is read and set."""

from __future__ import annotations

import torch
from torch import nn

from ..heads.layout import ProjectionLayout
from ..heads.maskable import check_mask


class HeadMask(nn.Module):
    """The one home of a mask: a persistent buffer, bool (num_heads,), True = active.

    On a fused projection it holds the heads of all adapted parts, one part after the other.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(num_heads, dtype=torch.bool))


def masked_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, HeadMaskedLayer]]:
    """`(name in the model's state dict, layer)` of the layers that carry a mask for the adapter."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, HeadMaskedLayer) and adapter_name in module.head_masks
    ]


class HeadMaskedLayer:
    """What an adapter layer with head masks has in common, for the protocol of heads/maskable.py.

    Attributes:
        head_layout: Heads of the wrapped projection, per adapter.
        head_masks_name: Name of the `nn.ModuleDict` of [`HeadMask`]s by adapter; an adapter with `ne=0` has none.
        merged_adapters: As of PEFT's layers.
    """

    head_layout: dict[str, ProjectionLayout]
    head_masks_name: str
    merged_adapters: list[str]

    @property
    def head_masks(self) -> nn.ModuleDict:
        return getattr(self, self.head_masks_name)

    def get_head_mask(self, adapter_name: str) -> torch.Tensor:
        if adapter_name not in self.head_masks:
            return torch.ones(self.head_layout[adapter_name].num_heads, dtype=torch.bool)
        return self.head_masks[adapter_name].mask

    def set_head_mask(self, adapter_name: str, mask: torch.Tensor) -> None:
        check_mask(type(self).__name__, mask, self.head_layout[adapter_name].num_heads)
        if adapter_name not in self.head_masks:
            raise ValueError(
                f"adapter {adapter_name!r} was created with ne=0 and carries no head masks; create it with ne ≥ 1"
            )
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before changing its masks")
        self.head_masks[adapter_name].mask.copy_(mask)

    def deactivated_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (out,), True = the row belongs to a deactivated head."""
        return self.head_layout[adapter_name].deactivated_rows(self.get_head_mask(adapter_name))
