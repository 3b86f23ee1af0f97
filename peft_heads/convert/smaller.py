"""Removes deactivated heads and neurons from a model: an ordinary, smaller model of transformers with the same outputs.

This is exact where the value of a deactivated head is zero, bias included, and so is the input of a deactivated
neuron's activation, which maps zero to zero. The weights of heads are found by their shapes, which differ from those of
a model that is built with fewer heads, and not by their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..backbones.blocks import find_blocks
from ..backbones.empty_models import build_empty, random_images, smaller_config
from ..backbones.image_part import image_projections
from ..backbones.prunable import find_head_way, find_neuron_way
from ..backbones.units import count_units, neurons_of
from ..heads.layout import HeadLayout
from .slices import slice_heads, slice_neurons


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune(
    model: PreTrainedModel, head_masks: dict[str, torch.Tensor], neuron_masks: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """A copy of a model without its deactivated heads and neurons, in evaluation mode.

    Every layer has to lose the same number of heads, and the same number of neurons, because an ordinary configuration
    says one number for all layers (`peft_heads.backbones.prunable`). Which heads and neurons may differ. The result is
    compared with `model` on a random image, for which `model` is set to evaluation mode.

    Args:
        model: A model of transformers in which the value of a masked head is zero, and the first MLP layer's output for
            a masked neuron: the adapter is merged.
        head_masks: `{projection: bool (num_heads,)}`, True = active, from `get_head_masks`. A head can be removed if
            its value is masked; a masked query or key is not enough.
        neuron_masks: `{first MLP layer: bool (num_neurons,)}`, True = active, from `get_neuron_masks`. A layer that
            is left out keeps its neurons.

    Raises:
        ValueError: Nothing is deactivated, layers differ in the number that remains, or the configuration cannot say
            it, with the numbers that it can.
    """
    values = _value_projections(model)
    heads = {
        name: head_masks.get(projection, torch.ones(part.num_heads, dtype=torch.bool)).cpu()
        for name, (projection, part) in values.items()
    }
    heads_off, neurons_off = _any_off(heads), _any_off(neuron_masks)
    if neuron_masks and not (heads_off or neurons_off):
        raise ValueError("no head and no neuron is deactivated; use --to merged")
    fields: dict[str, Any] = {}
    neurons: dict[tuple[str, str], torch.Tensor] = {}
    if not neurons_off or heads_off:
        fields |= _head_fields(model, {values[name][0]: mask for name, mask in heads.items()})
    if neurons_off:
        neurons = _kept_neurons(model, neuron_masks)
        fields |= _neuron_fields(model, {first: mask for (first, _), mask in neurons.items()})
    return _build(model, fields, heads, neurons)


def prune_heads(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of a model without its deactivated heads: [`prune`] without neurons."""
    return prune(model, masks, {})


def _value_projections(model: PreTrainedModel) -> dict[str, tuple[str, HeadLayout]]:
    """`{attention layer: (its value projection, the heads of it)}`."""
    return {
        name.rpartition(".")[0]: (name, layout.parts[0])
        for name, layout in image_projections(model).items()
        if layout.parts[0].role == "value"
    }


def _any_off(masks: dict[str, torch.Tensor]) -> bool:
    return not all(bool(mask.all()) for mask in masks.values())


