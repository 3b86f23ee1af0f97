"""Means and deviations over seeds, tasks and groups. An average over tasks is None if any of them is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and the unbiased standard deviation; None for no values, and for the deviation of a single one.

    Example:
        >>> mean_and_std([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    values = [float(value) for value in values]
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def group_means(values: Mapping[str, float | None], groups: Mapping[str, str]) -> dict[str, float | None]:
    """The mean of every group of tasks.

    Args:
        values: `{task: accuracy}`.
        groups: `{task: group}` of *all* tasks of the suite.

    Example:
        >>> group_means({"a": 1.0, "b": 3.0}, {"a": "x", "b": "x", "c": "y"})
        {'x': 2.0, 'y': None}
    """
    members: dict[str, list[float | None]] = {}
    for task, group in groups.items():
        members.setdefault(group, []).append(values.get(task))
    return {group: _mean_of_all(accuracies) for group, accuracies in members.items()}


def mean_of_group_means(values: Mapping[str, float | None], groups: Mapping[str, str]) -> float | None:
    """The average of HEAT, Heart-LoRA, Bi-LoRA and SynQT: every group counts the same, whatever its number of tasks."""
    return _mean_of_all(list(group_means(values, groups).values()))


def mean_of_tasks(values: Mapping[str, float | None], groups: Mapping[str, str]) -> float | None:
    """The average of RLRR: every task counts the same."""
    return _mean_of_all([values.get(task) for task in groups])


def averages(values: Mapping[str, float | None], groups: Mapping[str, str]) -> dict[str, float | None]:
    """The group means under their names, then "mean of group means" and "mean of tasks".

    The means of groups are left out where the suite has a single group.
    """
    named = group_means(values, groups)
    overall = {"mean of tasks": mean_of_tasks(values, groups)}
    if len(named) < 2:
        return overall
    return named | {"mean of group means": mean_of_group_means(values, groups)} | overall


def averages_over_seeds(
    samples: Mapping[str, Mapping[tuple, float]], groups: Mapping[str, str]
) -> dict[str, tuple[float | None, float | None]]:
    """`averages` with their deviations over seeds, which are those of the averages per seed.

    Args:
        samples: `{task: {seed: accuracy}}`.
        groups: `{task: group}` of all tasks.

    Returns:
        `{name: (mean, std)}`. The deviation is None unless all tasks have the same seeds, at least two.
    """
    means = averages({task: mean_and_std(list(seeds.values()))[0] for task, seeds in samples.items()}, groups)
    seed_sets = {frozenset(samples.get(task, {})) for task in groups}
    per_seed = []
    if len(seed_sets) == 1:
        (seeds,) = seed_sets
        per_seed = [averages({task: samples[task][seed] for task in groups}, groups) for seed in sorted(seeds)]
    return {name: (mean, mean_and_std([row[name] for row in per_seed])[1]) for name, mean in means.items()}


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else statistics.fmean(values)
