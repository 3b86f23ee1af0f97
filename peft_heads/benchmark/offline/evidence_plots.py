"""Figures of the offline suite's evidence. They are made by matplotlib's `Figure`; pyplot's state is global."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ..report.tables import Table
from .evidence_tables import FOR_SCALE


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_differences(table: Table, sections: Sequence[str] | None = None) -> Figure:
    """Differences and their intervals, one line each, section by section; the dots are the means of the tasks.

    Args:
        table: Table of `evidence_tables.comparison_table` or `choice_table`.
        sections: Beginnings of the titles of the sections to plot. Default: all but `FOR_SCALE`, which has a wider
            range.

    Raises:
        ValueError: No row belongs to them.
    """
    from matplotlib.figure import Figure

    rows = [
        row
        for row in table.rows
        if (row.section != FOR_SCALE if sections is None else row.section.startswith(tuple(sections)))
    ]
    if not rows:
        raise ValueError(
            f"{table.title}: there are no rows of {', '.join(sections or ())}; sections: "
            f"{', '.join(dict.fromkeys(row.section for row in table.rows))}"
        )
    tasks = [column.name for column in table.columns if column.group == "by task"]
    found = [(section, list(members)) for section, members in groupby(rows, key=lambda row: row.section)]
    heights = [len(members) for _, members in found]
    figure = Figure(figsize=(8, 0.8 + 0.27 * sum(heights) + 0.5 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False, height_ratios=[h + 0.6 for h in heights])[:, 0]
    for axes, (section, members) in zip(panels, found, strict=True):
        for place, row in enumerate(members):
            mean, low, high = (row.cells[name].mean for name in ("difference", "from", "to"))
            clear = low > 0 or high < 0
            axes.errorbar(
                mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="C3" if clear else "C0", capsize=3
            )
            of_tasks = [row.cells[task].mean for task in tasks if task in row.cells]
            axes.plot(of_tasks, [place] * len(of_tasks), ".", color="0.65", markersize=4, zorder=0)
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_yticks(range(len(members)), [row.label for row in members], fontsize="small")
        axes.set_ylim(len(members) - 0.4, -0.6)
        axes.set_title(section, loc="left", fontsize="small")
    panels[-1].set_xlabel("difference of test accuracies in percentage points")
    return figure
