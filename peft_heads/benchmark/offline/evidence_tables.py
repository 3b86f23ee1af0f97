"""The questions that the offline suite answers, and the tables of the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..report.overlap import KINDS, Masks, overlaps
from ..report.tables import Cell, Column, Table, TableRow
from .evidence import (
    CONFIDENCE,
    Difference,
    Record,
    accuracies,
    agreement,
    best_of,
    difference,
    interval,
    masks_by_task,
    rank_correlations,
)
from .settings import CHANGES, CORE, NES, OFFLINE_TASKS, RANDOM_MASKS, SIDE, TAYLOR


NUM_HEADS = 12  # of the small ViT

FOR_SCALE = "For scale"

Comparison = tuple[str, str, Sequence[str], Sequence[str]]
"""Section, label, and the settings of both sides; the accuracy of a side is the mean over its settings."""


def random_masks(ne: int) -> list[str]:
    return [f"random ne={ne} mask {seed}" for seed in RANDOM_MASKS]


def comparisons() -> list[Comparison]:
    """All comparisons, question by question."""
    found: list[Comparison] = []
    for ne in NES:
        section = f"Does masking the least responsive heads cost less? ne={ne}"
        least, most = [f"absolute ne={ne}"], [f"most_responsive ne={ne}"]
        found += [
            (section, "absolute − random", least, random_masks(ne)),
            (section, "absolute − most responsive first", least, most),
            (section, "random − most responsive first", random_masks(ne), most),
            (section, "absolute − front", least, [f"front ne={ne}"]),
        ]
    for ne in NES:
        section = f"Does it ever gain over LoRA? ne={ne}"
        criteria = (*TAYLOR, "weight_norm", "grad_norm", "front", "most_responsive")
        found += [(section, f"{name} − LoRA", [f"{name} ne={ne}"], ["LoRA"]) for name in criteria]
        found.append((section, "random − LoRA", random_masks(ne), ["LoRA"]))
    for ne in NES:
        section = f"Do the criteria differ? ne={ne}"
        others = ("positive", "negative", "weight_norm", "grad_norm")
        found += [(section, f"{name} − absolute", [f"{name} ne={ne}"], [f"absolute ne={ne}"]) for name in others]
    for name in CHANGES:
        section = f"Does it hold otherwise? ne=1, {name}"
        ours, drawn = [f"absolute ne=1, {name}"], [f"random ne=1, {name}"]
        base = ["LoRA, 1 bit, r=32"] if name == "1 bit, r=32" else ["LoRA"]
        found += [
            (section, "absolute − random", ours, drawn),
            (section, f"absolute − {base[0]}", ours, base),
        ]
        if name != "1 bit, r=32":
            found.append((section, "absolute − absolute as in the core", ours, ["absolute ne=1"]))
    found.append((FOR_SCALE, "LoRA − linear", ["LoRA"], ["linear"]))
    found.append((FOR_SCALE, "full − LoRA", ["full"], ["LoRA"]))
    found.append((FOR_SCALE, "LoRA − LoRA, 1 bit, r=32", ["LoRA"], ["LoRA, 1 bit, r=32"]))
    return found


def comparison_table(records: Sequence[Record]) -> Table:
    """All comparisons for which at least two pairs were run."""
    rows = []
    for section, label, first, second in comparisons():
        found = difference(accuracies(records, first), accuracies(records, second))
        if found is not None:
            rows.append(TableRow(section, label + (" *" if found.is_clear else ""), _cells(found)))
    counted = [row for row in rows if row.section != FOR_SCALE]
    clear = sum(row.label.endswith("*") for row in counted)
    notes = [
        f"Test accuracy, percentage points, paired by task and seed. From, to: the {CONFIDENCE:.0%} interval of the mean "
        "over these tasks, by the variance over seeds within them (weights, order, masks; the images are the same for all "
        "seeds). Low, high: the interval for other tasks, Student's t over the tasks' means.",
        f"* the first interval leaves 0 out: {clear} of {len(counted)} (without '{FOR_SCALE}'); if nothing differed about "
        f"{(1 - CONFIDENCE) * len(counted):.0f} would, in clusters, since rows share runs.",
        "random: the mean over three masks in the core, one mask where the question is asked otherwise.",
    ]
    return Table("Differences of settings", _difference_columns(), rows, notes)


def setting_table(records: Sequence[Record]) -> Table:
    """The accuracy of every setting that was run, by task."""
    rows = []
    for setting in [*CORE, *SIDE]:
        found = accuracies(records, [setting])
        if found:
            by_task = {
                task.name: Cell(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)
                for task in OFFLINE_TASKS
                if (values := [value for (name, _), value in found.items() if name == task.name])
            }
            complete = len(by_task) == len(OFFLINE_TASKS)
            mean = Cell(float(np.mean([cell.mean for cell in by_task.values()])) if complete else None)
            section = "core" if setting in CORE else "side"
            rows.append(TableRow(section, setting, by_task | {"mean": mean, "runs": Cell(len(found))}))
    columns = [*(Column(task.name) for task in OFFLINE_TASKS), Column("mean", "", 2), Column("runs", "", 0)]
    notes = ["Test accuracy in percent after the last epoch; mean and standard deviation over seeds."]
    return Table("Accuracy by setting", columns, rows, notes)


def choice_table(records: Sequence[Record]) -> Table:
    """How much of a gain comes from choosing: the best of the Taylor criteria, and of as many random masks."""
    families = {
        "Taylor": [f"{criterion} ne={ne}" for ne in NES for criterion in TAYLOR],
        "random": [name for ne in NES for name in random_masks(ne)],
    }
    lora, rows = accuracies(records, ["LoRA"]), []
    for by in ("val", "test"):
        best = {family: best_of(records, settings, by) for family, settings in families.items()}
        sides = []
        for family, settings in families.items():
            sides.append((f"{family} − LoRA", best[family], lora))
            sides.append((f"{family} − mean of its six", best[family], accuracies(records, settings)))
        sides.append(("Taylor − random", best["Taylor"], best["random"]))
        for label, first, second in sides:
            found = difference(first, second)
            if found is not None:
                cells = {"accuracy": Cell(float(np.mean([first[key] for key in first.keys() & second.keys()])))}
                rows.append(TableRow(f"best of six, chosen on {by}", label, cells | _cells(found)))
    notes = [
        "Chosen anew for every task and seed, by 200 validation images or by the test images themselves (the papers choose "
        "once per task); of equals the first, which has ne=1. Accuracy: on test, of what was chosen. A best of six chosen "
        "on test is above one run of LoRA for that reason alone: compare it with random masks chosen in the same way.",
    ]
    columns = [Column("accuracy", "", 2), *_difference_columns()]
    return Table("How much of a gain is the choice itself?", columns, rows, notes)


def early_table(records: Sequence[Record]) -> Table:
    """How early heads can be scored: early scores compared with those after ten epochs."""
    final = "absolute ne=1, scored after 10 epochs"
    settings = {
        "one batch (the second)": "absolute ne=1, scored on one batch",
        "1 epoch": "absolute ne=1, scored after 1 epoch",
        "3 epochs": "absolute ne=1",
    }
    rows = []
    for label, setting in settings.items():
        correlations, same = rank_correlations(records, setting, final), agreement(records, setting, final)
        if correlations:
            cells = {"rank correlation": _mean(correlations)} | _over_tasks(correlations)
            cells |= {"same head": _mean(same)} | _over_tasks(same, "same ") | {"runs": Cell(len(correlations))}
            rows.append(TableRow("scored after", label, cells))
    names = ["rank correlation", "from", "to", "same head", "same from", "same to"]
    columns = [*(Column(name, "", 2) for name in names), Column("runs", "", 0)]
    notes = [
        "Spearman's correlation of the heads' scores with those of the tenth epoch, and how often the same head comes last "
        f"(by chance: {1 / NUM_HEADS:.2f}); intervals: Student's t over the tasks' means.",
        "One batch: that of the second step, since lora_B is zero in the first; lora_B then holds a single step of Adam at "
        "the beginning of the warm-up of the learning rate, all entries alike, so that the score is nearly a norm of the "
        "gradient. One epoch: its mean; three: the mean over the third.",
    ]
    return Table("How early can heads be scored?", columns, rows, notes)


def head_table(records: Sequence[Record]) -> Table:
    """Whether related tasks choose the same heads."""
    groups = {task.name: task.group for task in OFFLINE_TASKS}
    rows = []
    for ne in NES:
        for criterion in TAYLOR:
            setting = f"{criterion} ne={ne}"
            masks = masks_by_task(records, setting, NUM_HEADS)
            for overlap in overlaps(masks, groups):
                cells = {"overlap": Cell(overlap.observed), "expected": Cell(overlap.expected)}
                cells |= _over_tasks({(task, 0): x for task, x in _overlap_by_task(masks, groups, overlap.kind)})
                rows.append(TableRow(setting, overlap.kind, cells | {"pairs": Cell(overlap.pairs)}))
    columns = [*(Column(name, "", 2) for name in ("overlap", "from", "to", "expected")), Column("pairs", "", 0)]
    notes = [
        "Jaccard index of the deactivated heads of two runs, mean over pairs; expected: of heads drawn at random. Interval: "
        "Student's t over the means of every task's pairs, rough where two tasks share a pair. Same group: digits and "
        "textures, and the four structured tasks with each other.",
    ]
    return Table("Are the same heads chosen for related tasks?", columns, rows, notes)


def evidence_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`{file name: table}` of all tables that have rows."""
    tables = {
        "settings": setting_table(records),
        "comparisons": comparison_table(records),
        "choice": choice_table(records),
        "early": early_table(records),
        "heads": head_table(records),
    }
    return {name: table for name, table in tables.items() if table.rows}


