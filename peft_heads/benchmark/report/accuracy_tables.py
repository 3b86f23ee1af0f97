"""The tables of a report: accuracies as in the papers, and costs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from .averages import averages_over_seeds, mean_and_std
from .choices import SCALE, VARIANTS, best_on_test, best_on_validation
from .groups import ONE_GROUP
from .published import PublishedRow, disagreements, published_rows
from .rows import Row, common_and_own, row_labels
from .tables import Cell, Column, Table, TableRow


Groups = Mapping[str, str]

SIZE, PARAMETERS, PRINTED = "size (MB)", "parameters (M)", "average as printed"

# The papers' name of an architecture, by the name of its repository or folder.
BACKBONES = {
    r"vit[-_](mae[-_])?(b|base)[-_/]?(patch)?16(?!\d)": "ViT-B/16",
    r"vit[-_](mae[-_])?(l|large)[-_/]?(patch)?16(?!\d)": "ViT-L/16",
    r"vit[-_](mae[-_])?(h|huge)[-_/]?(patch)?14(?!\d)": "ViT-H/14",
    r"swin[-_](b|base)(?![a-z])": "Swin-B",
}
CHECKPOINTS = {r"\bmae\b": ("MAE",), r"moco": ("MoCo v3",), "": ("ImageNet-21k", "ImageNet-21k, AugReg")}


def accuracy_table(rows: list[Row], groups: Groups, title: str, partly: Collection[str] = ()) -> Table:
    """Our rows on test, the rows chosen per task, and the published rows.

    Args:
        rows: Rows of `make_rows`, of one suite.
        groups: `{task: group}` of its tasks.
        title: Title of the table.
        partly: Ids of runs by which nothing may be chosen, see `plans.unfinished_choices`.
    """
    tested = [row for row in rows if row.is_test]
    by_scale = best_on_validation(rows, SCALE, partly)
    by_all = best_on_validation(rows, VARIANTS, partly)
    chosen = by_scale + [row for row in by_all if not _same_runs(row, by_scale)]
    on_test = best_on_test(rows)
    # runs whose scale was chosen are in the rows that say so; by scale, each row would have only some of the tasks
    shown = _runs(by_scale)
    rest = [row for row in tested if not _runs([row]) <= shown]
    table_rows = [
        *_our_rows("This package, last epoch", rest, groups),
        *_our_rows("This package, chosen per task on validation", chosen, groups),
        *_our_rows("Not a result: chosen on test", on_test, groups),
        *_best_epoch_rows("Not a result: best epoch on test", tested, groups),
    ]
    notes = [*row_notes(tested, groups), *_choice_notes([*chosen, *on_test], groups)]
    published = published_for(rows)
    for row in published:
        table_rows.append(published_table_row(row, groups))
    if published:
        notes += _published_notes(published, groups)
    extra = [SIZE, PARAMETERS, *([PRINTED] if published else [])]
    return Table(title, [*accuracy_columns(groups), *(Column(name, "", 2) for name in extra)], table_rows, notes)


def validation_table(rows: list[Row], groups: Groups, title: str) -> Table | None:
    """The rows on validation splits, by which settings are chosen; None where there are none."""
    rows = [row for row in rows if not row.is_test]
    if not rows:
        return None
    return Table(title, accuracy_columns(groups), _our_rows("This package", rows, groups), row_notes(rows, groups))


def cost_table(rows: list[Row], title: str) -> Table:
    """Sizes, seconds and memory: means over all runs of a row."""
    columns = {
        "runs": (0, lambda run: None),
        "trained parameters (M)": (3, lambda run: run.result.trained_parameters / 1e6),
        "adapter (MB)": (3, lambda run: run.result.adapter_bytes / 2**20),
        "classification head (MB)": (3, lambda run: run.result.head_bytes / 2**20),
        "seconds per run": (1, lambda run: run.result.seconds),
        "peak memory (GB)": (2, lambda run: run.result.peak_memory_bytes and run.result.peak_memory_bytes / 2**30),
    }
    table_rows = []
    for row, label in zip(rows, row_labels(rows), strict=True):
        runs = [run for seeds in row.runs.values() for run in seeds.values()]
        cells = {}
        for name, (_, value) in columns.items():
            values = [value(run) for run in runs]
            cells[name] = Cell(None if None in values else mean_and_std(values)[0])
        table_rows.append(TableRow("mean over the runs of a row", label, cells | {"runs": Cell(len(runs))}))
    devices = Counter(run.environment.device for row in rows for seeds in row.runs.values() for run in seeds.values())
    notes = [
        "MB and GB are 2^20 and 2^30 bytes.",
        "Devices: " + ", ".join(f"{k} ({n} runs)" for k, n in devices.items()),
    ]
    return Table(title, [Column(name, "", decimals) for name, (decimals, _) in columns.items()], table_rows, notes)


def accuracy_columns(groups: Groups) -> list[Column]:
    """One column per task under its group, then the averages, each under its own name."""
    tasks = [Column(task, "" if group == ONE_GROUP else group) for task, group in groups.items()]
    names = dict.fromkeys(groups.values()) if len(set(groups.values())) > 1 else ()
    overall = ["mean of group means", "mean of tasks"] if names else ["mean of tasks"]
    return tasks + [Column(name, "averages", 2) for name in (*names, *overall)]


def published_for(rows: Iterable[Row]) -> list[PublishedRow]:
    """The published rows of the suites and backbones of our rows."""
    wanted = {(row.settings["suite"], *papers_name(row.settings["backbone"])) for row in rows}
    found = [
        row
        for suite in sorted({suite for suite, *_ in wanted})
        for row in published_rows(suite)
        if any(
            (suite, row.backbone) == (of, name) and row.checkpoint in checkpoints for of, name, checkpoints in wanted
        )
    ]
    return sorted(found, key=lambda row: row.backbone)


def papers_name(backbone: str) -> tuple[str | None, tuple[str, ...]]:
    """`(the papers' name of the architecture or None, names of checkpoints to compare with)`."""
    name = backbone.lower()
    architecture = next((value for pattern, value in BACKBONES.items() if re.search(pattern, name)), None)
    return architecture, next(value for pattern, value in CHECKPOINTS.items() if re.search(pattern, name))


def published_table_row(row: PublishedRow, groups: Groups) -> TableRow:
    """A published row: its averages recomputed, and its own average as printed."""
    note = f" [{row.note}]" if row.note else ""
    checkpoint = "" if row.checkpoint == "ImageNet-21k" else f", {row.checkpoint}"
    cells = {name: Cell(value) for name, value in (row.tasks | row.recomputed(dict(groups))).items()}
    own = {SIZE: Cell(row.size_mb), PARAMETERS: Cell(row.parameters_m), PRINTED: Cell(row.average)}
    return TableRow(f"Published, {row.backbone}", f"{row.method}{note} ({row.source}{checkpoint})", cells | own)


def row_notes(rows: list[Row], groups: Groups) -> list[str]:
    """Notes on what the rows share, on their seeds, on missing tasks, and on library versions."""
    if not rows:
        return ["There are no such runs."]
    common, _ = common_and_own(rows, apart=("method", "suite", "official"))
    notes = [
        "All rows: " + ", ".join(f"{name} {_words(value)}" for name, value in common.items() if value is not None)
    ]
    labels = row_labels(rows)
    notes += _seed_notes(rows, labels)
    for row, label in zip(rows, labels, strict=True):
        if missing := [task for task in groups if task not in row.runs]:
            text = "every task" if len(missing) == len(groups) else ", ".join(missing)
            notes.append(f"Missing, so there is no average over it: {label}: {text}")
        notes += [f"{label}: {note}" for note in row.notes]
    versions: dict[str, list[str]] = {}
    for run in (run for row in rows for seeds in row.runs.values() for run in seeds.values()):
        found = run.environment.versions | {"commit": (run.environment.commit or "none (installed package)")[:24]}
        for name, version in found.items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    notes.append("Versions: " + ", ".join(f"{name} {' / '.join(found)}" for name, found in versions.items()))
    return notes


def _runs(rows: list[Row]) -> set[str]:
    return {run.spec.run_id for row in rows for seeds in row.runs.values() for run in seeds.values()}


def _our_rows(section: str, rows: list[Row], groups: Groups) -> list[TableRow]:
    table_rows = []
    for row, label in zip(rows, row_labels(rows), strict=True):
        runs = [run.result for seeds in row.runs.values() for run in seeds.values()]
        cells = _accuracy_cells(row.samples(), groups)
        cells[SIZE] = Cell(mean_and_std([result.adapter_bytes / 2**20 for result in runs])[0])
        cells[PARAMETERS] = Cell(mean_and_std([result.trained_parameters / 1e6 for result in runs])[0])
        table_rows.append(TableRow(section, label, cells))
    return table_rows


def _best_epoch_rows(section: str, rows: list[Row], groups: Groups) -> list[TableRow]:
    table_rows = []
    for row, label in zip(rows, row_labels(rows), strict=True):
        samples = {task: seeds for task, seeds in row.samples(best_on_test=True).items() if seeds}
        if samples:
            label = f"{label}, best epoch per run, chosen on test"
            table_rows.append(TableRow(section, label, _accuracy_cells(samples, groups)))
    return table_rows


def _accuracy_cells(samples: dict[str, dict[tuple, float]], groups: Groups) -> dict[str, Cell]:
    cells = {task: Cell(*mean_and_std(list(seeds.values()))) for task, seeds in samples.items()}
    return cells | {name: Cell(*value) for name, value in averages_over_seeds(samples, groups).items()}


def _seed_notes(rows: list[Row], labels: list[str]) -> list[str]:
    def words(seeds: set[tuple]) -> str:
        if all(list_seed == 0 for list_seed, _ in seeds):
            return "seeds " + ", ".join(str(seed) for _, seed in sorted(seeds))
        return "list/seed " + ", ".join(f"{list_seed}/{seed}" for list_seed, seed in sorted(seeds))

    cells = [Counter(words(seeds) for seeds in row.seeds().values()) for row in rows]
    usual = sum(cells, Counter()).most_common(1)[0][0] if any(cells) else "no seeds"
    return [
        f"Mean ± std over {usual}, where nothing else is said; a single seed has no std.",
        *(
            f"{label}: " + "; ".join(f"{words} ({number} tasks)" for words, number in cell.items())
            for label, cell in zip(labels, cells, strict=True)
            if set(cell) - {usual}
        ),
    ]


def _choice_notes(rows: list[Row], groups: Groups) -> list[str]:
    notes = []
    for row in rows:
        chosen = "; ".join(f"{task}: {row.choices[task]}" for task in groups if task in row.choices)
        notes.append(f"{row.label} ({'; '.join(row.notes)}): {chosen}")
    return notes


def _published_notes(published: list[PublishedRow], groups: Groups) -> list[str]:
    notes = [
        "Published rows: typed in from the papers' tables; averages are recomputed from the row's figures (rows without "
        f"tasks: from the group means). '{PRINTED}' is a mean of group means in HEAT, Heart-LoRA and SynQT, a mean of "
        "tasks in RLRR.",
        f"{SIZE}: the adapter alone, in 2^20 bytes as in the papers. {PARAMETERS}: our rows and RLRR's with the "
        "classification head.",
    ]
    if any(row.paper == "HEAT" for row in published):
        notes.append(
            "HEAT's and Heart-LoRA's 77.2 is the best of all variants per task, chosen on test: only our row of that "
            "label compares with it. A fixed setting compares with HEAT, Table 4."
        )
    for item in disagreements(published[0].suite, dict(groups)):
        if item.row in published:
            notes.append(
                f"{item.row.method} ({item.row.source}): the {item.name} is printed as {item.printed}, but its figures "
                f"give {item.recomputed:.2f}"
            )
    return notes


def _same_runs(row: Row, others: list[Row]) -> bool:
    return any(row.runs == other.runs and row.choices == other.choices for other in others)


def _words(value: object) -> str:
    return "none" if value in (None, {}, []) else str(value)
