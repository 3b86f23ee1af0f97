"""One score per head, from the statistics of a window of steps (`taylor`, `gates`) and a criterion (`criterion_registry`)."""

from __future__ import annotations

import torch

from .criterion_registry import HeadStatistics, find_criterion
from .gates import GATE_STATISTICS
from .layout import HeadLayout


def head_scores(
    criterion: str,
    layouts: dict[str, HeadLayout],
    *,
    statistics: dict[str, torch.Tensor] | None = None,
    params: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
    gates: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """One score per head of every projection; the lowest are deactivated.

    Args:
        criterion: A name in `CRITERIA`.
        layouts: `{module name: HeadLayout}`.
        statistics: `{module name: (3, num_heads)}`, the mean of `head_statistics` over the window's steps. Criteria
            that need gradients need it.
        params: `{module name: (num_rows, n)}`, the head-wise parameters at selection, for their norms.
        seed: Seed of the criterion `random`: the same numbers on every machine and process.
        gates: `{module name: (3, num_heads)}`, the mean of `gate_statistics` over the window's images. Criteria that
            need gates need it.

    Returns:
        `{module name: float64 (num_heads,)}` on the CPU.

    Raises:
        ValueError: Unknown criterion, one that needs what is not given, or scores of a wrong shape or not finite.
    """
    found = find_criterion(criterion)
    if found.needs_gradients and not statistics:
        raise ValueError(f"criterion {criterion!r} needs the statistics of training steps, and there are none")
    if found.needs_gates and not gates:
        raise ValueError(f"criterion {criterion!r} needs the gates of the heads' outputs, and they were not gathered")
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, layout in layouts.items():
        absolute, signed, grad_norm = statistics[name].double().cpu() if statistics else (None, None, None)
        heads = HeadStatistics(
            absolute,
            signed,
            grad_norm,
            weight_norm=None if params is None else weight_norms(params[name], layout),
            random=torch.rand(layout.num_heads, generator=generator, dtype=torch.float64),
            **(dict(zip(GATE_STATISTICS, gates[name].double().cpu(), strict=True)) if gates else {}),
        )
        scores[name] = _checked(criterion, found.function(heads), name, layout)
    return scores


def weight_norms(params: torch.Tensor, layout: HeadLayout) -> torch.Tensor:
    """float64 (num_heads,) on the CPU: the L2 norm of each head's parameters (num_rows, n)."""
    return layout.sum_rows(params.double().square()).sqrt().cpu()


def _checked(criterion: str, scores: torch.Tensor, name: str, layout: HeadLayout) -> torch.Tensor:
    """The scores of one projection as float64 on the CPU; raises ValueError for what orders no heads."""
    if not isinstance(scores, torch.Tensor) or scores.shape != (layout.num_heads,) or scores.is_complex():
        found = f"a {type(scores).__name__}"
        if isinstance(scores, torch.Tensor):
            found = f"{scores.dtype} of shape {tuple(scores.shape)}"
        raise ValueError(
            f"criterion {criterion!r} must return one real number per head, a tensor of shape ({layout.num_heads},) for "
            f"{name}; it returned {found}"
        )
    scores = scores.detach().double().cpu()
    if not torch.isfinite(scores).all():
        raise ValueError(f"the {criterion} scores of {name} are not finite: {scores.tolist()}")
    return scores
