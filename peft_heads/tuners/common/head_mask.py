"""The head mask of an adapter layer, for all methods: where it lives, how it is read, set, saved and checked."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from ...heads.layout import ProjectionLayout
from ...heads.protocol import check_mask, deactivated_heads, short_list
from ...heads.traversal import own_modules
from .head_selection import HeadSelectionConfig
from .mask_keys import IN_FILE, IN_MODEL, KINDS, NEURON_KIND
from .saved_keys import BASE


# The ends of keys of masks for which the model has no place, and which therefore have no adapter's name.
LOST = tuple(kind + IN_MODEL for kind in KINDS)


class HeadMask(nn.Module):
    """The one home of a mask: a persistent buffer `off`, bool (num_heads,), True = *deactivated*.

    One entry stands for an attention head, or for a neuron of an MLP.

    On a fused projection it holds the heads of all adapted parts, one part after the other.

    Only the buffer says True = deactivated: an exponential average over buffers is then above zero for a head that is
    off, rounds to True, and so keeps the head off. Files, and all functions that take or return masks, say True =
    active. So did the buffer of earlier versions, `mask`, which is converted where a state dict has it.

    Read the buffer by calling the module: Accelerate, which may have offloaded it, brings it back around a call.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.register_buffer("off", torch.zeros(num_heads, dtype=torch.bool))

    def forward(self) -> torch.Tensor:
        """bool (num_heads,), True = deactivated."""
        return self.off

    @property
    def active(self) -> torch.Tensor:
        """bool (num_heads,), True = active; a copy."""
        return ~self()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        old = state_dict.pop(f"{prefix}mask", None)  # the dict is torch's own copy
        if old is not None:
            off = state_dict.setdefault(f"{prefix}off", ~old if old.dtype == torch.bool else None)
            if off is None or not torch.equal(off, ~old):
                errors.append(
                    f"{prefix}mask (True = active) must be a bool tensor that agrees with {prefix}off (True = "
                    f"deactivated) if that is there too; got {old.dtype}: was it edited or averaged?"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def masked_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, HeadMaskedLayer]]:
    """`(name in the model's state dict, layer)` of the layers that carry a mask for the adapter."""
    return [
        (name, module)
        for name, module in own_modules(model)
        if isinstance(module, HeadMaskedLayer) and adapter_name in module.head_masks
    ]


