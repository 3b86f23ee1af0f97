"""Statistics of the offline suite: differences of settings with confidence intervals, paired by task and seed."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..records.run_record import Run
from .settings import setting_name


CONFIDENCE = 0.95
COLUMNS = ["setting", "task", "seed", "val", "test", "heads", "scores"]


@dataclass(frozen=True)
class Record:
    """One training: accuracies in percent on validation and test images, and its heads.

    Attributes:
        setting: Name in `settings.CORE` or `settings.SIDE`.
        heads: Deactivated heads, where all projections have the same ones; else None.
        scores: Score of each head by the run's criterion, summed over the layers; empty where there are none.
    """

    setting: str
    task: str
    seed: int
    val: float
    test: float
    heads: tuple[int, ...] | None = None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences in percentage points, every task counting the same.

    Attributes:
        mean: Mean over the tasks of their means over seeds.
        low, high: Its confidence interval for other seeds on these tasks, by the variance within the tasks.
        tasks_low, tasks_high: The interval for other tasks, by Student's t over the means; None for a single task.
        pairs: Number of pairs, each of one task and seed.
        by_task: Mean of each task.
    """

    mean: float
    low: float
    high: float
    tasks_low: float | None
    tasks_high: float | None
    pairs: int
    by_task: dict[str, float]

    @property
    def is_clear(self) -> bool:
        return self.low > 0 or self.high < 0


def make_records(runs: Iterable[Run]) -> list[Record]:
    """One record per training that was evaluated on validation and on test images; others are left out.

    Raises:
        ValueError: There are two runs of one setting, task, seed and split, which differ in something else.
    """
    found: dict[tuple, dict[str, Run]] = {}
    for run in runs:
        key = setting_name(run.spec.method.to_json()), run.spec.task, run.spec.seed
        twice = found.setdefault(key, {}).setdefault(run.spec.eval_split, run)
        if twice is not run:
            raise ValueError(
                f"{' '.join(map(str, key))}, {run.spec.eval_split}: two runs that differ in recipe or backbone, "
                f"{twice.path} and {run.path}; compare those of one recipe at a time"
            )
    return [
        Record(*key, 100 * pair["val"].result.accuracy, 100 * pair["test"].result.accuracy, *_heads(pair["test"]))
        for key, pair in found.items()
        if {"val", "test"} <= pair.keys()
    ]


def _heads(run: Run) -> tuple[tuple[int, ...] | None, tuple[float, ...]]:
    masks = {tuple(mask) for mask in run.result.masks.values()}
    method = run.spec.method
    everywhere = method.get("granularity", "global") == "global" and method.get("joint", True) and len(masks) == 1
    heads = tuple(i for i, active in enumerate(next(iter(masks))) if not active) if everywhere else None
    scores = run.result.head_scores or {}
    same_number = len({len(score) for score in scores.values()}) == 1
    return heads, tuple(float(x) for x in np.sum(list(scores.values()), axis=0)) if same_number else ()


