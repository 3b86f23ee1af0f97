"""The mask of an adapter layer's heads, whatever the method: where it lives, and how it is read and set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..heads.layout import ProjectionLayout
from ..heads.maskable import check_mask, deactivated_heads
from ..heads.traversal import own_modules
from .saved_config import SavedConfig
from .targets import module_patterns


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
        for name, module in own_modules(model)
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


def check_saved_masks(
    model: nn.Module,
    config: SavedConfig,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    *,
    parameters: tuple[str, ...],
    zero_rows: Callable[[ProjectionLayout, torch.Tensor], torch.Tensor],
    way_out: str,
) -> None:
    """Raise ValueError unless a file's masks are there, fit the adapter, and agree with its weights.

    Args:
        model: The model with the adapter in it.
        config: The adapter's configuration.
        adapter_name: The adapter.
        state_dict: The file's weights, by the names they have in the model.
        parameters: What has rows by head, as named in a layer: `"lora_B.{adapter_name}.weight"`.
        zero_rows: Of a layout and its mask, bool (out,): the rows that must be zero.
        way_out: What may have happened, and what can be done, where a mask is missing.
    """
    created = f"ne={config.ne}, ratio={config.ratio}"
    lost = [key for key, value in state_dict.items() if key.endswith("_head_mask.mask") and not value.all()]
    if lost:
        raise ValueError(
            f"the adapter file deactivates heads ({lost[0]}, …), but adapter {adapter_name!r} carries no mask there: "
            f"it was created with {created}; create it with the settings it was saved with"
        )
    for name, layer in masked_layers(model, adapter_name):
        mask = state_dict.get(f"{name}.{layer.head_masks_name}.{adapter_name}.mask")
        if mask is None:
            owners = [key.rpartition(f".{layer.head_masks_name}.")[0] for key in state_dict if key.endswith(".mask")]
            if owners and not {owner for owner, _ in masked_layers(model, adapter_name)} & set(owners):
                way_out = f"its masks are those of {module_patterns(owners)}: is it an adapter of another model?"
            raise ValueError(
                f"the adapter file has no head mask for {name}, which an adapter with {created} must have; {way_out}"
            )
        layout = layer.head_layout[adapter_name]
        check_mask(name, mask, layout.num_heads)
        for parameter in parameters:
            rows = state_dict.get(f"{name}.{parameter.format(adapter_name=adapter_name)}")
            if rows is None or rows.shape[0] != layout.out_features:
                continue  # PEFT reports missing keys and mismatched shapes
            off = rows[zero_rows(layout, mask).to(rows.device)]
            if off.count_nonzero():
                masks = dict(zip(layout.named_parts(name), layout.split(mask), strict=True))
                heads = [f"heads {heads} of {key}" for key, heads in deactivated_heads(masks).items()]
                fused_parts = f" and fused_parts is {config.fused_parts!r}" if hasattr(config, "fused_parts") else ""
                raise ValueError(
                    f"the adapter file contradicts itself: in {name} the mask deactivates "
                    f"{', '.join(heads) or 'nothing'}{fused_parts}; the deactivated rows of "
                    f"{parameter.replace('.{adapter_name}', '')} must be zero, but {int(off.count_nonzero())} of "
                    f"{off.numel()} entries are not; the mask or the weights were edited"
                )