class HeadMaskedLayer:
    """The part of the protocol of heads/protocol.py that all adapter layers with head masks share.

    Attributes:
        head_layout: Heads of the wrapped projection, per adapter.
        head_masks_name: Name of the `nn.ModuleDict` of [`HeadMask`]s by adapter; an adapter with `ne=0` has none.
        merged_adapters: Names of the merged adapters, as in every layer of PEFT's.
    """

    head_layout: dict[str, ProjectionLayout]
    head_masks_name: str
    merged_adapters: list[str]

    @property
    def head_masks(self) -> nn.ModuleDict:
        return getattr(self, self.head_masks_name)

    def head_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The adapter's parameters whose rows belong to heads."""
        return [scored.param for scored in self.scored_parameters(adapter_name)]

    def get_head_mask(self, adapter_name: str) -> torch.Tensor:
        if adapter_name not in self.head_masks:
            return torch.ones(self.head_layout[adapter_name].num_heads, dtype=torch.bool)
        return self.head_masks[adapter_name].active

    def set_head_mask(self, adapter_name: str, mask: torch.Tensor) -> None:
        layout = self.head_layout[adapter_name]
        unit = layout.parts[0].unit
        check_mask(type(self).__name__, mask, layout.num_heads, unit)
        if adapter_name not in self.head_masks:
            raise ValueError(
                f"adapter {adapter_name!r} was created with ne=0 and carries no head masks; create it with ne ≥ 1"
            )
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before changing its masks")
        off = self.head_masks[adapter_name].off
        if off.is_meta:
            raise ValueError(
                f"the {unit} masks of adapter {adapter_name!r} are offloaded (offload_buffers=True) and cannot be changed "
                "there; set them before the model is offloaded, or offload without buffers"
            )
        off.copy_(~mask)

    def deactivated_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (out,), True = the row belongs to a deactivated head."""
        layout = self.head_layout[adapter_name]
        if adapter_name not in self.head_masks:
            return layout.deactivated_rows(self.get_head_mask(adapter_name))
        return layout.rows_of(self.head_masks[adapter_name]())


def rows_in_file(
    layout: ProjectionLayout | None, owner: str, shape: tuple[int, int], mask: torch.Tensor
) -> torch.Tensor:
    """The rows of a packed `lora_B` that are in the file, bool (out,): those of active heads.

    Args:
        layout: Heads of the projection; None if it has none.
        owner: Whose heads these are, for the message.
        shape: The matrix's shape, as the file says it.
        mask: bool (num_heads,), True = active, as the file says it.

    Raises:
        ValueError: The file has other heads or rows.
    """
    if layout is None or (len(mask), shape[0]) != (layout.num_heads, layout.out_features):
        heads = "none" if layout is None else f"{layout.num_heads} in {layout.out_features} rows"
        raise ValueError(f"it has {len(mask)} heads in {shape[0]} rows, but {owner} has {heads}")
    return layout.active_rows(mask)


def contradiction(where: str | os.PathLike, what: str) -> ValueError:
    """The error for a file whose masks and weights do not agree.

    Args:
        where: The file.
        what: What the mask says, and what the weights are.
    """
    return ValueError(f"{os.fspath(where)} contradicts itself: {what}; the mask or the weights were edited")


def complete_masks(
    model: nn.Module, config: HeadSelectionConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Complete the weights of a file with the masks that it leaves out: there all heads are active.

    Args:
        model: The model with the adapter in it.
        config: The adapter's configuration.
        adapter_name: The adapter.
        state_dict: The file's weights, without the adapter's name in their keys.

    Raises:
        ValueError: Zeros among the weights say that heads were deactivated, and it matters: with `mask_scope="head"`
            the whole head would be zero, and a quantiser would leave its rows out.
    """
    completed = dict(state_dict)
    heads_matter = getattr(config, "mask_scope", "adapter") == "head" or getattr(config, "quantizes", False)
    for name, layer in masked_layers(model, adapter_name):
        prefix = next((p for p in ("", BASE) if f"{p}{name}.lora_B.weight" in state_dict), "")
        key = f"{name}.{layer.head_masks_name}.mask"
        if key in state_dict or BASE + key in state_dict:
            continue
        layout = layer.head_layout[adapter_name]
        completed[prefix + key] = torch.ones(layout.num_heads, dtype=torch.bool)
        rows = state_dict.get(f"{prefix}{name}.lora_B.weight")
        matters = heads_matter or layout.has_neurons
        if not matters or rows is None or rows.shape[0] != layout.out_features or not rows.count_nonzero():
            continue
        for part, heads in layout.named_parts(name).items():
            silent = (heads.rows(rows).reshape(heads.num_heads, -1) != 0).sum(dim=1) == 0
            if silent.any():
                raise ValueError(
                    f"the adapter file has no {heads.unit} mask for {part}, but its rows of lora_B are zero for "
                    f"{heads.unit}s {short_list(silent.nonzero().flatten().tolist())}, as those of deactivated "
                    f"{heads.unit}s alone are; it was edited"
                )
    return completed


def check_saved_masks(
    model: nn.Module,
    config: HeadSelectionConfig,
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
        zero_rows: Function of a layout and its mask that returns the rows that must be zero, bool (out,).
    """
    lost = [key for key, value in state_dict.items() if key.endswith(LOST) and value.any()]
    if lost:
        units = "neurons" if NEURON_KIND in lost[0] else "heads"
        names = ("ne", "ratio", "neuron_ratio", "target_speed") if units == "neurons" else ("ne", "ratio")
        created = ", ".join(f"{name}={getattr(config, name, None)}" for name in names)
        raise ValueError(
            f"the adapter file deactivates {units} ({lost[0].removesuffix(IN_MODEL) + IN_FILE}, …), but adapter "
            f"{adapter_name!r} carries no mask there: it was created with {created}; create it with the settings it was "
            "saved with"
        )
    for name, layer in masked_layers(model, adapter_name):
        off = state_dict.get(f"{name}.{layer.head_masks_name}.{adapter_name}.off")
        if off is None:
            continue  # a dict may hold a part of the adapter; the weights of a folder are complete
        layout, mask = layer.head_layout[adapter_name], ~off
        unit = layout.parts[0].unit
        check_mask(name, mask, layout.num_heads, unit)
        for parameter in parameters:
            rows = state_dict.get(f"{name}.{parameter.format(adapter_name=adapter_name)}")
            if rows is None or rows.shape[0] != layout.out_features:
                continue  # PEFT reports missing keys and mismatched shapes
            zeros = rows[zero_rows(layout, mask).to(rows.device)]
            if zeros.count_nonzero():
                masks = dict(zip(layout.named_parts(name), layout.split(mask), strict=True))
                heads = [f"{unit}s {short_list(units)} of {key}" for key, units in deactivated_heads(masks).items()]
                of_heads = unit == "head" and hasattr(config, "fused_parts")
                fused_parts = f" and fused_parts is {config.fused_parts!r}" if of_heads else ""
                raise contradiction(
                    "the adapter file",
                    f"in {name} the mask deactivates {', '.join(heads) or 'nothing'}{fused_parts}; the deactivated "
                    f"rows of {parameter.replace('.{adapter_name}', '')} must be zero, but "
                    f"{int(zeros.count_nonzero())} of {zeros.numel()} entries are not",
                )
