"""How many heads and neurons every layer gives up for a speed: those whose gates matter least, by operation.

The number is the same in all layers, because the configuration of an ordinary model has one number of heads and one of
neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


# Lines with examples in an error.
_NUM_EXAMPLES = 8


@dataclass(frozen=True)
class Cut:
    """What every layer keeps, and how much faster that is.

    Attributes:
        num_heads: Number of heads that remain in each layer.
        num_neurons: Number of neurons that remain in each layer's MLP.
        speed: How many times fewer operations that is.
    """

    num_heads: int
    num_neurons: int
    speed: float

    def __str__(self) -> str:
        return f"{self.speed:.3g} x with heads={self.num_heads}, neurons={self.num_neurons}"


def reachable_cuts(
    speed: Callable[[int, int], float], heads: Sequence[int], neurons: Sequence[int]
) -> tuple[Cut, ...]:
    """All cuts that an ordinary configuration can say, the slowest first.

    Args:
        speed: How many times fewer operations a number of heads and a number of neurons take.
        heads: Numbers of heads that may remain in each layer.
        neurons: Numbers of neurons that may remain.

    Example:
        >>> reachable_cuts(lambda heads, neurons: 4 / heads, heads=(4, 2), neurons=(8,))
        (Cut(num_heads=4, num_neurons=8, speed=1.0), Cut(num_heads=2, num_neurons=8, speed=2.0))
    """
    cuts = (Cut(h, n, speed(h, n)) for h in heads for n in neurons)
    return tuple(sorted(cuts, key=lambda cut: (cut.speed, -cut.num_heads, -cut.num_neurons)))


def check_speed(target_speed: float, cuts: Sequence[Cut], why: str = "") -> None:
    """Raise ValueError if no cut is that fast; the message lists some that can be reached, and the fastest.

    Args:
        target_speed: At least so many times fewer operations.
        cuts: From `reachable_cuts`.
        why: What keeps heads or neurons from being removed, if anything does.
    """
    if cuts[-1].speed >= target_speed:
        return
    faster = [cut for cut in cuts if cut.speed > 1]
    if not faster:
        raise ValueError(f"target_speed={target_speed:g} cannot be reached, and no other can{why and f': {why}'}")
    # evenly spaced in speed, the fastest last
    steps = min(_NUM_EXAMPLES, len(faster))
    wanted = [1 + (faster[-1].speed - 1) * (i + 1) / steps for i in range(steps)]
    examples = dict.fromkeys(min(faster, key=lambda cut, w=w: abs(cut.speed - w)) for w in wanted)
    lines = "".join(f"\n  {cut}" for cut in examples)
    raise ValueError(
        f"target_speed={target_speed:g} cannot be reached, at most {faster[-1].speed:.3g}{why and f' ({why})'}; "
        f"choose for instance one of these, where every layer keeps so many:{lines}"
    )


def lost_scores(scores: Iterable[torch.Tensor]) -> torch.Tensor:
    """What is lost with the units of the lowest scores: float64 (units + 1,), entry k with k units in every layer.

    Args:
        scores: Scores of each layer's units, (units,) per layer, as many in all of them.

    Example:
        >>> lost_scores([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])]).tolist()
        [0.0, 3.0, 8.0]
    """
    lowest_first = torch.stack([each.double().cpu().sort().values for each in scores])
    return torch.cat([torch.zeros(1, dtype=torch.float64), lowest_first.sum(dim=0).cumsum(dim=0)])


def choose_cut(
    target_speed: float,
    speed: Callable[[int, int], float],
    heads: Sequence[int],
    neurons: Sequence[int],
    lost_by_heads: torch.Tensor,
    lost_by_neurons: torch.Tensor,
) -> Cut:
    """The cut of at least that speed that loses least; among equal ones the fastest.

    The gates' first-order scores (Michel et al. 2019) of heads and neurons estimate the same thing, the change of the
    loss when the unit goes, so that their sums can be compared.

    Args:
        target_speed: At least so many times fewer operations.
        speed: How many times fewer operations a number of heads and a number of neurons take.
        heads: Numbers of heads that may remain in each layer; the present number first.
        neurons: Numbers of neurons that may remain; the present number first.
        lost_by_heads: What is lost with the heads that go, from `lost_scores`.
        lost_by_neurons: What is lost with the neurons that go.

    Raises:
        ValueError: No cut is that fast, or what is lost is not finite.

    Example:
        >>> lost = lost_scores([torch.tensor([1.0, 2.0])]), lost_scores([torch.tensor([4.0, 4.0])])
        >>> choose_cut(1.5, lambda heads, neurons: 4 / (heads + neurons), (2, 1), (2, 1), *lost)
        Cut(num_heads=1, num_neurons=1, speed=2.0)
    """
    for name, lost in (("heads", lost_by_heads), ("neurons", lost_by_neurons)):
        if not torch.isfinite(lost).all():
            raise ValueError(f"the gate scores of the {name} are not finite, so that no cut can be chosen by them")
    cuts = reachable_cuts(speed, heads, neurons)
    check_speed(target_speed, cuts)
    by_heads, by_neurons = lost_by_heads.tolist(), lost_by_neurons.tolist()

    def lost(cut: Cut) -> float:
        return by_heads[heads[0] - cut.num_heads] + by_neurons[neurons[0] - cut.num_neurons]

    return min((cut for cut in cuts if cut.speed >= target_speed), key=lambda cut: (lost(cut), -cut.speed))
