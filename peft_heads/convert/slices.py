"""The weights of a model with fewer heads or neurons, cut out of those of the whole model."""

from __future__ import annotations

import torch


def slice_neurons(
    weights: dict[str, torch.Tensor], kept: dict[tuple[str, str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a model with fewer MLP neurons.

    Args:
        weights: State dict of the model as it is.
        kept: `{(first, second layer of an MLP): bool (num_neurons,)}`, True = kept.

    Example:
        >>> weights = {"up.weight": torch.eye(3), "up.bias": torch.arange(3), "down.weight": torch.ones(1, 3)}
        >>> sliced = slice_neurons(weights, {("up", "down"): torch.tensor([True, False, True])})
        >>> sliced["up.bias"].tolist(), sliced["down.weight"].shape
        ([0, 2], torch.Size([1, 2]))
    """
    sliced = dict(weights)
    for (first, second), mask in kept.items():
        for key, dim in ((f"{first}.weight", 0), (f"{first}.bias", 0), (f"{second}.weight", 1)):
            if key in weights:  # a layer may have no bias
                sliced[key] = weights[key].index_select(dim, mask.nonzero().flatten().to(weights[key].device))
    return sliced


def slice_heads(
    weights: dict[str, torch.Tensor], smaller: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], head_dim: int
) -> dict[str, torch.Tensor]:
    """The weights of a model with fewer heads.

    Dimensions that differ are sliced: those of `num_heads * head_dim` by rows, those of `num_heads` (a position bias)
    by heads.

    Args:
        weights: State dict of the model as it is.
        smaller: State dict with the same names and the shapes wanted.
        kept: `{attention layer: bool (num_heads,)}`, True = kept. A weight follows the layer nearest to it by name.
        head_dim: Rows per head.

    Raises:
        ValueError: A weight is shared by layers that keep different heads, or differs in another way.

    Example:
        >>> kept = {"layers.0.attention": torch.tensor([True, False, True])}
        >>> smaller = {"layers.0.attention.v_proj.bias": torch.zeros(4)}
        >>> slice_heads({"layers.0.attention.v_proj.bias": torch.arange(6)}, smaller, kept, head_dim=2)
        {'layers.0.attention.v_proj.bias': tensor([0, 1, 4, 5])}
    """
    sliced = {}
    for key, weight in weights.items():
        for dim, size in enumerate(smaller[key].shape):
            if weight.shape[dim] == size:
                continue
            heads = _nearest(key, kept)
            rows = heads.repeat_interleave(head_dim)
            chosen = next((mask for mask in (rows, heads) if len(mask) == weight.shape[dim]), None)
            if chosen is None or int(chosen.sum()) != size:
                raise ValueError(f"{key} is {tuple(weight.shape)}, and {tuple(smaller[key].shape)} with fewer heads")
            weight = weight.index_select(dim, chosen.nonzero().flatten().to(weight.device))
        sliced[key] = weight
    return sliced


def _nearest(key: str, kept: dict[str, torch.Tensor]) -> torch.Tensor:
    """The heads kept by the attention layer that shares most of a weight's name."""
    shared = {name: _common_parts(name.split("."), key.split(".")) for name in kept}
    nearest = [mask for name, mask in kept.items() if shared[name] == max(shared.values())]
    if any(not torch.equal(mask, nearest[0]) for mask in nearest):
        raise ValueError(
            f"{key} is shared by layers that keep different heads; the same must be deactivated in all "
            "(granularity='global')"
        )
    return nearest[0]


def _common_parts(one: list[str], other: list[str]) -> int:
    """The number of leading parts that two names have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
