"""Scores in, masks out: selects the heads that are deactivated.

Everything here depends on its arguments alone, so that every process selects the same heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .layout import HeadLayout


GRANULARITIES = ("global", "layer")


@dataclass(frozen=True)
class HeadGroup:
    """Projections that share one mask.

    Attributes:
        modules: Names of the projections, whose scores are summed.
        num_heads: Number of heads of each projection.
        num_deactivated: Number of heads that the group gives up; 0 if it keeps all.
        already_off: Indices of heads that are off already, which stay off and count.
    """

    modules: tuple[str, ...]
    num_heads: int
    num_deactivated: int
    already_off: tuple[int, ...] = ()

    @property
    def remaining(self) -> list[int]:
        """Indices of the heads among which is chosen."""
        return [head for head in range(self.num_heads) if head not in self.already_off]

    @property
    def num_chosen(self) -> int:
        """Number of heads that are chosen among these."""
        return max(self.num_deactivated - len(self.already_off), 0)


def check_head_count(ne: int | None, ratio: float | None) -> None:
    """Raise ValueError unless exactly one of `ne` (an int ≥ 0) and `ratio` (in [0, 1)) is given."""
    if ne is not None and ratio is not None:
        raise ValueError(f"give ne or ratio, not both; got ne={ne} and ratio={ratio}")
    if ne is None and ratio is None:
        raise ValueError("give ne (heads per group) or ratio (share of a group's heads)")
    if ne is not None and (isinstance(ne, bool) or not isinstance(ne, int) or ne < 0):
        raise ValueError(f"ne is the number of heads to deactivate, an integer of at least 0; got {ne!r}")
    if ratio is not None and not (_is_number(ratio) and 0 <= ratio < 1):
        raise ValueError(f"ratio is the share of heads to deactivate, in [0, 1); got {ratio!r}")


def plan_groups(
    layouts: dict[str, HeadLayout],
    *,
    ne: int | None = None,
    ratio: float | None = None,
    granularity: str = "global",
    joint: bool = True,
) -> list[HeadGroup]:
    """Partition the projections into groups that share a mask, and decide how many heads each group gives up.

    `global` (Heart-LoRA) puts all layers with the same number of heads into one group: one group on ViT, one per
    stage on Swin. `layer` (Heart-LoRA†) lets each attention layer choose. `joint` gives the q and v of a layer one
    mask; without it each has its own. `ratio` deactivates `floor(ratio * num_heads)` heads.

    A group with no more heads than `ne` keeps all of them.

    Raises:
        ValueError: An argument is out of its range, `joint` is set although q and v of a layer differ in heads, or
            `ne` or `ratio` applies to no group.
    """
    check_head_count(ne, ratio)
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be 'global' or 'layer'; got {granularity!r}")

    members: dict[tuple, list[str]] = {}
    for name, layout in layouts.items():
        attention = name.rpartition(".")[0]
        part = () if joint else (layout.role,)
        place = (layout.num_heads,) if granularity == "global" else (attention,)
        members.setdefault(place + part, []).append(name)
    if joint:
        _check_joint(layouts)

    groups = []
    for modules in members.values():
        heads = layouts[modules[0]].num_heads
        count = ne if ne is not None else floor_ratio(ratio, heads)
        groups.append(HeadGroup(tuple(modules), heads, count if count < heads else 0))

    if (ne or ratio) and not any(group.num_deactivated for group in groups):
        wanted = f"ne={ne}" if ne is not None else f"ratio={ratio}"
        found = sorted({group.num_heads for group in groups})
        raise ValueError(
            f"{wanted} applies to no group of heads: the groups have {', '.join(map(str, found)) or 'no'} heads, and "
            "a group keeps at least one of its heads; choose a smaller ne, or a ratio that gives at least one head"
        )
    return groups


def groups_kept_whole(groups: list[HeadGroup], ne: int | None) -> str | None:
    """A sentence that names the groups too small for `ne`, which keep all their heads; None if there are none."""
    small = [group for group in groups if ne and group.num_heads <= ne]
    if not small:
        return None
    sizes = ", ".join(f"{group.num_heads} heads ({group.modules[0]}, …)" for group in small)
    return f"ne={ne}: {len(small)} group(s) with no more heads than that keep all of them: {sizes}"


def select_heads(
    scores: dict[str, torch.Tensor],
    groups: list[HeadGroup],
) -> dict[str, torch.Tensor]:
    """Deactivate the heads with the lowest scores; among equal scores the lower head index first.

    Args:
        scores: `{module name: (num_heads,)}` from `head_scores`.
        groups: From `plan_groups`.

    Returns:
        `{module name: bool (num_heads,)}`, True = active.

    Raises:
        ValueError: A score of a group that gives up heads is not finite.

    Example:
        >>> groups = [HeadGroup(("a.q", "a.v"), num_heads=3, num_deactivated=1)]
        >>> scores = {"a.q": torch.tensor([1.0, 0.0, 2.0]), "a.v": torch.tensor([0.0, 3.0, 0.0])}
        >>> select_heads(scores, groups)["a.v"].tolist()  # the sums are 1, 3, 2
        [False, True, True]
    """
    masks = {}
    for group in groups:
        total = group_scores(scores, group)
        if group.num_chosen and not torch.isfinite(total[group.remaining]).all():
            raise ValueError(
                f"the scores of the heads of {', '.join(group.modules[:2])}{', …' * (len(group.modules) > 2)} are not "
                f"finite: {total.tolist()}; heads cannot be ordered by them"
            )
        lowest = torch.argsort(total[group.remaining], stable=True)[: group.num_chosen].tolist()
        mask = torch.ones(group.num_heads, dtype=torch.bool)
        mask[[*group.already_off, *(group.remaining[i] for i in lowest)]] = False
        masks.update({name: mask.clone() for name in group.modules})
    return masks


def select_units(scores: torch.Tensor, num_off: int, already_off: torch.Tensor | None = None) -> torch.Tensor:
    """Switch off the units of one layer with the lowest scores; among equal scores the lower index first.

    Args:
        scores: (units,).
        num_off: Number of units that are off afterwards, of which at least one stays active.
        already_off: bool (units,), True where a unit is off already. It stays off, and counts; if more than `num_off`
            are, they alone are off.

    Returns:
        bool (units,) on the CPU, True = active.

    Raises:
        ValueError: `num_off` is out of its range, `already_off` has another shape, or a score of a unit that is not off
            already is not finite.

    Example:
        >>> select_units(torch.tensor([3.0, 1.0, 2.0, 1.0]), num_off=1).tolist()
        [True, False, True, True]
        >>> off = torch.tensor([True, False, False, False])
        >>> select_units(torch.tensor([3.0, 1.0, 2.0, 1.0]), num_off=2, already_off=off).tolist()
        [False, False, True, True]
    """
    scores = scores.detach().double().cpu()
    off = torch.zeros(len(scores), dtype=torch.bool) if already_off is None else already_off.cpu()
    if type(num_off) is not int or not 0 <= num_off < max(len(scores), 1):
        raise ValueError(
            f"num_off is the number of units that a layer of {len(scores)} gives up, an integer from 0 to "
            f"{len(scores) - 1}; got {num_off!r}"
        )
    if off.shape != scores.shape or off.dtype != torch.bool:
        raise ValueError(
            f"already_off must be a bool tensor of shape {tuple(scores.shape)}, one entry per score; got {off.dtype} "
            f"{tuple(off.shape)}"
        )
    if not torch.isfinite(scores[~off]).all():
        raise ValueError(
            f"the scores of a layer's {len(scores)} units are not all finite; units cannot be ordered by them"
        )
    candidates = (~off).nonzero().flatten()
    chosen = torch.argsort(scores[candidates], stable=True)[: max(num_off - int(off.sum()), 0)]
    active = ~off
    active[candidates[chosen]] = False
    return active


def group_scores(scores: dict[str, torch.Tensor], group: HeadGroup) -> torch.Tensor:
    """The sum of the scores over a group's projections, by which its heads are ordered: float64 (num_heads,), CPU."""
    return torch.stack([scores[name].double().cpu() for name in group.modules]).sum(dim=0)


