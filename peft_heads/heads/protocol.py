"""What a layer must offer to be scored and masked by head, and the functions that work on any such layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from .._compat.torch import COMPILED
from ..functional.sharding import on_gradient
from .layout import HeadLayout, ProjectionLayout
from .traversal import own_modules


@dataclass(frozen=True, eq=False)
class ScoredParameter:
    """A parameter of which each row belongs to a head, and what is scored of it: the parameter itself.

    A layer that acts by another value than its parameter, for instance a quantised one, returns a subclass.

    Attributes:
        param: The parameter, (rows of the projection, …). It is written to when heads are deactivated.
    """

    param: nn.Parameter

    def tensor(self) -> torch.Tensor:
        """The value by which the layer acts, of the parameter's shape."""
        return self.param

    def on_gradient(self, call: Callable[[torch.Tensor, bool], None]) -> Any:
        """Call `call(gradient, is_total)` with that value's gradient in each backward pass; see `sharding.on_gradient`.

        Returns:
            A handle with `remove()`.
        """
        return on_gradient(self.param, call)


@runtime_checkable
class HeadMaskable(Protocol):
    """The protocol of an adapter layer whose heads can be scored and masked.

    The layers of head-masked LoRA and RLRR follow it; those of other methods may. `HeadScorer`, `get_head_masks` and
    `set_head_masks` work on every layer that does.
    """

    head_layout: dict[str, ProjectionLayout]
    """Heads of the wrapped projection, per adapter."""

    def scored_parameters(self, adapter_name: str) -> list[ScoredParameter]:
        """The adapter's parameters that belong to heads; the leading dimension of each is the projection's rows."""

    def get_head_mask(self, adapter_name: str) -> torch.Tensor:
        """bool (num_heads,), the heads of all parts of a fused projection one after the other, True = active."""

    def set_head_mask(self, adapter_name: str, mask: torch.Tensor) -> None:
        """Set the mask from a bool tensor (num_heads,)."""

    def active_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (rows of the projection,), True = the adapter may change the row: by the mask, and by the method."""


# Parts of module names that wrappers add: PeftModel, DistributedDataParallel, torch.compile.
_WRAPPER_NAMES = re.compile(rf"^(module\.)?({COMPILED}\.)?(base_model\.model\.)?|(?<=\.){COMPILED}\.")


def head_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, HeadMaskable]:
    """`{module name in the base model: layer}` of an adapter's head-maskable layers, in the model's order.

    Raises:
        ValueError: The model has no head-maskable layer for this adapter; the message lists the adapters that do.
    """
    found, others = maskable_layers(model, adapter_name)
    if not found:
        has = f"adapters with heads: {', '.join(sorted(others))}" if others else "it has no head-masked adapter"
        raise ValueError(
            f"no attention head of the model belongs to adapter {adapter_name!r} ({has}); create the adapter with "
            "get_peft_model(model, HeadMaskedLoraConfig(...)), or with RLRRConfig(ne=1)"
        )
    return found


def maskable_layers(
    model: nn.Module, adapter_name: str, neurons: bool = False
) -> tuple[dict[str, HeadMaskable], set[str]]:
    """An adapter's layers with maskable heads, or with maskable MLP neurons, by module name in the base model.

    Returns:
        The layers in the model's order, and the names of all adapters that have such layers.
    """
    found: dict[str, HeadMaskable] = {}
    owners: set[str] = set()
    for name, module in own_modules(model):
        if isinstance(module, HeadMaskable):
            layouts = {owner: layout for owner, layout in module.head_layout.items() if layout.has_neurons == neurons}
            owners.update(layouts)
            if adapter_name in layouts:
                found[name_in_base_model(name)] = module
    return found, owners


def get_head_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The masks of an adapter.

    Returns:
        `{projection: bool tensor (num_heads,) on the CPU}`, True = active. A projection is named by its module in the
        base model; a fused one appears once per adapted part: `…qkv.q`, `…qkv.v`.

    Raises:
        ValueError: The model has no head-masked adapter of that name.
    """
    return read_masks(head_layers(model, adapter_name), adapter_name)


