"""Times of several sides that run in turns, and their ratio with its interval."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ratio:
    """Ratios of two sides that were timed in turns, one for each round.

    Attributes:
        median: Median of the ratios.
        middle_half: Quartiles of the ratios.
        interval: Interval of the median with at least 95 % confidence (order statistics). With fewer than six rounds
            there is none, and this is the whole range.
        of_medians: Ratio of the two medians.
        rounds: Number of rounds.
    """

    median: float
    middle_half: tuple[float, float]
    interval: tuple[float, float]
    of_medians: float
    rounds: int

    def map(self, function: Callable[[float], float]) -> Ratio:
        """Apply an increasing function to all figures."""
        middle_half, interval = (tuple(map(function, pair)) for pair in (self.middle_half, self.interval))
        return Ratio(function(self.median), middle_half, interval, function(self.of_medians), self.rounds)

    @property
    def span(self) -> str:
        """The interval and its kind, in words."""
        what = "95 % of the median" if self.rounds >= 6 else f"range of {self.rounds}"
        return f"{what}: {self.interval[0]:.3f} to {self.interval[1]:.3f}"

    def __str__(self) -> str:
        low, high = self.middle_half
        return (
            f"{self.median:.3f} ({self.span}; middle half: {low:.3f} to {high:.3f}; of medians: {self.of_medians:.3f})"
        )


def ratio(numerators: list[float], denominators: list[float]) -> Ratio:
    """Compare two sides that were measured in the same rounds.

    Memory may be zero. The ratio of something to zero is infinite; that of zero to zero is 1, since both are the same.
    """
    ratios = sorted(_quotient(a, b) for a, b in zip(numerators, denominators, strict=True))
    count = len(ratios)
    quarter, outside = count // 4, ranks_outside(count)
    return Ratio(
        median=statistics.median(ratios),
        middle_half=(ratios[quarter], ratios[-quarter - 1]),
        interval=(ratios[outside], ratios[-outside - 1]),
        of_medians=_quotient(statistics.median(numerators), statistics.median(denominators)),
        rounds=count,
    )


def _quotient(a: float, b: float) -> float:
    if b == 0:
        return 1.0 if a == 0 else math.inf
    return a / b


def ranks_outside(count: int) -> int:
    """Count the lowest values, and as many of the highest, that a 95 % interval of the median leaves out.

    The interval misses the median if at most that many values lie on one side of it. Each value lies on either side
    with equal probability, so their number is that of heads in coin tosses.
    """
    outside, missed = 0, 2 / 2**count
    while outside + 1 < count / 2 and (missed := missed + 2 * math.comb(count, outside + 1) / 2**count) <= 0.05:
        outside += 1
    return outside


def interleaved(
    sides: dict[str, Callable[[], Any]], rounds: int, device: torch.device | str = "cpu", warm_up: int = 2
) -> dict[str, list[float]]:
    """Time every side in every round, so that all see the same machine.

    Every other round draws a new order, and the next one reverses it. In an even number of rounds each side therefore
    runs before each other side as often as after it.

    Args:
        sides: Functions by name. One that returns a float has timed itself, for instance without its preparations.
        warm_up: Number of rounds before those that count.

    Returns:
        Seconds of every side, one value for each round.
    """
    draw, order, times = random.Random(0), list(sides), {name: [] for name in sides}
    for index in range(warm_up + rounds):
        order = order[::-1] if (index - warm_up) % 2 else draw.sample(order, len(order))
        for name in order:
            seconds, result = timed(sides[name], device)
            if index >= warm_up:
                times[name].append(result if isinstance(result, float) else seconds)
    return times


def timed(call: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[float, Any]:
    """Return the seconds of a call, including its work on an accelerator, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device | str) -> None:
    """Wait for the work that an accelerator still has to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
