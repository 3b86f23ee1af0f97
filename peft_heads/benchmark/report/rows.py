"""From runs to the rows of a table: runs that differ in anything but task and seed are different rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..records.run_record import Run, describe_method, on_different_data
from ..records.schema import canonical_json
from .averages import mean_and_std


@dataclass(frozen=True)
class Row:
    """The runs of one setting.

    Args:
        settings: Settings that the runs have in common, see `row_settings`.
        runs: `{task: {(list seed, seed): run}}`.
        label: Name of the row, where it is more than its method.
        choices: `{task: setting}` of a row that chooses for every task.
        notes: Remarks that the reader needs.
    """

    settings: dict[str, Any]
    runs: dict[str, dict[tuple, Run]]
    label: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> dict[str, Any]:
        return self.settings["method"]

    @property
    def is_test(self) -> bool:
        return self.settings["eval_split"] == "test"

    def samples(self, best_on_test: bool = False) -> dict[str, dict[tuple, float]]:
        """`{task: {seed: accuracy in percent}}`; with `best_on_test` those of the best epochs, where recorded."""
        return {
            task: {
                seed: 100 * value for seed, run in runs.items() if (value := _accuracy(run, best_on_test)) is not None
            }
            for task, runs in self.runs.items()
        }

    def mean(self, task: str) -> float | None:
        """Mean accuracy of a task over its seeds, in percent."""
        return mean_and_std(list(self.samples().get(task, {}).values()))[0]

    def seeds(self) -> dict[str, set[tuple]]:
        return {task: set(runs) for task, runs in self.runs.items()}


def row_settings(run: Run) -> dict[str, Any]:
    """Everything that changes a run's accuracy, except its task, its seeds, the library versions and the device."""
    spec = run.spec.to_json()
    settings = {name: value for name, value in spec.items() if name not in ("task", "seed", "list_seed")}
    return settings | {
        "image_format": _main_format(run.environment.image_format),
        "checkpoint_revision": run.environment.checkpoint_revision,
        "official": run.official,
    }


def _main_format(image_format: str | None) -> str | None:
    """The format of a tree. Some images of another format do not make another setting of a JPEG tree."""
    return "JPEG" if "JPEG" in (image_format or "").split("+") else image_format


def make_rows(runs: Iterable[Run]) -> list[Row]:
    """One row per setting, sorted by method, then by the other settings.

    Runs without an accuracy are left out: partial ones may have none. Where the runs of one task and list used
    different data, the row has no number for that task, and a note says so.
    """
    grouped: dict[str, tuple[dict, dict]] = {}
    for run in runs:
        if run.result.accuracy is None:
            continue
        settings = row_settings(run)
        _, tasks = grouped.setdefault(canonical_json(settings), (settings, {}))
        tasks.setdefault(run.spec.task, {})[(run.spec.list_seed or 0, run.spec.seed)] = run
    rows = []
    for settings, tasks in grouped.values():
        mixed = [task for task, seeds in tasks.items() if _on_different_data(seeds)]
        notes = tuple(f"{task}: left out, its runs were on different data (data_fingerprint)" for task in mixed)
        kept = {task: seeds for task, seeds in tasks.items() if task not in mixed}
        rows.append(Row(settings, kept, notes=notes))
    return sorted(rows, key=_order)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"recipe": {"drop_path": 0.1}}` → `{"recipe.drop_path": 0.1}`."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def common_and_own(rows: list[Row], apart: tuple[str, ...] = ("method",)) -> tuple[dict, list[dict]]:
    """The settings that all rows share, and for each row those in which rows differ. Names in `apart` are left out."""
    flat = [flatten({name: value for name, value in row.settings.items() if name not in apart}) for row in rows]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    values = {name: {canonical_json(settings.get(name)) for settings in flat} for name in names}
    common = {name: flat[0].get(name) for name in names if len(values[name]) == 1}
    return common, [{name: settings.get(name) for name in names if name not in common} for settings in flat]


def row_labels(rows: list[Row]) -> list[str]:
    """A label for every row: its own or its method, and the settings in which the rows differ."""
    _, own = common_and_own(rows)
    labels = []
    for row, settings in zip(rows, own, strict=True):
        unofficial = settings.pop("official", True) is False
        words = [row.label or describe_method(row.method), *(f"{name}={value}" for name, value in settings.items())]
        labels.append(", ".join(words) + (" (unofficial)" if unofficial else ""))
    return labels


def _accuracy(run: Run, best: bool) -> float | None:
    return run.result.best_on_test if best else run.result.accuracy


def _on_different_data(seeds: dict[tuple, Run]) -> bool:
    by_list: dict[Any, list[dict]] = {}
    for (list_seed, _), run in seeds.items():
        by_list.setdefault(list_seed, []).append(run.environment.data_fingerprint)
    return any(map(on_different_data, by_list.values()))


def _order(row: Row) -> tuple:
    """Methods by name, their settings as numbers where they are numbers."""
    return row.method["name"], row.settings["shots"] or 0, method_order(row.method), canonical_json(row.settings)


def method_order(method: dict[str, Any]) -> list[tuple]:
    """A key that sorts settings of one method. Everywhere, the first of equally good settings is chosen."""
    settings = sorted((name, value) for name, value in method.items() if name != "name")
    return [
        (name, isinstance(value, str), value if isinstance(value, int | float) else 0, str(value))
        for name, value in settings
    ]
