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