def write_records(records: Iterable[Record]) -> str:
    """The records as sorted CSV, which `read_records` reads."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in sorted(records, key=lambda r: (r.setting, r.task, r.seed)):
        heads = "" if r.heads is None else " ".join(map(str, r.heads)) or "none"
        scores = " ".join(f"{score:.4g}" for score in r.scores)
        writer.writerow([r.setting, r.task, r.seed, f"{r.val:.4f}", f"{r.test:.4f}", heads, scores])
    return buffer.getvalue()


def read_records(path: str | os.PathLike) -> list[Record]:
    """Read a table of `write_records`. Raises ValueError naming the file if it is none."""
    records = []
    try:
        rows = csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8")))
        if rows.fieldnames != COLUMNS:
            raise ValueError(f"columns {rows.fieldnames}")
        for row in rows:
            heads = tuple(map(int, row["heads"].split())) if row["heads"] not in ("", "none") else ()
            records.append(
                Record(
                    row["setting"],
                    row["task"],
                    int(row["seed"]),
                    float(row["val"]),
                    float(row["test"]),
                    None if row["heads"] == "" else heads,
                    tuple(map(float, row["scores"].split())),
                )
            )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of runs of the offline suite: {error!r}") from error
    return records


def accuracies(records: Iterable[Record], settings: Sequence[str], split: str = "test") -> dict[tuple, float]:
    """`{(task, seed): accuracy in percent}`, the mean over the settings; none where one of them was not run."""
    found: dict[tuple, dict[str, float]] = {}
    for record in records:
        if record.setting in settings:
            found.setdefault((record.task, record.seed), {})[record.setting] = getattr(record, split)
    return {key: float(np.mean(list(x.values()))) for key, x in found.items() if len(x) == len(set(settings))}


def best_of(records: Iterable[Record], settings: Sequence[str], chosen_by: str) -> dict[tuple, float]:
    """`{(task, seed): test accuracy}` of the best of the settings, chosen for every task and seed.

    Args:
        records: Records of the runs.
        settings: Settings to choose from; the first of equals is chosen.
        chosen_by: Split to choose by: "val", or "test" as in the papers.
    """
    by_setting = [(accuracies(records, [s], chosen_by), accuracies(records, [s], "test")) for s in settings]
    keys = set.intersection(*(set(chosen) for chosen, _ in by_setting))
    return {key: max(by_setting, key=lambda pair, key=key: pair[0][key])[1][key] for key in sorted(keys)}


def difference(first: dict[tuple, float], second: dict[tuple, float]) -> Difference | None:
    """First minus second, over the pairs (task, seed) that both have; None unless every such task has two seeds."""
    by_task: dict[str, list[float]] = {}
    for task, seed in sorted(first.keys() & second.keys()):
        by_task.setdefault(task, []).append(first[task, seed] - second[task, seed])
    if not by_task or min(map(len, by_task.values())) < 2:
        return None
    means = {task: float(np.mean(values)) for task, values in by_task.items()}
    pairs = sum(map(len, by_task.values()))
    variance = sum(np.var(values, ddof=1) / len(values) for values in by_task.values()) / len(by_task) ** 2
    mean, freedom = float(np.mean(list(means.values()))), pairs - len(by_task)
    reach = float(np.sqrt(variance) * stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return Difference(mean, mean - reach, mean + reach, *interval(list(means.values())), pairs, means)


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The confidence interval of the mean of independent values, by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None, None
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(mean - reach), float(mean + reach)


def rank_correlations(records: Iterable[Record], first: str, second: str) -> dict[tuple, float]:
    """`{(task, seed): Spearman's correlation of the heads' scores in two settings}`, where both have an order."""
    pairs = _pairs({r: r.scores for r in records if len(set(r.scores)) > 1}, first, second)
    return {key: float(stats.spearmanr(x, y).statistic) for key, (x, y) in pairs.items()}


def agreement(records: Iterable[Record], first: str, second: str) -> dict[tuple, float]:
    """`{(task, seed): share of the heads deactivated in one setting that the other deactivates as well}`."""
    pairs = _pairs({r: set(r.heads) for r in records if r.heads}, first, second)
    return {key: len(x & y) / len(x) for key, (x, y) in pairs.items()}


def _pairs(values: dict[Record, Any], first: str, second: str) -> dict[tuple, tuple[Any, Any]]:
    of = {(r.setting, r.task, r.seed): value for r, value in values.items()}
    keys = [(task, seed) for setting, task, seed in of if setting == first and (second, task, seed) in of]
    return {(task, seed): (of[first, task, seed], of[second, task, seed]) for task, seed in keys}


def masks_by_task(records: Iterable[Record], setting: str, num_heads: int) -> dict[str, list[dict[str, list[bool]]]]:
    """`{task: masks of its runs}` for `overlap.overlaps`."""
    found = sorted((r.task, r.seed, r.heads) for r in records if r.setting == setting and r.heads is not None)
    return {
        task: [{"all": [head not in heads for head in range(num_heads)]} for _, _, heads in group]
        for task, group in itertools.groupby(found, key=lambda x: x[0])
    }