def _head_fields(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of the configuration by which heads are missing, from `{value projection: mask}`."""
    units = count_units(model)
    if units.num_heads and masks:
        _check_equal("heads", "value projections", masks)
    way = find_head_way(model, units, list(masks.values()))
    if isinstance(way, str):
        raise ValueError(
            f"heads cannot be removed from a {type(model).__name__}: {way}; use --to merged, or, where the version is "
            "at fault, transformers 4.57, or 5.18 and later, for both export and use"
        )
    return way(list(masks.values()), units.head_dim)


def _neuron_fields(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of the configuration by which neurons are missing, from `{first MLP layer: mask}`."""
    _check_equal("neurons", "MLPs", masks)
    units, way = count_units(model), find_neuron_way(model, count_units(model))
    if isinstance(way, str):
        raise ValueError(f"neurons cannot be removed from a {type(model).__name__}: {way}; use --to merged")
    number = int(next(iter(masks.values())).sum())
    if number not in way.numbers(units):
        raise ValueError(
            f"a {type(model.config).__name__} cannot say {number} of {units.num_neurons} neurons ({way.name}); it can "
            f"say {', '.join(map(str, way.numbers(units)[1:]))}; deactivate so many that one of these numbers remains, "
            "or use --to merged"
        )
    return way.settings(number, units.width)


def _check_equal(units: str, where: str, masks: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless all layers lose the same number of heads or neurons, some but not all."""
    removed = {name: int((~mask).sum()) for name, mask in masks.items()}
    if len(set(removed.values())) > 1 or not any(removed.values()):
        raise ValueError(
            f"the same number of {units} must be deactivated in the {where} of all layers, and at least one; "
            f"found {', '.join(f'{number} in {name}' for name, number in removed.items())}; use --to merged"
        )
    if not any(mask.any() for mask in masks.values()):
        raise ValueError(f"all {units} are deactivated, and a layer without {units} cannot be built; use --to merged")


def _kept_neurons(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """`{(first, second layer of an MLP): bool (num_neurons,)}` for every block, True = kept."""
    numbers = {block.mlp_layers: neurons_of(model, block)[0] for block in find_blocks(model)}
    if not all(numbers.values()) or not numbers:
        reason = find_neuron_way(model, count_units(model))
        raise ValueError(f"neurons cannot be removed from a {type(model).__name__}: {reason}; use --to merged")
    kept = {layers: masks.get(layers[0], torch.ones(number, dtype=torch.bool)) for layers, number in numbers.items()}
    firsts = [first for first, _ in numbers]
    for name in masks:
        if name not in firsts:
            raise ValueError(f"{name} is not the first layer of an MLP; those are {', '.join(firsts)}")
    for layers, mask in kept.items():
        if mask.dtype != torch.bool or mask.shape != (numbers[layers],):
            raise ValueError(
                f"the mask of {layers[0]} must be a bool tensor of shape ({numbers[layers]},), one entry for each "
                f"neuron (True = active); got {mask.dtype} {tuple(mask.shape)}"
            )
    return {layers: mask.cpu() for layers, mask in kept.items()}


def _build(
    model: PreTrainedModel,
    fields: dict[str, Any],
    heads: dict[str, torch.Tensor],
    neurons: dict[tuple[str, str], torch.Tensor],
) -> PreTrainedModel:
    """The smaller model, whose outputs are those of `model`.

    Args:
        model: The model as it is.
        fields: Changed fields of its configuration.
        heads: `{attention layer: bool (num_heads,)}`, True = kept.
        neurons: `{(first, second layer of an MLP): bool (num_neurons,)}`, True = kept.
    """
    small = build_empty(model, smaller_config(model, fields))
    problem = small if isinstance(small, str) else _fill(small, model, heads, neurons) or _difference(model, small)
    if problem is not None:
        raise ValueError(
            f"transformers {transformers.__version__} cannot build the smaller {type(model).__name__} with "
            f"{', '.join(f'{name}={value}' for name, value in fields.items())}: {problem}; use --to merged"
        )
    return small


def _fill(
    small: PreTrainedModel,
    model: PreTrainedModel,
    heads: dict[str, torch.Tensor],
    neurons: dict[tuple[str, str], torch.Tensor],
) -> str | None:
    """Give an empty model the weights of what is kept; returns what is wrong, None if all fits."""
    whole, shapes = model.state_dict(), small.state_dict()
    try:
        weights = slice_neurons({key: whole[key] for key in shapes}, neurons)
        weights = slice_heads(weights, shapes, heads, count_units(model).head_dim)
        weights = {key: value.clone() if value is whole[key] else value for key, value in weights.items()}
        small.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError, KeyError) as error:
        return " ".join(str(error).split())
    small.to(model.device, model.dtype)
    return None


def _difference(model: PreTrainedModel, small: PreTrainedModel) -> str | None:
    """How the outputs of the models differ on a random image; None if they agree in half of their digits."""
    try:
        images = random_images(model)
        with torch.no_grad():
            whole, pruned = (m.eval()(images.to(m.device, m.dtype)).to_tuple() for m in (model, small))
    except (RuntimeError, ValueError) as error:
        return f"it cannot be run ({' '.join(str(error).split())})"
    if len(whole) != len(pruned):
        return f"it has {len(pruned)} outputs instead of {len(whole)}"
    error = float((pruned[0] - whole[0]).norm() / whole[0].norm())
    return None if error < torch.finfo(model.dtype).eps ** 0.5 else f"its outputs differ by {error:.1%}"
