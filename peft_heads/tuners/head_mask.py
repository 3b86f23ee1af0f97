"""The mask of an adapter layer's heads, whatever the method: where it lives, and how it is read and set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..heads.layout import ProjectionLayout
from ..heads.maskable import check_mask, deactivated_heads
from .saved_config import SavedConfig
from .saved_keys import BASE


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


def complete_masks(
    model: nn.Module, config: SavedConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a file with a mask for every layer that carries one: a missing mask means that all are active.

    Args:
        model: The model with the adapter in it.
        config: The adapter's configuration.
        adapter_name: The adapter.
        state_dict: The file's weights, without the adapter's name in their keys.

    Raises:
        ValueError: The weights speak of deactivated heads, and it matters: whole heads silent, or left out by a quantiser.
    """
    completed = dict(state_dict)
    matters = getattr(config, "mask_scope", "adapter") == "head" or getattr(config, "quantizes", False)
    for name, layer in masked_layers(model, adapter_name):
        prefix = next((p for p in ("", BASE) if f"{p}{name}.lora_B.weight" in state_dict), "")
        key = f"{name}.{layer.head_masks_name}.mask"
        if key in state_dict or BASE + key in state_dict:
            continue
        layout = layer.head_layout[adapter_name]
        completed[prefix + key] = torch.ones(layout.num_heads, dtype=torch.bool)
        rows = state_dict.get(f"{prefix}{name}.lora_B.weight")
        if not matters or rows is None or rows.shape[0] != layout.out_features or not rows.count_nonzero():
            continue
        for part, heads in layout.named_parts(name).items():
            silent = (heads.rows(rows).reshape(heads.num_heads, -1) != 0).sum(dim=1) == 0
            if silent.any():
                raise ValueError(
                    f"the adapter file has no head mask for {part}, but its rows of lora_B are zero for heads "
                    f"{silent.nonzero().flatten().tolist()}, as those of deactivated heads alone are; it was edited"
                )
    return completed


def check_saved_masks(
    model: nn.Module,
    config: SavedConfig,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    *,
    parameters: tuple[str, ...],
    zero_rows: Callable[[ProjectionLayout, torch.Tensor], torch.Tensor],
) -> None:
    """Raise ValueError unless a file's masks fit the adapter, and agree with its weights.

    Args:
        model: The model with the adapter in it.
        config: The adapter's configuration.
        adapter_name: The adapter.
        state_dict: The file's weights, by the names they have in the model.
        parameters: What has rows by head, as named in a layer: `"lora_B.{adapter_name}.weight"`.
        zero_rows: Of a layout and its mask, bool (out,): the rows that must be zero.
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
            continue  # of a dict, which may be a part; a folder's are complete
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