def degenerate_groups(scores: dict[str, torch.Tensor], groups: list[HeadGroup]) -> list[HeadGroup]:
    """The groups that give up heads although all that remain have the same score, so that their order alone decides.

    Example:
        >>> groups = [HeadGroup(("a.q", "a.v"), num_heads=2, num_deactivated=1)]
        >>> degenerate_groups({"a.q": torch.zeros(2), "a.v": torch.ones(2)}, groups) == groups
        True
        >>> degenerate_groups({"a.q": torch.zeros(2), "a.v": torch.tensor([1.0, 2.0])}, groups)
        []
    """
    return [
        group
        for group in groups
        if group.num_chosen and (total := group_scores(scores, group)[group.remaining]).eq(total[0]).all()
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def floor_ratio(ratio: float, num_heads: int) -> int:
    """`floor(ratio * num_heads)` for the ratio as it was written.

    0.29 of 100 heads are 29 heads, although the product of the floating-point numbers is 28.999…96.
    """
    return math.floor(ratio * num_heads + 1e-9)


def _check_joint(layouts: dict[str, HeadLayout]) -> None:
    """Raise ValueError unless the projections of each attention layer have equally many heads."""
    first: dict[str, str] = {}
    for name, layout in layouts.items():
        other = first.setdefault(name.rpartition(".")[0], name)
        if layouts[other].num_heads != layout.num_heads:
            raise ValueError(
                f"joint=True gives the projections of an attention layer one mask, but {other} has "
                f"{layouts[other].num_heads} heads and {name} has {layout.num_heads}; pass joint=False"
            )
