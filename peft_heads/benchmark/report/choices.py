"""Rows that choose a variant for every task: by its test accuracy, as in the papers, or by its validation accuracy."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from ...tuners.common.head_selection import HEAD_SELECTION
from ..records.run_record import describe_method
from ..records.schema import canonical_json
from .rows import Row


# Settings of a method that a "best per task" row may choose for every task.
SCALE = ("scale", "lora_alpha")
VARIANTS = (*HEAD_SELECTION, *SCALE)


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
            splits = candidates.setdefault(canonical_json(_without_splits(_base(row, variants))), {})
            splits.setdefault(row.settings["eval_split"], []).append(row)
    chosen = []
    for base, family in _families([row for row in rows if row.is_test], variants):
        for split, validated in candidates.get(canonical_json(_without_splits(base)), {}).items():
            if len({canonical_json(row.method) for row in validated}) < 2:
                continue
            best, missing, unfinished = {}, [], []
            for task in _tasks(validated):
                if _has_run_of(validated, task, partly):
                    unfinished.append(task)
                    continue
                method = max(_having(validated, task), key=lambda row: round(row.mean(task), 7)).method
                found = [row for row in _having(family, task) if canonical_json(row.method) == canonical_json(method)]
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
        families.setdefault(canonical_json(base), (base, []))[1].append(row)
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
