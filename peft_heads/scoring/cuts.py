"""When units are cut, and how many are off after each cut."""

from __future__ import annotations

import math
from fractions import Fraction


def plan_cuts(first: int, last: int, cuts: int) -> list[int]:
    """The optimizer steps after which units are cut, evenly spaced from `first` to `last`.

    Args:
        first: Step of the first cut, counted from 1.
        last: Step of the last one; of no account for a single cut.
        cuts: Number of cuts.

    Raises:
        ValueError: There are more cuts than steps for them.

    Example:
        >>> plan_cuts(10, 50, 5), plan_cuts(10, 50, 1)
        ([10, 20, 30, 40, 50], [10])
    """
    if cuts == 1:
        return [first]
    if last - first + 1 < cuts:
        raise ValueError(
            f"{cuts} cuts from step {first} to step {last} are more than the {max(last - first + 1, 0)} steps there; "
            "make fewer cuts, let the first one come earlier (select_at, warmup_epochs) or the last one later "
            "(last_cut), or train longer"
        )
    return [first + (last - first) * i // (cuts - 1) for i in range(cuts)]


def share_after(cut: int, cuts: int) -> float:
    """Share of the units to be cut that are off after a cut: cubic, so that most go early (Zhu and Gupta 2017, Eq. 1).

    Example:
        >>> [share_after(cut, 4) for cut in range(5)]
        [0.0, 0.578125, 0.875, 0.984375, 1.0]
    """
    return float(_share(cut, cuts))


def units_after(units: int, cut: int, cuts: int) -> int:
    """Number of units that are off after a cut, rounded down; all of them after the last one.

    Args:
        units: Number of units that are off in the end.
        cut: Number of the cut, counted from 1.
        cuts: Number of cuts.

    Example:
        >>> [units_after(6, cut, 4) for cut in range(1, 5)]
        [3, 5, 5, 6]
    """
    return math.floor(units * _share(cut, cuts))


def _share(cut: int, cuts: int) -> Fraction:
    return 1 - (1 - Fraction(cut, cuts)) ** 3
