"""The arithmetic of an image backbone, as a function of the heads and neurons that its layers keep."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..heads.traversal import unwrapped
from .blocks import Block, whole_blocks
from .image_part import TOWER_CONFIGS


@dataclass(frozen=True)
class Operations:
    """Multiply-adds that a model spends on one image, the matrix products and convolutions alone.

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
        """How many times fewer multiply-adds that are than at present.

        Example:
            >>> Operations(num_heads=4, num_neurons=16, fixed=10, per_head=5, per_neuron=5).speed(2, 8)
            1.8333333333333333
        """
        return self.total(self.num_heads, self.num_neurons) / self.total(num_heads, num_neurons)


def count_operations(model: nn.Module) -> Operations:
    """The multiply-adds of a model of transformers without its adapters, for one image of its configuration's size.

    A second model of the same configuration is built without memory for weights (on torch's meta device), and counted
    by torch's `FlopCounterMode`.

    Args:
        model: The model, plain or with adapters in it.

    Raises:
        ValueError: The model has no configuration that says the size of an image, or its layers differ in heads or
            neurons.
    """
    get_base = getattr(model, "get_base_model", None)
    base = model if get_base is None else get_base()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"the operations of a {type(base).__name__} cannot be counted: it is no model of transformers, whose "
            "configuration would say how to build it and how large an image is"
        )
    config = copy.deepcopy(base.config)
    tower = next((tower for key in TOWER_CONFIGS if (tower := getattr(config, key, None)) is not None), config)
    # SigLIP's pooling head has an MLP of the same width, is not used by classifiers, and goes when the model is pruned
    tower.vision_use_head = False
    with torch.device("meta"):
        plain = type(base)(config).eval()
    blocks = whole_blocks(plain)
    num_heads, num_neurons = _sizes(plain, blocks)
    total, tokens = _count(plain, blocks, _one_image(tower))
    per_head = per_neuron = 0
    for block, count in zip(blocks, tokens, strict=True):
        projections = [name for name in (block.query, block.key, block.value, block.fused, block.out) if name]
        weights = sum(_layer(plain, name).weight.numel() for name in projections)
        width = _layer(plain, block.out).in_features  # of all heads together
        per_head += (count * weights + 2 * count**2 * width) // num_heads
        per_neuron += count * sum(_layer(plain, name).weight.numel() for name in block.mlp_layers) // num_neurons
    return Operations(
        num_heads, num_neurons, total - num_heads * per_head - num_neurons * per_neuron, per_head, per_neuron
    )


def _sizes(model: nn.Module, blocks: tuple[Block, ...]) -> tuple[int, int]:
    """Numbers of heads and of neurons, which all blocks must share."""
    heads = sorted({block.num_heads for block in blocks})
    neurons = sorted({_layer(model, block.mlp_layers[-1]).in_features for block in blocks})
    if len(heads) > 1 or len(neurons) > 1:
        raise ValueError(
            f"the layers of a {type(model).__name__} must have the same number of heads and of neurons for their "
            f"operations to be told by one number of each; they have {', '.join(map(str, heads))} heads and "
            f"{', '.join(map(str, neurons))} neurons"
        )
    return heads[0], neurons[0]


def _count(model: nn.Module, blocks: tuple[Block, ...], image: torch.Tensor) -> tuple[int, list[int]]:
    """Multiply-adds of one image, and the number of tokens in each block."""
    tokens = [0] * len(blocks)

    def note(index: int):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens[index] = math.prod(args[0].shape[:-1])

        return hook

    for index, block in enumerate(blocks):
        _layer(model, block.mlp_layers[0]).register_forward_pre_hook(note(index))
    # as matrix products: one kernel for the whole of attention may be unknown to the counter
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixel_values=image)
    return counter.get_total_flops() // 2, tokens


def _one_image(config: object) -> torch.Tensor:
    """(1, channels, height, width), of the size that a model's configuration says."""
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(f"{type(config).__name__} does not say the size of an image (image_size)")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.empty(1, getattr(config, "num_channels", 3), height, width, device="meta")


def _layer(model: nn.Module, name: str) -> nn.Linear:
    return unwrapped(model.get_submodule(name))
