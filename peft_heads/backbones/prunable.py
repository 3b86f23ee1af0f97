"""How many heads and MLP neurons an ordinary configuration of transformers can say, decided by trying.

A configuration of fewer units is written, and the model is built from it without memory for its weights. The units
that it then has are counted, its shapes are compared, and a forward pass without data shows that its parts fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from .blocks import find_blocks
from .empty_models import build_empty, image_config, random_images, smaller_config
from .units import Units, count_units, neurons_of


@dataclass(frozen=True)
class Prunable:
    """The numbers of heads and of MLP neurons that may remain in every layer of a model.

    Attributes:
        num_heads: Present number of heads in every layer; 0 where layers differ or none is found.
        head_dim: Rows per head; 0 where `num_heads` is 0.
        num_neurons: Present number of MLP neurons in every layer; 0 where layers differ or none is found.
        heads: Numbers of heads that may remain, descending, the present number first. One entry only means that no
            head can be removed.
        neurons: The same for neurons.
        why_heads: The reason why no head can be removed; empty if heads can be.
        why_neurons: The same for neurons.
    """

    num_heads: int
    head_dim: int
    num_neurons: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    why_heads: str
    why_neurons: str


@dataclass(frozen=True)
class NeuronWay:
    """A way in which a configuration says how many neurons there are.

    Attributes:
        name: The fields, for a message.
        settings: Fields of the configuration for a number of neurons of a width.
        multiples: Whether the number is a multiple of the width.
    """

    name: str
    settings: Callable[[int, int], dict[str, Any]]
    multiples: bool = False

    def numbers(self, units: Units) -> tuple[int, ...]:
        """The numbers that may remain, descending, the present one first."""
        step = units.width if self.multiples else 1
        most = (units.num_neurons - 1) // step * step
        return units.num_neurons, *range(most, 0, -step)


NO_CONFIG = "it has no configuration of transformers"
HeadSettings = Callable[[list[torch.Tensor], int], dict[str, Any]]
# The ways to say that heads are missing, each with the fields for the heads kept, bool (num_heads,) for each layer, and
# their rows. transformers since 5.9 (DINOv2: 5.18) reads the first, 4.57 the second, and neither the other's.
HEAD_WAYS: dict[str, HeadSettings] = {
    "num_attention_heads and head_dim": lambda kept, head_dim: {
        "num_attention_heads": int(kept[0].sum()),
        "head_dim": head_dim,
    },
    "pruned_heads": lambda kept, head_dim: {
        "pruned_heads": {i: (~mask).nonzero().flatten().tolist() for i, mask in enumerate(kept)}
    },
}
NEURON_WAYS = (
    NeuronWay("intermediate_size", lambda number, width: {"intermediate_size": number}),
    # SigLIP's pooling head has an MLP of the same size, and the image classifier does not use it
    NeuronWay(
        "intermediate_size, with vision_use_head=False",
        lambda number, width: {"intermediate_size": number, "vision_use_head": False},
    ),
    NeuronWay("mlp_ratio", lambda number, width: {"mlp_ratio": number // width}, multiples=True),  # DINOv2
)


def prunable(model: nn.Module) -> Prunable:
    """The numbers of heads and neurons that an ordinary configuration can say of a model, plain or with adapters."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    units = count_units(model)
    fewer = torch.arange(units.num_heads) < units.num_heads - 1
    head_way = find_head_way(model, units, [fewer] * len(find_blocks(model)))
    neuron_way = find_neuron_way(model, units)
    return Prunable(
        units.num_heads,
        units.head_dim,
        units.num_neurons,
        (units.num_heads,) if isinstance(head_way, str) else tuple(range(units.num_heads, 0, -1)),
        (units.num_neurons,) if isinstance(neuron_way, str) else neuron_way.numbers(units),
        head_way if isinstance(head_way, str) else "",
        neuron_way if isinstance(neuron_way, str) else "",
    )


