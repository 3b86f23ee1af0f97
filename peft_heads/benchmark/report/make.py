"""A report on results: tables (Markdown, CSV, LaTeX), figures, and the atlas of heads."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...scoring.plotting import figure_bytes
from ..records.plans import Choice, unfinished_choices
from ..records.run_record import Run
from .accuracy_tables import accuracy_table, cost_table, validation_table
from .atlas import plot_head_atlas
from .groups import suite_groups
from .overlap import group_p_value, overlaps
from .plots import (
    criterion_families,
    criterion_wins,
    plot_accuracy_against_ne,
    plot_accuracy_by_shots,
    plot_criterion_wins,
)
from .rows import Row, make_rows, row_labels
from .settings_notes import deviation_notes, settings_notes
from .tables import Cell, Column, Table, TableRow, to_csv, to_latex, to_markdown, to_text


FEW_TASKS = 5


def make_report(runs: Iterable[Run], suite: str, choices: Iterable[Choice] = ()) -> dict[str, str | bytes]:
    """The files of a report on one suite: `{file name: content}`, of which `report.md` shows all tables and figures.

    Args:
        runs: Runs of this suite, and perhaps of others.
        suite: Name of the suite.
        choices: Choices that the sweeps were to make; where runs are missing none is made, and the report says so.

    Raises:
        ValueError: None of the runs belongs to the suite.
    """
    runs = list(runs)
    own = [run for run in runs if run.spec.suite == suite]
    if not own:
        found = ", ".join(sorted({run.spec.suite for run in runs})) or "none at all"
        raise ValueError(f"there are no results of the suite {suite!r} (found: {found})")
    groups = suite_groups(suite, own)
    rows = make_rows(own)
    tested = [row for row in rows if row.is_test]
    notes, partly = unfinished_choices(choices, {run.spec.run_id for run in own})
    tables = {
        "accuracy": accuracy_table(rows, groups, f"{suite}: accuracy on test (%)", partly),
        "validation": validation_table(rows, groups, f"{suite}: accuracy on validation splits (%), for choosing"),
        "cost": cost_table(rows, f"{suite}: what it cost"),
        "overlap": overlap_table(tested or rows, groups, f"{suite}: are the deactivated heads alike?"),
    }
    figures = make_figures(tested or rows, groups)
    files: dict[str, str | bytes] = {}
    sections = [
        f"# Results on {suite}",
        settings_notes(rows, suite),
        _partial_note(own),
        "\n".join(f"- {note}" for note in notes),
    ]
    for name, table in tables.items():
        if table is not None:
            files |= {f"{name}.csv": to_csv(table), f"{name}.tex": to_latex(table)}
            sections.append(to_markdown(table))
    sections += [f"![{name}]({name}.png)" for name in figures]
    files |= {f"{name}.png": content for name, content in figures.items()}
    return {"report.md": "\n\n".join(filter(None, sections)).rstrip() + "\n"} | files


def summarize(runs: Iterable[Run], suite: str, choices: Iterable[Choice] = ()) -> str:
    """The accuracies for a terminal: the averages; the tasks as well, where they are few or no average is complete.

    Raises:
        ValueError: None of the runs belongs to the suite.
    """
    own = [run for run in runs if run.spec.suite == suite]
    if not own:
        raise ValueError(f"there are no results of the suite {suite!r}")
    groups = suite_groups(suite, own)
    _, partly = unfinished_choices(choices, {run.spec.run_id for run in own})
    rows = make_rows(own)
    table = accuracy_table(rows, groups, f"{suite}: accuracy on test (%)", partly)
    ours = [row.cells for row in table.rows if not row.section.startswith("Published")]
    filled = [c for c in table.columns if any(cells.get(c.name, Cell(None)).mean is not None for cells in ours)]
    tasks = [column for column in filled if column.name in groups]
    averages = [column for column in filled if column.name not in groups]
    few = len(tasks) <= FEW_TASKS or not any(column.group == "averages" for column in averages)
    return "\n".join([to_text(table, (tasks if few else []) + averages), *deviation_notes(rows, suite)])


def make_figures(rows: list[Row], groups: dict[str, str]) -> dict[str, bytes]:
    """`{name: PNG}` of all figures for which the rows have data."""
    figures = {}
    few_shot = [row for row in rows if row.settings["shots"] is not None]
    whole = [row for row in rows if row.settings["shots"] is None]
    for name, figure in (
        ("accuracy_against_ne", plot_accuracy_against_ne(whole, groups)),
        ("accuracy_by_shots", plot_accuracy_by_shots(few_shot, groups)),
    ):
        if figure is not None:
            figures[name] = figure_bytes(figure)
    wins = [found for family in criterion_families(whole) if sum((found := criterion_wins(family, groups)).values())]
    for index, found in enumerate(wins, 1):
        figures["criterion_wins" + (f"_{index}" if len(wins) > 1 else "")] = figure_bytes(plot_criterion_wins(found))
    for row, label in zip(rows, row_labels(rows), strict=True):
        figure = plot_head_atlas(row, groups, label)
        if figure is not None:
            figures[_unused(f"atlas_{_slug(label)}", figures)] = figure_bytes(figure)
    return figures


def overlap_table(rows: list[Row], groups: dict[str, str], title: str) -> Table | None:
    """The overlap of the deactivated heads within and between groups; None where no two runs deactivate any."""
    table_rows = []
    p_values = []
    for row, label in zip(rows, row_labels(rows), strict=True):
        masks = {task: [run.result.masks for run in row.runs[task].values()] for task in groups if task in row.runs}
        for overlap in overlaps(masks, groups):
            cells = {
                "pairs of runs": Cell(overlap.pairs),
                "overlap": Cell(overlap.observed),
                "expected at random": Cell(overlap.expected),
            }
            table_rows.append(TableRow(label, overlap.kind, cells))
        p_value = group_p_value(masks, groups)
        if p_value is not None:
            p_values.append(f"{label}: p = {p_value:.2g}")
    if not table_rows:
        return None
    notes = [
        "Overlap: Jaccard index of the deactivated heads of two runs, mean over projections and pairs of runs; "
        "expected: for as many heads drawn at random.",
        *(["p: how often groups drawn at random are as alike within as the real ones are."] if p_values else []),
        *p_values,
    ]
    columns = [Column("pairs of runs", "", 0), Column("overlap", "", 3), Column("expected at random", "", 3)]
    return Table(title, columns, table_rows, notes)


def _partial_note(runs: list[Run]) -> str:
    unofficial = sum(not run.official for run in runs)
    if not unofficial:
        return ""
    return f"**{unofficial} of {len(runs)} runs are unofficial** (uncommitted code, or partial); their rows say so."


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")[:80]


def _unused(name: str, taken: Iterable[str]) -> str:
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(candidate for candidate in names if candidate not in taken)
