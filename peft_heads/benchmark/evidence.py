"""What the offline suite says: differences of settings with confidence intervals, paired over tasks and seeds."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from .offline import setting_name
from .results import Run


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Record:
    """One training: accuracies in percent on validation and test images, and its heads.

    Attributes:
        setting: Its name in `offline.CORE` or `offline.SIDE`.
        heads: The deactivated heads, where all projections have the same ones; else None.
        scores: One score per head, summed over the layers, by the run's criterion; empty where there are none.
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
    """The mean of paired differences in percentage points, and its confidence interval (Student's t over the pairs)."""

    mean: float
    low: float
    high: float
    pairs: int
    by_task: dict[str, float]

    @property
    def is_clear(self) -> bool:
        return self.low > 0 or self.high < 0


def make_records(runs: Iterable[Run]) -> list[Record]:
    """One record per training that was evaluated on validation and on test images; others are left out."""
    found: dict[tuple, dict[str, Run]] = {}
    for run in runs:
        key = setting_name(run.spec.method), run.spec.task, run.spec.seed
        found.setdefault(key, {})[run.spec.eval_split] = run
    return [
        Record(*key, 100 * pair["val"].result.accuracy, 100 * pair["test"].result.accuracy, *_heads(pair["test"]))
        for key, pair in found.items()
        if {"val", "test"} <= pair.keys()
    ]


def _heads(run: Run) -> tuple[tuple[int, ...] | None, tuple[float, ...]]:
    masks = {tuple(mask) for mask in run.result.masks.values()}
    heads = tuple(i for i, active in enumerate(next(iter(masks))) if not active) if len(masks) == 1 else None
    scores = run.result.head_scores or {}
    same_number = len({len(score) for score in scores.values()}) == 1
    return heads, tuple(float(x) for x in np.sum(list(scores.values()), axis=0)) if same_number else ()


def write_records(records: Iterable[Record]) -> str:
    """As CSV, sorted; `read_records` reads it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["setting", "task", "seed", "val", "test", "heads", "scores"])
    for r in sorted(records, key=lambda r: (r.setting, r.task, r.seed)):
        heads = "" if r.heads is None else " ".join(map(str, r.heads)) or "none"
        scores = " ".join(f"{score:.4g}" for score in r.scores)
        writer.writerow([r.setting, r.task, r.seed, f"{r.val:.4f}", f"{r.test:.4f}", heads, scores])
    return buffer.getvalue()


def read_records(path: str | os.PathLike) -> list[Record]:
    """Raises ValueError naming the file if it is none of `write_records`."""
    records = []
    try:
        for row in csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"))):
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
    """`{(task, seed): accuracy in percent}`, the mean over the settings; where one of them was not run there is none."""
    found: dict[tuple, dict[str, float]] = {}
    for record in records:
        if record.setting in settings:
            found.setdefault((record.task, record.seed), {})[record.setting] = getattr(record, split)
    return {key: float(np.mean(list(x.values()))) for key, x in found.items() if len(x) == len(set(settings))}


def best_of(records: Iterable[Record], settings: Sequence[str], chosen_by: str) -> dict[tuple, float]:
    """`{(task, seed): test accuracy}` of the best of the settings, chosen anew for every task and seed.

    Args:
        records: The runs.
        settings: To choose from; of equals the first.
        chosen_by: "val", or "test" as in the papers.
    """
    by_setting = [(accuracies(records, [s], chosen_by), accuracies(records, [s], "test")) for s in settings]
    keys = set.intersection(*(set(chosen) for chosen, _ in by_setting))
    return {key: max(by_setting, key=lambda pair, key=key: pair[0][key])[1][key] for key in sorted(keys)}


def difference(first: dict[tuple, float], second: dict[tuple, float]) -> Difference | None:
    """First minus second over the (task, seed) that both have; None for fewer than two."""
    pairs = {key: first[key] - second[key] for key in sorted(first.keys() & second.keys())}
    if len(pairs) < 2:
        return None
    values = np.array(list(pairs.values()))
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    reach = error * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    by_task = {task: float(np.mean([value for (of, _), value in pairs.items() if of == task])) for task, _ in pairs}
    return Difference(float(mean), float(mean - reach), float(mean + reach), len(values), by_task)


def rank_correlations(records: Iterable[Record], first: str, second: str) -> list[float]:
    """Spearman's correlation of the heads' scores in two settings, one per task and seed."""
    scores = {(r.setting, r.task, r.seed): r.scores for r in records if r.setting in (first, second) and r.scores}
    pairs = [(x, scores.get((second, task, seed))) for (s, task, seed), x in scores.items() if s == first]
    return [float(stats.spearmanr(x, y).statistic) for x, y in pairs if y and len(set(x)) > 1 and len(set(y)) > 1]


def agreement(records: Iterable[Record], first: str, second: str) -> list[float]:
    """The share of the heads deactivated in one setting that the other deactivates as well, per task and seed."""
    heads = {(r.setting, r.task, r.seed): r.heads for r in records if r.setting in (first, second) and r.heads}
    pairs = [
        (set(of_first), set(heads[second, task, seed]))
        for (setting, task, seed), of_first in heads.items()
        if setting == first and (second, task, seed) in heads
    ]
    return [len(a & b) / len(a) for a, b in pairs]


def masks_by_task(records: Iterable[Record], setting: str, num_heads: int) -> dict[str, list[dict[str, list[bool]]]]:
    """`{task: masks of its runs}` as `overlap.overlaps` takes them."""
    found = sorted((r.task, r.seed, r.heads) for r in records if r.setting == setting and r.heads is not None)
    return {
        task: [{"all": [head not in heads for head in range(num_heads)]} for _, _, heads in group]
        for task, group in itertools.groupby(found, key=lambda x: x[0])
    }
