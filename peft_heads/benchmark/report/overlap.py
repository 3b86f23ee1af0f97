"""How similar the deactivated heads of different tasks are, compared with heads chosen at random."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .averages import mean_and_std


Masks = Mapping[str, Sequence[bool]]
"""`{projection: one bool per head}`, True = active."""

KINDS = ("same task, other seed", "same group", "different groups")


@dataclass(frozen=True)
class Overlap:
    """The mean Jaccard index of deactivated heads over pairs of runs; `expected` is that of heads drawn at random."""

    kind: str
    pairs: int
    observed: float
    expected: float


def expected_jaccard(num_heads: int, first: int, second: int) -> float:
    """Expected |A ∩ B| / |A ∪ B| of two random sets of `first` and `second` of `num_heads` heads (hypergeometric).

    Example:
        >>> expected_jaccard(12, 1, 1) == 1 / 12
        True
    """
    total = math.comb(num_heads, second)
    return sum(
        math.comb(first, both) * math.comb(num_heads - first, second - both) / total * both / (first + second - both)
        for both in range(1, min(first, second) + 1)
    )


def mask_overlap(first: Masks, second: Masks) -> tuple[float, float] | None:
    """`(observed, expected)` Jaccard index of the deactivated heads, the mean over the projections of both.

    The mean is taken projection by projection, so that its expectation is exact whether the projections choose
    together or apart. Projections in which neither deactivates a head do not count; None if there are no others.
    """
    observed, expected = [], []
    for name in first.keys() & second.keys():
        a, b = ({head for head, active in enumerate(masks[name]) if not active} for masks in (first, second))
        if a | b and len(first[name]) == len(second[name]):
            observed.append(len(a & b) / len(a | b))
            expected.append(expected_jaccard(len(first[name]), len(a), len(b)))
    return (math.fsum(observed) / len(observed), math.fsum(expected) / len(expected)) if observed else None


def overlaps(masks: Mapping[str, Sequence[Masks]], groups: Mapping[str, str]) -> list[Overlap]:
    """The overlap within a task, within a group and between groups; kinds without a pair are left out.

    Args:
        masks: `{task: masks of its runs}`, one setting.
        groups: `{task: group}`.
    """
    pairs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    runs = [(task, mask) for task, seeds in masks.items() for mask in seeds]
    for (task, mask), (other_task, other_mask) in itertools.combinations(runs, 2):
        overlap = mask_overlap(mask, other_mask)
        if overlap is not None:
            pairs[_kind(task, other_task, groups)].append(overlap)
    return [
        Overlap(kind, len(found), *(mean_and_std(values)[0] for values in zip(*found, strict=True)))
        for kind, found in pairs.items()
        if found
    ]


def group_p_value(
    masks: Mapping[str, Sequence[Masks]], groups: Mapping[str, str], permutations: int = 2000, seed: int = 0
) -> float | None:
    """How often groups drawn at random look as similar as the real ones: a small value says that groups matter.

    The statistic is the mean overlap of two tasks of one group minus that of two tasks of different groups; it is
    compared with its values after the groups' names are shuffled among the tasks. None where either kind is missing.
    """
    between = {}
    for (task, seeds), (other_task, other_seeds) in itertools.combinations(masks.items(), 2):
        found = [overlap[0] for a in seeds for b in other_seeds if (overlap := mask_overlap(a, b)) is not None]
        if found:
            between[task, other_task] = math.fsum(found) / len(found)
    names = list(masks)
    actual = _difference(between, groups)
    if actual is None:
        return None
    generator = random.Random(seed)
    as_large = 1  # the real assignment is one of the possible ones
    for _ in range(permutations):
        shuffled = generator.sample(names, len(names))
        difference = _difference(between, {name: groups[other] for name, other in zip(names, shuffled, strict=True)})
        as_large += difference is not None and difference >= actual - 1e-12
    return as_large / (permutations + 1)


def _difference(between: Mapping[tuple[str, str], float], groups: Mapping[str, str]) -> float | None:
    within = [value for (a, b), value in between.items() if groups[a] == groups[b]]
    across = [value for (a, b), value in between.items() if groups[a] != groups[b]]
    return math.fsum(within) / len(within) - math.fsum(across) / len(across) if within and across else None


def _kind(task: str, other: str, groups: Mapping[str, str]) -> str:
    if task == other:
        return KINDS[0]
    return KINDS[1] if groups[task] == groups[other] else KINDS[2]
