"""An atlas of attention heads: which are deactivated in which task, and how much they respond."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import Groups, new_figure
from .rows import Row


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def head_atlas(row: Row, groups: Groups) -> dict[int, dict[str, Any]]:
    """For every number of heads per projection: how often each head is deactivated in each task, and how it ranks.

    Returns:
        `{num_heads: {"tasks": names, "off": (tasks, num_heads), "rank": the same or None}}`. `off` is the share of
        seeds and projections in which the head is deactivated. `rank` is the rank of its score, summed over
        projections, from 0 (the least responsive head) to 1, as the mean over seeds.
    """
    found: dict[int, dict[str, dict[str, list[np.ndarray]]]] = {}
    for task in (task for task in groups if task in row.runs):
        for run in row.runs[task].values():
            for mask in run.result.masks.values():
                entry = found.setdefault(len(mask), {}).setdefault(task, {"off": [], "rank": []})
                entry["off"].append(1 - np.array(mask, dtype=float))
            for num_heads, scores in _summed_scores(run.result.head_scores or {}).items():
                if num_heads in found and task in found[num_heads]:
                    found[num_heads][task]["rank"].append(_ranks(scores))
    atlas = {}
    for num_heads, tasks in sorted(found.items()):
        ranked = all(entry["rank"] for entry in tasks.values())
        atlas[num_heads] = {
            "tasks": list(tasks),
            "off": np.array([np.mean(entry["off"], axis=0) for entry in tasks.values()]),
            "rank": np.array([np.mean(entry["rank"], axis=0) for entry in tasks.values()]) if ranked else None,
        }
    return atlas


def plot_head_atlas(row: Row, groups: Groups, title: str) -> Figure | None:
    """Heat maps of tasks × heads, with lines between groups; None where no head of the row is deactivated."""
    atlas = head_atlas(row, groups)
    if not any(part["off"].any() for part in atlas.values()):
        return None
    panels = [
        (num_heads, key, label, part)
        for num_heads, part in atlas.items()
        for key, label in (("off", "deactivated (share)"), ("rank", "responsiveness (rank)"))
        if part[key] is not None
    ]
    height = max(len(part["tasks"]) for part in atlas.values())
    figure = new_figure(2 + sum(1.6 + 0.25 * num_heads for num_heads, *_ in panels), 1.6 + 0.28 * height)
    ratios = [6 + num_heads for num_heads, *_ in panels]
    for axes, (num_heads, key, label, part) in zip(
        figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0], panels, strict=True
    ):
        colours = {"off": "Reds", "rank": "viridis"}[key]
        image = axes.imshow(part[key], aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        names = [groups[task] for task in part["tasks"]]
        for index in (i for i in range(1, len(names)) if names[i] != names[i - 1]):
            axes.axhline(index - 0.5, color="black", linewidth=1)
        axes.set_xticks(range(num_heads), labels=map(str, range(num_heads)), fontsize="x-small")
        axes.set_yticks(range(len(names)), labels=part["tasks"], fontsize="small")
        axes.set_xlabel(f"head (of {num_heads})")
        axes.set_title(label, fontsize="small")
        figure.colorbar(image, ax=axes)
    figure.suptitle(title, fontsize="medium")
    return figure


def _summed_scores(scores: Mapping[str, list[float | None]]) -> dict[int, np.ndarray]:
    """`{num_heads: scores summed over the projections with as many heads}`."""
    summed: dict[int, np.ndarray] = {}
    for values in scores.values():
        values = np.array([np.nan if value is None else value for value in values], dtype=float)
        summed[len(values)] = summed.get(len(values), 0) + values
    return summed


def _ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the lowest score to 1 for the highest."""
    return np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(len(scores) - 1, 1)
