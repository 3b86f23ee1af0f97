"""The arithmetic of an image backbone, as a function of the heads and neurons that its layers keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .blocks import whole_blocks
from .empty_models import build_empty, random_images, smaller_config
from .units import count_units


@dataclass(frozen=True)
class Operations:
    """Multiply-adds that a model spends on one image, in matrix products and convolutions.

    They grow linearly with the number of heads and with the number of neurons, which are the same in every layer.

    Attributes:
        num_heads: Number of heads of each layer at present.
        num_neurons: Number of neurons of each layer's MLP at present.
        fixed: Multiply-adds that neither heads nor neurons change: patch embedding, classifier.
        per_head: Multiply-adds of one head in all layers: query, key, value, attention, output projection.
        per_neuron: Multiply-adds of one neuron in all layers.
    """

    num_heads: int
    num_neurons: int
    fixed: int
    per_head: int
    per_neuron: int

    def total(self, num_heads: int, num_neurons: int) -> int:
        """Multiply-adds of one image if each layer keeps so many heads and neurons."""
        return self.fixed + num_heads * self.per_head + num_neurons * self.per_neuron

    def speed(self, num_heads: int, num_neurons: int) -> float:
        """How many times fewer multiply-adds that is than at present.

        Example:
            >>> Operations(num_heads=4, num_neurons=16, fixed=10, per_head=5, per_neuron=5).speed(2, 8)
            1.8333333333333333
        """
        return self.total(self.num_heads, self.num_neurons) / self.total(num_heads, num_neurons)


def count_operations(model: nn.Module) -> Operations:
    """The multiply-adds of a model of transformers without its adapters, for one image of its configuration's size.

    A second model of the same configuration is built without memory for its weights, and counted by torch's
    `FlopCounterMode`.

    Args:
        model: The model, plain or with adapters in it.

    Raises:
        ValueError: The model cannot be built or run from its configuration alone, or its layers differ in heads or
            neurons.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    who = f"the operations of a {type(model).__name__} cannot be counted"
    if getattr(model, "config", None) is None:
        raise ValueError(f"{who}: it has no configuration of transformers")
    # SigLIP's pooling head has an MLP of the same width, is of no use to a classifier, and goes when neurons go
    plain = build_empty(model, smaller_config(model, {"vision_use_head": False}))
    if isinstance(plain, str):
        raise ValueError(f"{who}: {plain}")
    blocks, units = whole_blocks(plain), count_units(plain)
    if not units.num_heads or not units.num_neurons:
        raise ValueError(f"{who} by numbers of heads and neurons: its layers differ in them, or have a gated MLP")
    first_layers = [plain.get_submodule(block.mlp_layers[0]) for block in blocks]
    total, tokens = _count(plain.to("meta"), first_layers)
    width = units.num_heads * units.head_dim
    per_head = per_neuron = 0
    for block, count in zip(blocks, tokens, strict=True):
        names = [name for name in (block.query, block.key, block.value, block.fused, block.out) if name]
        weights, mlp = (
            sum(plain.get_submodule(name).weight.numel() for name in some) for some in (names, block.mlp_layers)
        )
        per_head += (count * weights + 2 * count**2 * width) // units.num_heads
        per_neuron += count * mlp // units.num_neurons
    fixed = total - units.num_heads * per_head - units.num_neurons * per_neuron
    return Operations(units.num_heads, units.num_neurons, fixed, per_head, per_neuron)


def _count(model: nn.Module, layers: list[nn.Module]) -> tuple[int, list[int]]:
    """Multiply-adds of one image, and the number of tokens that each of these layers is given."""
    tokens = {}

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        tokens[layer] = math.prod(args[0].shape[:-1])

    for layer in layers:
        layer.register_forward_pre_hook(note)
    # without data, attention is computed in matrix products, which the counter knows
    from torch.utils.flop_counter import FlopCounterMode  # here, so that `import peft_heads` does not load it

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_images(model).to("meta"))
    return counter.get_total_flops() // 2, [tokens[layer] for layer in layers]
