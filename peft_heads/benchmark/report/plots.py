"""Figures of accuracies: against ne, by criterion, by shots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..records.run_record import describe_method
from ..records.schema import canonical_json
from .averages import averages_over_seeds, mean_and_std
from .choices import VARIANTS
from .rows import Row, common_and_own


if TYPE_CHECKING:
    from matplotlib.figure import Figure


NO_WIN = "none better than ne = 0"
Groups = Mapping[str, str]


def plot_accuracy_against_ne(rows: list[Row], groups: Groups) -> Figure | None:
    """One panel per task and one for the average, a line per criterion (and other setting); None without two `ne`.

    A setting with `ne = 0`, for which the criterion does not matter, is a dashed line.
    """
    rows = [row for row in rows if isinstance(row.method.get("ne"), int)]
    if len({row.method["ne"] for row in rows}) < 2:
        return None
    lines: dict[str, list[tuple[float, Row]]] = {}
    plain: dict[str, list[tuple[float, Row]]] = {}
    for row, label in zip(rows, _line_labels(rows, without=("ne",)), strict=True):
        if row.method["ne"]:
            lines.setdefault(label, []).append((row.method["ne"], row))
    without_heads = [row for row in rows if not row.method["ne"]]
    for row, label in zip(without_heads, _line_labels(without_heads, without=("ne", "criterion")), strict=True):
        plain.setdefault("ne = 0" if len(without_heads) == 1 else f"ne = 0, {label}", []).append((0, row))
    title = "Accuracy (%) against the number of deactivated heads (ne), mean ± std over seeds"
    return _line_panels(lines, groups, title, dashed=plain)


def plot_accuracy_by_shots(rows: list[Row], groups: Groups) -> Figure | None:
    """One panel per data set and one for their mean, with a line per method; None without few-shot rows."""
    rows = [row for row in rows if row.settings["shots"] is not None]
    if not rows:
        return None
    lines: dict[str, list[tuple[float, Row]]] = {}
    for row, label in zip(rows, _line_labels(rows, without=(), apart=("shots",)), strict=True):
        lines.setdefault(label, []).append((row.settings["shots"], row))
    return _line_panels(lines, groups, "Accuracy (%) by images per class, mean ± std over seeds", log=True)


def criterion_wins(rows: list[Row], groups: Groups) -> dict[str, float]:
    """The number of tasks on which each criterion reaches the best accuracy, with any of its `ne` and scales.

    Only tasks count on which every criterion was run. A tie is shared. Where no criterion is better than the rows with
    `ne = 0`, none wins.

    Returns:
        `{criterion: tasks}`, with NO_WIN where there are rows with `ne = 0`; empty for fewer than two criteria.
    """
    candidates: dict[str, list[Row]] = {}
    for row in rows:
        if row.method.get("ne") != 0 and "criterion" in row.method:
            candidates.setdefault(row.method["criterion"], []).append(row)
    plain = [row for row in rows if row.method.get("ne") == 0]
    if len(candidates) < 2:
        return {}
    wins = dict.fromkeys([*sorted(candidates), *([NO_WIN] if plain else [])], 0.0)
    for task in groups:
        best = {criterion: _best(found, task) for criterion, found in candidates.items()}
        if None in best.values():
            continue
        top, baseline = max(best.values()), _best(plain, task)
        if baseline is not None and top <= baseline:
            wins[NO_WIN] += 1
            continue
        winners = [criterion for criterion, accuracy in best.items() if accuracy == top]
        for criterion in winners:
            wins[criterion] += 1 / len(winners)
    return wins


def criterion_families(rows: list[Row]) -> list[list[Row]]:
    """Families of head-masked rows that differ in nothing but criterion, `ne`, scale and the like."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        if "criterion" in row.method:
            method = {name: value for name, value in row.method.items() if name not in VARIANTS}
            families.setdefault(canonical_json(row.settings | {"method": method}), []).append(row)
    return list(families.values())


