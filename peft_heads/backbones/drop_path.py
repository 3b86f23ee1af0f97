"""Stochastic depth for backbones of transformers that have none: residual branches are left out, image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .blocks import whole_blocks


CONFIG_FIELD = "drop_path_rate"


def has_drop_path(config: object) -> bool:
    """Whether the backbone has drop-path of its own, set by `config.drop_path_rate` (Swin, BEiT, DINOv2)."""
    return hasattr(config, CONFIG_FIELD)


def residual_branches(model: nn.Module) -> list[tuple[str, str]]:
    """`(last layer of the attention, last layer of the MLP)` of every block, by name, in the order of the blocks.

    Raises:
        ValueError: A block has another structure, or the model has no blocks.
    """
    try:
        return [(block.out, block.mlp_layers[-1]) for block in whole_blocks(model)]
    except ValueError as error:
        raise ValueError(f"drop_path: {error}; use drop_path=0") from error


def add_drop_path(model: nn.Module, branches: list[tuple[str, str]], rate: float) -> None:
    """Register hooks that leave out branches in training, with a probability that grows linearly from 0 to `rate`.

    Args:
        model: The model, or the base model inside a PeftModel.
        branches: Result of `residual_branches`.
        rate: Probability for the last block, in [0, 1).
    """
    for index, names in enumerate(branches):
        probability = rate * index / max(1, len(branches) - 1)
        for name in names if probability > 0 else ():
            model.get_submodule(name).register_forward_hook(_drop(probability))


def _drop(probability: float) -> Callable:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        shape = (output.shape[0],) + (1,) * (output.dim() - 1)
        kept = torch.rand(shape, device=output.device) >= probability
        return output * kept / (1 - probability)

    return hook
