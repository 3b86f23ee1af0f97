"""How many heads and MLP neurons every block of a model has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..heads.traversal import unwrapped
from .blocks import Block, find_blocks
from .image_part import image_projections


@dataclass(frozen=True)
class Units:
    """What every block of a model has; 0 where blocks differ, or where it is not found.

    Attributes:
        num_heads: Number of heads.
        head_dim: Rows per head.
        num_neurons: Number of MLP neurons.
        width: Inputs of a neuron.
    """

    num_heads: int
    head_dim: int
    num_neurons: int
    width: int


def count_units(model: nn.Module) -> Units:
    """The heads and neurons that every block of a model's image backbone has; adapters are looked through."""
    heads = {(part.num_heads, part.head_dim) for layout in image_projections(model).values() for part in layout.parts}
    neurons = {neurons_of(model, block) for block in find_blocks(model)}
    return Units(*(heads.pop() if len(heads) == 1 else (0, 0)), *(neurons.pop() if len(neurons) == 1 else (0, 0)))


def neurons_of(model: nn.Module, block: Block) -> tuple[int, int]:
    """`(number of neurons, inputs of each)` of a block's MLP; zeros unless it is two layers, a row to a neuron.

    A gated MLP (SwiGLU) has two rows to a neuron, in one layer or in two.
    """
    layers = [unwrapped(model.get_submodule(name)) for name in block.mlp_layers]
    if len(layers) != 2 or layers[0].out_features != layers[1].in_features:
        return 0, 0
    return layers[0].out_features, layers[0].in_features