def plot_criterion_wins(wins: Mapping[str, float]) -> Figure:
    """The counts of `criterion_wins` as bars."""
    figure = new_figure(5.5, 0.9 + 0.4 * len(wins))
    axes = figure.subplots()
    bars = axes.barh(range(len(wins)), list(wins.values()))
    axes.bar_label(bars, [f"{value:g}" for value in wins.values()], padding=3)
    axes.set_yticks(range(len(wins)), labels=list(wins))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("tasks")
    axes.set_title(f"Best criterion ({sum(wins.values()):g} tasks)", loc="left")
    return figure


def _line_panels(
    lines: dict[str, list[tuple[float, Row]]],
    groups: Groups,
    title: str,
    dashed: Mapping[str, list[tuple[float, Row]]] | None = None,
    log: bool = False,
) -> Figure:
    """A panel for each task and for the average: `lines` over their x, and `dashed` as horizontal lines."""
    dashed = dashed or {}
    every = [row for points in [*lines.values(), *dashed.values()] for _, row in points]
    series = {id(row): _figures_of(row, groups) for row in every}
    panels = [
        name
        for name in [*groups, "mean of group means", "mean of tasks"]
        if any(series[id(row)].get(name, (None,))[0] is not None for row in every)
    ]
    columns = min(4, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.2 * columns + 0.6, 2.4 * num_rows + 0.9)
    grid = figure.subplots(num_rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    colours = {label: f"C{index % 10}" for index, label in enumerate([*lines, *dashed])}
    handles: dict[str, Any] = {}
    for axes, name in zip(grid.flat, panels, strict=False):
        for label, points in lines.items():
            known = [
                (x, *series[id(row)][name]) for x, row in points if series[id(row)].get(name, (None,))[0] is not None
            ]
            if known:
                x, mean, std = zip(*sorted(known, key=lambda point: point[0]), strict=True)
                error = [deviation or 0 for deviation in std]
                handles[label] = axes.errorbar(
                    x, mean, yerr=error, marker="o", markersize=3, capsize=2, color=colours[label]
                )
        for label, points in dashed.items():
            mean = series[id(points[0][1])].get(name, (None,))[0]
            if mean is not None:
                handles[label] = axes.axhline(mean, linestyle="--", linewidth=1, color=colours[label])
        ticks = sorted({x for points in lines.values() for x, _ in points})
        if log:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.set_title(name, fontsize="small")
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _figures_of(row: Row, groups: Groups) -> dict[str, tuple[float | None, float | None]]:
    samples = row.samples()
    tasks = {task: mean_and_std(list(seeds.values())) for task, seeds in samples.items()}
    return tasks | averages_over_seeds(samples, groups)


def _line_labels(rows: list[Row], without: tuple[str, ...], apart: tuple[str, ...] = ()) -> list[str]:
    """Labels that tell the rows apart, without the method's settings in `without` and other settings in `apart`."""
    stripped = [
        Row({**row.settings, "method": {k: v for k, v in row.method.items() if k not in without}}, row.runs)
        for row in rows
    ]
    if not stripped:
        return []
    _, own = common_and_own(stripped, apart=("method", *apart))
    return [
        ", ".join([_short_method(row.method, stripped), *(f"{name}={value}" for name, value in settings.items())])
        for row, settings in zip(stripped, own, strict=True)
    ]


def _short_method(method: dict[str, Any], rows: list[Row]) -> str:
    """The method without the settings that all rows share."""
    shared = {
        name
        for name, value in method.items()
        if all(name in row.method and canonical_json(row.method[name]) == canonical_json(value) for row in rows)
    }
    own = {name: value for name, value in method.items() if name not in shared or name == "name"}
    text = describe_method(own)
    return text.partition(" ")[2] if "name" in shared and len(own) > 1 else text


def _best(rows: list[Row], task: str) -> float | None:
    means = [mean for row in rows if (mean := row.mean(task)) is not None]
    return max(means, default=None)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches; not pyplot's, whose state is global."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