def set_head_masks(model: nn.Module, masks: dict[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Set masks by hand; projections that `masks` leaves out keep theirs.

    This is also how the average of a model (EMA, SWA) gets the masks, at any time and whatever averages:

        set_head_masks(average, get_head_masks(model))

    Exponential averages over buffers or over whole state dicts (torch's `AveragedModel(model, multi_avg_fn=…,
    use_buffers=True)`) keep a head that is off, off, and never activate it again; torch's averages without
    `use_buffers` copy the masks. Libraries that leave bool buffers alone (ema_pytorch) need the call after the
    selection. torch's equal-weight SWA with `use_buffers=True` raises an error at any bool buffer: leave it out.

    Args:
        model: A model with a head-masked adapter.
        masks: `{projection: bool tensor (num_heads,)}`, True = active, named as `get_head_masks` names them.
        adapter_name: The adapter.

    Raises:
        ValueError: Unknown projection, wrong shape or dtype, or a deactivated head for an adapter created with `ne=0`.
            Nothing is changed then.
    """
    write_masks(head_layers(model, adapter_name), masks, adapter_name)


def named_layouts(layers: dict[str, HeadMaskable], adapter_name: str) -> dict[str, HeadLayout]:
    """`{projection: HeadLayout}` of the layers, a fused one once per adapted part, in the layers' order."""
    return {
        key: part
        for name, layer in layers.items()
        for key, part in layer.head_layout[adapter_name].named_parts(name).items()
    }


def read_masks(layers: dict[str, HeadMaskable], adapter_name: str) -> dict[str, torch.Tensor]:
    """Copies of the layers' masks: `{projection: bool tensor (num_heads,) on the CPU}`."""
    masks = {}
    for name, layer in layers.items():
        layout = layer.head_layout[adapter_name]
        mask = layer.get_head_mask(adapter_name).detach().cpu().clone()
        masks.update(zip(layout.named_parts(name), layout.split(mask), strict=True))
    return masks


def write_masks(layers: dict[str, HeadMaskable], masks: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Set the masks of the projections that `masks` names; raises ValueError before anything is changed."""
    check_masks(layers, masks, adapter_name)
    changes = []
    for name, layer in layers.items():
        layout, before = layer.head_layout[adapter_name], layer.get_head_mask(adapter_name).detach().cpu()
        parts = zip(layout.named_parts(name), layout.split(before), strict=True)
        mask = torch.cat([masks.get(key, present).cpu() for key, present in parts])
        if not torch.equal(mask, before):
            changes.append((layer, before, mask))
    changed = []
    try:
        for layer, before, mask in changes:
            layer.set_head_mask(adapter_name, mask)
            changed.append((layer, before))
    except ValueError:  # merged, or offloaded
        for layer, before in changed:
            layer.set_head_mask(adapter_name, before)
        raise


def check_masks(layers: dict[str, HeadMaskable], masks: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Raise ValueError unless every mask belongs to one of the layers' projections and fits it."""
    layouts = named_layouts(layers, adapter_name)
    for name, mask in masks.items():
        if name not in layouts:
            raise ValueError(
                f"adapter {adapter_name!r} has no {_unit(layouts)}s in a module {name!r}; it has: {', '.join(layouts)}"
            )
        check_mask(name, mask, layouts[name].num_heads, layouts[name].unit)


def _unit(layouts: dict[str, HeadLayout]) -> str:
    return next((layout.unit for layout in layouts.values()), "head")


def check_mask(name: str, mask: torch.Tensor, num_heads: int, unit: str = "head") -> None:
    """Raise ValueError unless `mask` is a bool tensor with one entry per head, or neuron, of the projection `name`."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (num_heads,):
        actual = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"the {unit} mask of {name} must be a bool tensor of shape ({num_heads},), one entry per {unit} "
            f"(True = active); got {actual}"
        )


def module_patterns(names: Iterable[str], among: Collection[str] = ()) -> str:
    """Module names with layer numbers folded: `vit.layers.*.attention.q_proj`.

    Args:
        names: Names to be written.
        among: All names of their kind. A pattern is then written only if it matches none but the given names.

    Example:
        >>> module_patterns(["layers.0.q_proj", "layers.1.q_proj", "layers.0.v_proj"])
        'layers.*.q_proj, layers.*.v_proj'
        >>> module_patterns(["layers.0.q_proj"], among=["layers.0.q_proj", "layers.1.q_proj"])
        'layers.0.q_proj'
    """
    names = list(names)
    of_others = {_fold(name) for name in among if name not in names}
    return ", ".join(dict.fromkeys(name if _fold(name) in of_others else _fold(name) for name in names))


def name_in_base_model(name: str) -> str:
    """A module's name in the base model, without what wrappers have put before it.

    Example:
        >>> name_in_base_model("base_model.model.vit.layers.0.mlp.fc1")
        'vit.layers.0.mlp.fc1'
    """
    return _WRAPPER_NAMES.sub("", name)


def _fold(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def deactivated_heads(masks: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """`{module name: indices of its deactivated heads}`, for every projection that has any."""
    heads = {name: (~mask).nonzero().flatten().tolist() for name, mask in masks.items()}
    return {name: indices for name, indices in heads.items() if indices}


def short_list(numbers: list[int], most: int = 8) -> list[int] | str:
    """The numbers as a message lists them: all of them, or the first and how many there are.

    Example:
        >>> short_list([2, 5])
        [2, 5]
        >>> short_list(list(range(100)), most=3)
        '[0, 1, 2, …] (100)'
    """
    if len(numbers) <= most:
        return numbers
    return f"[{', '.join(map(str, numbers[:most]))}, …] ({len(numbers)})"


def describe_masks(masks: dict[str, torch.Tensor]) -> str:
    """The deactivated heads in one line, projections with the same heads together.

    Example:
        >>> off = torch.tensor([True, False])
        >>> describe_masks({"layers.0.q_proj": off, "layers.0.v_proj": off, "layers.1.q_proj": ~off})
        'head 1 of 2 in layers.0.q_proj, layers.0.v_proj; head 0 of 2 in layers.1.q_proj'
    """
    places: dict[tuple, list[str]] = {}
    for name, indices in deactivated_heads(masks).items():
        places.setdefault((tuple(indices), len(masks[name])), []).append(name)
    if not places:
        return "none"
    parts = []
    for (indices, num_heads), names in places.items():
        if len(names) == len(masks):
            where = f"all {len(names)} projections"
        elif len(names) > 4:
            where = f"{len(names)} projections ({names[0]} … {names[-1]})"
        else:
            where = ", ".join(names)
        parts.append(f"head{'s' * (len(indices) > 1)} {', '.join(map(str, indices))} of {num_heads} in {where}")
    return "; ".join(parts)
