"""The papers' rows, typed in from their tables (`published.csv`), in percent."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from .averages import averages


GROUPS = ("natural", "specialized", "structured")
# The two ways of averaging, as the file's column `averaging` names them.
AVERAGING = {"groups": "mean of group means", "tasks": "mean of tasks"}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a paper's table.

    Args:
        suite: Name of the suite.
        paper, table: Paper, and number of its table.
        backbone, checkpoint: Names such as `"ViT-B/16"` and `"ImageNet-21k"`.
        averaging: Average that the paper says it prints, one of AVERAGING.
        method: The paper's name of the method.
        tasks: `{task: accuracy}`, empty where the paper prints group means only.
        groups: `{group: mean}` as printed, empty where the paper prints tasks only.
        average: Average as printed.
        size_mb: Size of the adapter in MB (of 2^20 bytes), as printed.
        parameters_m: Trained parameters in millions, as printed.
        note: Remark on the numbers, where they need one.
    """

    suite: str
    paper: str
    table: str
    backbone: str
    checkpoint: str
    averaging: str
    method: str
    tasks: dict[str, float]
    groups: dict[str, float]
    average: float
    size_mb: float | None
    parameters_m: float | None
    note: str

    @property
    def source(self) -> str:
        return f"{self.paper}, Table {self.table}"

    def recomputed(self, groups: dict[str, str]) -> dict[str, float | None]:
        """`averages` of the row; where it has no tasks, of the printed group means, weighted by their tasks.

        Args:
            groups: `{task: group}` of the suite's tasks.
        """
        return averages(self.tasks or {task: self.groups[group] for task, group in groups.items()}, groups)


@dataclass(frozen=True)
class Disagreement:
    """A printed average that does not follow from the numbers beside it."""

    row: PublishedRow
    name: str
    printed: float
    recomputed: float


@cache
def published_rows(suite: str) -> tuple[PublishedRow, ...]:
    """The rows of a suite, in the order of the file."""
    text = files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_row(fields) for fields in csv.DictReader(text.splitlines()) if fields["suite"] == suite)


def disagreements(suite: str, groups: dict[str, str], tolerance: float = 0.1) -> list[Disagreement]:
    """The printed averages that differ from the recomputed ones by `tolerance` points or more.

    Args:
        suite: Name of the suite.
        groups: `{task: group}` of its tasks.
        tolerance: Smallest difference that counts. Some papers cut averages off after the first decimal, which makes a
            difference of less than 0.1.
    """
    found = []
    for row in published_rows(suite):
        recomputed = row.recomputed(groups)
        printed = row.groups | {AVERAGING[row.averaging]: row.average}
        found += [
            Disagreement(row, name, value, recomputed[name])
            for name, value in printed.items()
            if abs(value - recomputed[name]) > tolerance - 1e-9
        ]
    return found


def _row(fields: dict[str, str]) -> PublishedRow:
    own = ("suite", "paper", "table", "backbone", "checkpoint", "averaging", "method", "note")
    numbers = {name: float(value) for name, value in fields.items() if name not in own and value}
    rest = (*GROUPS, "average", "size_mb", "parameters_m")
    return PublishedRow(
        **{name: fields[name] for name in own},
        tasks={name: value for name, value in numbers.items() if name not in rest},
        groups={name: numbers[name] for name in GROUPS if name in numbers},
        average=numbers["average"],
        size_mb=numbers.get("size_mb"),
        parameters_m=numbers.get("parameters_m"),
    )
