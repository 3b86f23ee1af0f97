"""The questions that the offline suite is to answer, and the tables of the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .evidence import (
    CONFIDENCE,
    Difference,
    Record,
    accuracies,
    agreement,
    best_of,
    difference,
    masks_by_task,
    rank_correlations,
)
from .offline import CHANGES, CORE, NES, OFFLINE_TASKS, RANDOM_MASKS, SIDE, TAYLOR
from .overlap import group_p_value, overlaps
from .tables import Cell, Column, Table, TableRow


NUM_HEADS = 12  # of the small ViT

Comparison = tuple[str, str, Sequence[str], Sequence[str]]
"""Section, label, and the settings of either side; a side's accuracy is the mean over its settings."""


def random_masks(ne: int) -> list[str]:
    return [f"random ne={ne} mask {seed}" for seed in RANDOM_MASKS]


def comparisons() -> list[Comparison]:
    """Everything that is compared, question by question."""
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
        base = ["LoRA, 1 bit"] if name == "1 bit" else ["LoRA"]
        found += [
            (section, "absolute − random", ours, drawn),
            (section, f"absolute − {base[0]}", ours, base),
        ]
        if name != "1 bit":
            found.append((section, "absolute − absolute as in the core", ours, ["absolute ne=1"]))
    found.append(("For scale", "LoRA − linear", ["LoRA"], ["linear"]))
    found.append(("For scale", "full − LoRA", ["full"], ["LoRA"]))
    found.append(("For scale", "LoRA − LoRA, 1 bit", ["LoRA"], ["LoRA, 1 bit"]))
    return found


def comparison_table(records: Sequence[Record]) -> Table:
    """Every comparison of which at least two pairs were run."""
    rows = []
    for section, label, first, second in comparisons():
        found = difference(accuracies(records, first), accuracies(records, second))
        if found is not None:
            rows.append(TableRow(section, label + (" *" if found.is_clear else ""), _cells(found)))
    clear = sum(row.label.endswith("*") for row in rows)
    notes = [
        f"Test accuracy, percentage points; mean over pairs of one task and seed, and its {CONFIDENCE:.0%} interval "
        "(Student's t over the pairs); then the means by task.",
        f"* the interval leaves 0 out: {clear} of {len(rows)}; by chance alone about "
        f"{(1 - CONFIDENCE) * len(rows):.0f} would.",
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
    """How much of a gain is the choice itself: Taylor criteria and as many random masks, both chosen from."""
    families = {
        "Taylor": [f"{criterion} ne={ne}" for ne in NES for criterion in TAYLOR],
        "random": [name for ne in NES for name in random_masks(ne)],
    }
    lora, rows, means = accuracies(records, ["LoRA"]), [], {}
    for by in ("val", "test"):
        for family, settings in families.items():
            means[by, family] = best_of(records, settings, by)
            found = difference(means[by, family], lora)
            if found is not None:
                rows.append(TableRow(f"best of {len(settings)}, chosen on {by}", f"{family} − LoRA", _cells(found)))
        found = difference(means[by, "Taylor"], means[by, "random"])
        if found is not None:
            rows.append(TableRow(f"best of {len(settings)}, chosen on {by}", "Taylor − random", _cells(found)))
    notes = [
        "Chosen anew for every task and seed, by the accuracy on validation images or, as the papers do, on test; test "
        "accuracy of what was chosen, minus LoRA's."
    ]
    return Table("How much of a gain is the choice itself?", _difference_columns(), rows, notes)


def early_table(records: Sequence[Record]) -> Table:
    """How early heads can be scored: against the scores after ten epochs."""
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
            cells = {
                "rank correlation": Cell(float(np.mean(correlations)), float(np.std(correlations, ddof=1))),
                "same head": Cell(float(np.mean(same))),
                "runs": Cell(len(correlations)),
            }
            rows.append(TableRow("scored after", label, cells))
    columns = [Column("rank correlation", "", 2), Column("same head", "", 2), Column("runs", "", 0)]
    notes = [
        "Spearman's correlation of the heads' scores with those after 10 epochs (mean and standard deviation over tasks "
        f"and seeds), and how often the same head comes last (by chance: {1 / NUM_HEADS:.2f})."
    ]
    return Table("How early can heads be scored?", columns, rows, notes)


def head_table(records: Sequence[Record]) -> Table:
    """Whether related tasks choose the same heads."""
    groups = {task.name: task.group for task in OFFLINE_TASKS}
    rows, notes = [], ["Jaccard index of the deactivated heads of two runs; expected: of heads drawn at random."]
    for ne in NES:
        for criterion in TAYLOR:
            setting = f"{criterion} ne={ne}"
            masks = masks_by_task(records, setting, NUM_HEADS)
            for overlap in overlaps(masks, groups):
                cells = {"overlap": Cell(overlap.observed), "expected": Cell(overlap.expected)}
                rows.append(TableRow(setting, overlap.kind, cells | {"pairs": Cell(overlap.pairs)}))
            p_value = group_p_value(masks, groups)
            if p_value is not None:
                notes.append(f"{setting}: groups drawn at random are as alike within with p = {p_value:.2g}")
    columns = [Column("overlap", "", 2), Column("expected", "", 2), Column("pairs", "", 0)]
    return Table("Are the same heads chosen for related tasks?", columns, rows, notes)


def evidence_tables(records: Sequence[Record]) -> dict[str, Table]:
    """`{file name: table}`, without those that have no rows."""
    tables = {
        "settings": setting_table(records),
        "comparisons": comparison_table(records),
        "choice": choice_table(records),
        "early": early_table(records),
        "heads": head_table(records),
    }
    return {name: table for name, table in tables.items() if table.rows}


def _difference_columns() -> list[Column]:
    names = ["difference", "from", "to"]
    return [*(Column(name, "", 2) for name in names), Column("pairs", "", 0)] + [
        Column(task.name, "by task", 1) for task in OFFLINE_TASKS
    ]


def _cells(found: Difference) -> dict[str, Cell]:
    cells = {"difference": Cell(found.mean), "from": Cell(found.low), "to": Cell(found.high)}
    return cells | {"pairs": Cell(found.pairs)} | {task: Cell(value) for task, value in found.by_task.items()}
