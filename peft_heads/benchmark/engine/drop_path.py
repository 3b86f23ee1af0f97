"""Stochastic depth for backbones of transformers that have none: a residual branch is left out, image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...heads.detect import resolve_heads


CONFIG_FIELD = "drop_path_rate"


def has_drop_path(config: object) -> bool:
    """Whether the backbone has drop-path of its own, set by `config.drop_path_rate` (Swin, BEiT, DINOv2)."""
    return hasattr(config, CONFIG_FIELD)


def residual_branches(model: nn.Module) -> list[tuple[str, str]]:
    """`(last layer of the attention, last layer of the MLP)` of every block, by name, in the order of the blocks.

    They are the two linear layers of a block that give tokens of the block's width and are no query, key or value.

    Raises:
        ValueError: A block has another number of such layers, or the model none.
    """
    widths = {}  # of the blocks
    for name in resolve_heads(model):
        parts = name.split(".")
        index = next((i for i in range(len(parts) - 1, -1, -1) if parts[i].isdigit()), None)
        if index is not None:
            widths[".".join(parts[: index + 1])] = model.get_submodule(name).in_features
    heads = set(resolve_heads(model))
    branches = []
    for block, width in widths.items():
        ends = [
            f"{block}.{name}"
            for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear) and module.out_features == width and f"{block}.{name}" not in heads
        ]
        if len(ends) != 2:
            raise ValueError(
                f"drop_path: {block} has {len(ends)} linear layers with {width} outputs ({', '.join(ends) or 'none'}) "
                "beside query, key and value; expected two, the ends of attention and MLP; use drop_path=0"
            )
        branches.append(tuple(ends))
    if not branches:
        raise ValueError(f"drop_path: {type(model).__name__} has no blocks with attention heads; use drop_path=0")
    return branches


def add_drop_path(model: nn.Module, branches: list[tuple[str, str]], rate: float) -> None:
    """Let hooks leave out the branches in training, with a probability that grows linearly from 0 to `rate`.

    Args:
        model: The model, or the base model inside of a PeftModel.
        branches: Of `residual_branches`.
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
