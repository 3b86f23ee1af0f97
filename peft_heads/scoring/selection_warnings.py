"""Warnings about a selection that the scores cannot decide, or that part of the adapter never took part in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..heads.layout import HeadLayout
from ..heads.protocol import module_patterns
from ..heads.selection import HeadGroup, group_scores


def equal_scores_warning(
    criterion: str, scores: dict[str, torch.Tensor], groups: Sequence[HeadGroup], layouts: dict[str, HeadLayout]
) -> str:
    """The warning about groups whose heads all have the same score, so that their order decides.

    Args:
        criterion: The criterion of the scores.
        scores: `{projection: (num_heads,)}`.
        groups: Those groups, from `degenerate_groups`.
        layouts: `{projection: HeadLayout}` of the whole adapter.
    """
    where = "; ".join(
        f"the score of all {len(group.remaining)} heads is {group_scores(scores, group)[group.remaining[0]]:g} in "
        f"{module_patterns(group.modules, layouts)}, and head{'s' * (group.num_chosen > 1)} "
        f"{', '.join(map(str, group.remaining[: group.num_chosen]))} will be deactivated"
        for group in groups
    )
    return (
        f"the scores by {criterion!r} do not tell heads apart, so that their order decides: {where}. A score "
        "of 0 means that no gradient has reached these projections or that their adapter was zero when it was "
        "scored: score later or more steps, and leave out layers that the task does not use (exclude_modules)"
    )


def no_gradient_warning(
    projections: Sequence[str], layouts: dict[str, HeadLayout], num_steps: int, adapter_name: str
) -> str:
    """The warning about projections that no gradient has reached in the scored steps.

    Args:
        projections: Their names.
        layouts: `{projection: HeadLayout}` of the whole adapter.
        num_steps: Number of steps that were scored.
        adapter_name: The adapter.
    """
    return (
        f"no gradient has reached {module_patterns(projections, layouts)} in the {num_steps} step(s) that "
        f"were scored: adapter {adapter_name!r} is trained and saved there for nothing. Where the task "
        "does not use these layers, leave them out (exclude_modules); else look for what keeps the loss from "
        "depending on them"
    )


def equal_neurons_warning(criterion: str, layers: Sequence[str], among: Sequence[str]) -> str:
    """The warning about MLPs whose neurons all have the same score, so that their order decides.

    Args:
        criterion: The criterion of the scores.
        layers: Names of their first layers.
        among: Names of the first layers of all MLPs.
    """
    return (
        f"the scores by {criterion!r} do not tell the neurons of {module_patterns(layers, among)} apart, so that the first "
        "ones are switched off: has a gradient reached these layers? Score later or more steps"
    )