def find_head_way(model: nn.Module, units: Units, kept: list[torch.Tensor]) -> HeadSettings | str:
    """The first way to say which heads are kept, bool (num_heads,) for each layer; the reason where there is none."""
    config = getattr(model, "config", None)
    stated = isinstance(getattr(config, "num_attention_heads", None), int)
    unstated = f"its {type(config).__name__} has no number of heads that holds for all layers (num_attention_heads)"
    if config is None:
        return NO_CONFIG
    if not units.num_heads or not kept:
        return unstated
    if units.num_heads == 1:
        return "its layers have one head each"
    number = int(kept[0].sum())
    problems = []
    for name, settings in HEAD_WAYS.items():
        if name == "pruned_heads" and not hasattr(model, "prune_heads"):
            continue
        fields = settings(kept, units.head_dim)
        problem = _problem(model, fields, replace(units, num_heads=number), everywhere=True)
        if problem is None:
            return settings
        problems.append(f"{name}: {problem}")
    problem = (
        f"transformers {transformers.__version__} cannot build a {type(model).__name__} with {number} heads of "
        f"{units.head_dim} rows ({'; '.join(problems)})"
    )
    return problem if stated else f"{unstated}, and {problem}"


def find_neuron_way(model: nn.Module, units: Units) -> NeuronWay | str:
    """The first way to say that neurons are missing in every layer; the reason where there is none."""
    if getattr(model, "config", None) is None:
        return NO_CONFIG
    if not units.num_neurons:
        return _no_neurons(model)
    problems = []
    for way in NEURON_WAYS:
        number = (*way.numbers(units), 0)[1]
        if number:
            fields = way.settings(number, units.width)
            problem = _problem(model, fields, replace(units, num_neurons=number), everywhere=False)
            if problem is None:
                return way
            problems.append(f"{way.name}: {problem}")
    return (
        f"transformers {transformers.__version__} cannot build a {type(model).__name__} with fewer than "
        f"{units.num_neurons} neurons ({'; '.join(problems) or 'every layer has one neuron'})"
    )


def _problem(model: nn.Module, fields: dict[str, Any], wanted: Units, everywhere: bool) -> str | None:
    """What is wrong with the model whose configuration has these fields; None if it has the units that are wanted.

    Args:
        model: The model as it is.
        fields: The changed fields.
        wanted: What the model should have.
        everywhere: Whether shapes may differ elsewhere than in the MLPs of the blocks.
    """
    small = build_empty(model, smaller_config(model, fields))
    if isinstance(small, str):
        return small
    if count_units(small) != wanted:
        return f"{type(image_config(model.config)).__name__} does not heed {'them' if len(fields) > 1 else 'it'}"
    shapes = {name: param.shape for name, param in model.named_parameters()}
    mlps = tuple(f"{name}." for block in find_blocks(model) for name in block.mlp_layers)
    for name, param in small.named_parameters():
        if not everywhere and param.shape != shapes.get(name, param.shape) and not name.startswith(mlps):
            return f"{name} differs as well"
    try:
        with torch.no_grad():
            small.to("meta")(random_images(small).to("meta", small.dtype))
    except Exception as error:
        return f"it cannot be run ({' '.join(str(error).split())})"
    return None


def _no_neurons(model: nn.Module) -> str:
    """Why a model has no number of neurons that holds for all of its layers."""
    blocks = find_blocks(model)
    numbers = {neurons_of(model, block)[0] for block in blocks}
    if not blocks or 0 not in numbers:
        return (
            f"its layers have different numbers of neurons ({', '.join(map(str, sorted(numbers))) or 'no MLP found'})"
        )
    name = next((n for block in blocks if not neurons_of(model, block)[0] for n in block.mlp_layers), "its MLP")
    return f"{name} is not the first of two layers with a row for each neuron: the MLP is gated (SwiGLU) or unknown"
