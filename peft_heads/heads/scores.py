"""Responsiveness of heads: weights and gradients in, one score per head out.

Split like a metric into *update* (`head_statistics`: one optimizer step) and *compute* (`head_scores`: the sums of a
window of steps), so that one pass over the data serves every criterion.

With `p` a head's adapter parameters (its rows of `lora_B`) and `g` the gradient of the loss with respect to them, the
first-order Taylor expansion of the loss change when `p` is set to zero gives (HEAT, Eq. 9 and 11):

    absolute   Σ |p·g|
    positive   Σ  p·g    low where removing the head raises the loss
    negative   Σ -p·g    low where removing the head lowers the loss

Baselines say what a score must be better than: `random`, `front` (the first heads), and `most_responsive`, which
deactivates the heads that `absolute` would keep longest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from .layout import HeadLayout


STATISTICS = ("absolute", "signed", "grad_norm")
Criterion = Literal[
    "absolute", "positive", "negative", "weight_norm", "grad_norm", "random", "front", "most_responsive"
]
CRITERIA = get_args(Criterion)
# Criteria that need gradients, hence a window of training steps.
GRADIENT_CRITERIA = ("absolute", "positive", "negative", "grad_norm", "most_responsive")
# Those that are products with the adapter's parameters, hence zero as long as these are, whatever the gradient.
TAYLOR_CRITERIA = ("absolute", "positive", "negative", "most_responsive")

_FROM_STATISTICS = {  # criterion: (row of STATISTICS, sign)
    "absolute": (0, 1),
    "positive": (1, 1),
    "negative": (1, -1),
    "grad_norm": (2, 1),
    "most_responsive": (0, -1),
}


def head_statistics(params: torch.Tensor, grads: torch.Tensor, layout: HeadLayout) -> torch.Tensor:
    """The statistics of one optimizer step.

    Args:
        params: (out_features, n), a projection's head-wise adapter parameters *before* the step.
        grads: (out_features, n), the gradient of the global batch's loss, neither clipped nor scaled.
        layout: The projection's heads.

    Returns:
        float64 (3, num_heads) in the order of `STATISTICS`.

    Example, one head of one row:
        >>> layout = HeadLayout("query", num_heads=1, head_dim=1)
        >>> head_statistics(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, -4.0]]), layout).flatten().tolist()
        [10.0, 2.0, 5.0]
    """
    params, grads = params.double(), grads.double()
    product = params * grads
    return torch.stack(
        [layout.sum_rows(product.abs()), layout.sum_rows(product), layout.sum_rows(grads.square()).sqrt()]
    )


def all_head_statistics(
    params: dict[str, torch.Tensor],
    grads: dict[str, torch.Tensor],
    layouts: dict[str, HeadLayout],
    loss_scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """The statistics of one optimizer step of many projections: those of `head_statistics` in fewer calls.

    A head's statistics depend on its rows alone, so projections whose heads have equally many rows, and rows equally
    many parameters, are computed one below the other as one projection with all their heads. On the CPU the numbers
    are the same to the bit, unless a projection has a single head of 2**15 numbers or more, whose sum threads share; a
    GPU may add a head's numbers in another order if there are more heads.

    Args:
        params: `{projection: (num_rows, n)}`, as `head_statistics` takes them.
        grads: `{projection: (num_rows, n)}`, the gradients of the loss times `loss_scale`.
        layouts: `{projection: HeadLayout}`.
        loss_scale: The factor by which the gradients are too large.

    Returns:
        `{projection: float64 (3, num_heads)}` in the order of `layouts`, on the device of the gradients, or on the CPU
        where that has no float64.

    Example, two projections of one head:
        >>> layouts = dict.fromkeys("qv", HeadLayout("query", num_heads=1, head_dim=1))
        >>> params = {"q": torch.tensor([[2.0, 1.0]]), "v": torch.tensor([[0.0, 1.0]])}
        >>> grads = {"q": torch.tensor([[3.0, -4.0]]), "v": torch.tensor([[0.0, 2.0]])}
        >>> {name: step.flatten().tolist() for name, step in all_head_statistics(params, grads, layouts).items()}
        {'q': [10.0, 2.0, 5.0], 'v': [2.0, 2.0, 2.0]}
    """
    alike: dict[tuple, list[str]] = {}
    for name, layout in layouts.items():
        grad = grads[name]
        key = (layout.head_dim, grad.shape[1:], grad.dtype, grad.device, params[name].device)
        alike.setdefault(key, []).append(name)
    statistics = {}
    for names in alike.values():
        device = _device_with_float64(grads[names[0]].device)
        num_heads = [layouts[name].num_heads for name in names]
        step = head_statistics(
            torch.cat([params[name] for name in names]).to(device),
            torch.cat([grads[name] for name in names]).to(device) / loss_scale,
            replace(layouts[names[0]], num_heads=sum(num_heads)),
        )
        statistics |= zip(names, step.split(num_heads, dim=1), strict=True)
    return {name: statistics[name] for name in layouts}


def _device_with_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def head_scores(
    criterion: str,
    layouts: dict[str, HeadLayout],
    *,
    statistics: dict[str, torch.Tensor] | None = None,
    params: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """One score per head of every projection; the lowest are deactivated.

    Args:
        criterion: One of `CRITERIA`.
        layouts: `{module name: HeadLayout}`.
        statistics: `{module name: (3, num_heads)}`, the mean of `head_statistics` over the window's steps. Needed by
            `GRADIENT_CRITERIA`.
        params: `{module name: (out_features, n)}`, the head-wise parameters at selection. Needed by `weight_norm`.
        seed: Of the criterion `random`: the same numbers on every machine and process.

    Returns:
        `{module name: float64 (num_heads,)}`.

    Raises:
        ValueError: Unknown criterion, or a score that is not finite.
    """
    if criterion in GRADIENT_CRITERIA:
        row, sign = _FROM_STATISTICS[criterion]
        scores = {name: sign * statistics[name][row] for name in layouts}
    elif criterion == "weight_norm":
        scores = {
            name: layout.sum_rows(params[name].double().square()).sqrt().cpu() for name, layout in layouts.items()
        }
    elif criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {
            name: torch.rand(layout.num_heads, generator=generator, dtype=torch.float64)
            for name, layout in layouts.items()
        }
    elif criterion == "front":
        scores = {name: torch.arange(layout.num_heads, dtype=torch.float64) for name, layout in layouts.items()}
    else:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}; got {criterion!r}")

    broken = [name for name, score in scores.items() if not torch.isfinite(score).all()]
    if broken:
        raise ValueError(f"the {criterion} scores of {broken[0]} are not finite: {scores[broken[0]].tolist()}")
    return scores