def _difference_columns() -> list[Column]:
    names = ["difference", "from", "to", "low", "high"]
    return [*(Column(name, "", 2) for name in names), Column("pairs", "", 0)] + [
        Column(task.name, "by task", 1) for task in OFFLINE_TASKS
    ]


def _cells(found: Difference) -> dict[str, Cell]:
    cells = {"difference": Cell(found.mean), "from": Cell(found.low), "to": Cell(found.high)}
    cells |= {"low": Cell(found.tasks_low), "high": Cell(found.tasks_high)}
    return cells | {"pairs": Cell(found.pairs)} | {task: Cell(value) for task, value in found.by_task.items()}


def _mean(values: dict[tuple, float]) -> Cell:
    return Cell(float(np.mean(list(values.values()))) if values else None)


def _over_tasks(values: dict[tuple, float], prefix: str = "") -> dict[str, Cell]:
    """The interval of the mean over tasks of `{(task, seed): value}`, in columns `{prefix}from` and `{prefix}to`."""
    by_task: dict[str, list[float]] = {}
    for (task, _), value in values.items():
        by_task.setdefault(task, []).append(value)
    low, high = interval([float(np.mean(x)) for x in by_task.values()])
    return {f"{prefix}from": Cell(low), f"{prefix}to": Cell(high)}


def _overlap_by_task(masks: dict[str, list[Masks]], groups: dict[str, str], kind: str) -> list[tuple[str, float]]:
    """Every task's mean overlap with itself (other seeds), with the others of its group, or with other groups."""
    found = []
    for task in masks:
        others = [task] if kind == KINDS[0] else [other for other in masks if other != task]
        pairs = [overlaps({task: masks[task], other: masks[other]}, groups) for other in others]
        values = [overlap.observed for pair in pairs for overlap in pair if overlap.kind == kind]
        if values:
            found.append((task, float(np.mean(values))))
    return found
