"""From runs to the rows of a table: runs that differ in anything but task and seed are different rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..records.record import Run, describe_method, on_different_data
from ..records.schema import canonical_json
from .averages import mean_and_std


# Settings of a method that a "best per task" row may choose for every task.
SCALE = ("scale", "lora_alpha")
VARIANTS = ("ne", "ratio", "criterion", "granularity", "joint", "mask_seed", *SCALE)


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


def best_on_test(rows: Iterable[Row], variants: tuple[str, ...] = VARIANTS) -> list[Row]:
    """For every task the variant with the highest *test* accuracy, as in the papers. It is not a result of one method.

    Args:
        rows: Rows of `make_rows`.
        variants: Settings of the method in which the rows to choose from may differ.

    Returns:
        One row for every family of at least two rows.
    """
    chosen = []
    for base, family in _families([row for row in rows if row.is_test], variants):
        if len(family) < 2:
            continue
        best = {task: max(_having(family, task), key=lambda row: row.mean(task)) for task in _tasks(family)}
        label = f"{describe_method(base['method'])}, best of all variants per task, chosen on test (as in the paper)"
        chosen.append(_choice(base, best, label, variants, f"chosen from {len(family)} variants"))
    return chosen


def best_on_validation(
    rows: Iterable[Row], variants: tuple[str, ...] = VARIANTS, partly: Collection[str] = ()
) -> list[Row]:
    """For every task the test accuracy of the variant with the highest *validation* accuracy.

    All variants that have validation runs on a task are candidates, whether of one sweep or of several. Where the
    chosen variant was not run on test, or a sweep has not finished all candidates, the task has no number, and a note
    says so.

    Args:
        rows: Rows of `make_rows`, on the validation and on the test split.
        variants: Settings of the method in which the rows to choose from may differ.
        partly: Ids of runs by which nothing may be chosen, see `plans.unfinished_choices`.

    Returns:
        One row for every family that has at least two validation rows, and a test row.
    """
    rows = list(rows)
    candidates: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if not row.is_test:
            splits = candidates.setdefault(_key(_without_splits(_base(row, variants))), {})
            splits.setdefault(row.settings["eval_split"], []).append(row)
    chosen = []
    for base, family in _families([row for row in rows if row.is_test], variants):
        for split, validated in candidates.get(_key(_without_splits(base)), {}).items():
            if len({_key(row.method) for row in validated}) < 2:
                continue
            best, missing, unfinished = {}, [], []
            for task in _tasks(validated):
                if _has_run_of(validated, task, partly):
                    unfinished.append(task)
                    continue
                method = max(_having(validated, task), key=lambda row: round(row.mean(task), 7)).method
                found = [row for row in _having(family, task) if _key(row.method) == _key(method)]
                if found:
                    best[task] = found[0]
                else:
                    missing.append(f"{task} ({describe_method(method)})")
            what = "best" if variants != SCALE else "scale"
            label = f"{describe_method(base['method'])}, {what} per task chosen on {split}"
            row = _choice(base, best, label, variants, f"chosen from {len(validated)} variants")
            notes = [f"chosen, but not run on test: {', '.join(missing)}"] if missing else []
            if unfinished:
                notes.append(f"nothing chosen, as not all candidates are finished on {split}: {', '.join(unfinished)}")
            chosen.append(replace(row, notes=(*row.notes, *notes)))
    return chosen


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
    values = {name: {_key(settings.get(name)) for settings in flat} for name in names}
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
    return row.method["name"], row.settings["shots"] or 0, method_order(row.method), _key(row.settings)


def method_order(method: dict[str, Any]) -> list[tuple]:
    """A key that sorts settings of one method. Everywhere, the first of equally good settings is chosen."""
    settings = sorted((name, value) for name, value in method.items() if name != "name")
    return [
        (name, isinstance(value, str), value if isinstance(value, int | float) else 0, str(value))
        for name, value in settings
    ]


def _key(value: Any) -> str:
    return canonical_json(value)


def _base(row: Row, variants: tuple[str, ...]) -> dict[str, Any]:
    method = {name: value for name, value in row.method.items() if name not in variants}
    return row.settings | {"method": method}


def _without_splits(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("train_split", "eval_split")}


def _families(rows: list[Row], variants: tuple[str, ...]) -> list[tuple[dict, list[Row]]]:
    """Families of rows that differ in nothing but `variants`, each with the settings that its rows share."""
    families: dict[str, tuple[dict, list[Row]]] = {}
    for row in rows:
        base = _base(row, variants)
        families.setdefault(_key(base), (base, []))[1].append(row)
    return list(families.values())


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row.runs))


def _having(rows: list[Row], task: str) -> list[Row]:
    return [row for row in rows if row.mean(task) is not None]


def _has_run_of(rows: list[Row], task: str, run_ids: Collection[str]) -> bool:
    return (
        any(run.spec.run_id in run_ids for row in rows for run in row.runs.get(task, {}).values())
        if run_ids
        else False
    )


def _describe_choice(row: Row, variants: tuple[str, ...]) -> str:
    return describe_method({"name": "", **{k: v for k, v in row.method.items() if k in variants}}).strip()


def _choice(base: dict, best: dict[str, Row], label: str, variants: tuple[str, ...], note: str) -> Row:
    choices = {task: _describe_choice(row, variants) for task, row in best.items()}
    return Row(base, {task: row.runs[task] for task, row in best.items()}, label, choices, (note,))
