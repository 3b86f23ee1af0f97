"""Heat maps of head responsiveness and masks. Uses matplotlib's `Figure`, never pyplot, whose state is global."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch

from ..heads.protocol import deactivated_heads


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_head_scores(
    scores: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor] | None = None,
    *,
    joint: bool = True,
    title: str = "Head responsiveness",
) -> Figure:
    """A heat map, layers × heads, with the deactivated heads crossed out.

    Args:
        scores: `{module name: (num_heads,)}`.
        masks: `{module name: bool (num_heads,)}`, True = active.
        joint: One row per attention layer, the sum of its projections' scores; otherwise one row per projection.
        title: Title of the map.
    """
    from matplotlib.figure import Figure

    rows: dict[str, torch.Tensor] = {}
    off: dict[str, set[int]] = {}
    inactive = deactivated_heads(masks or {})
    for name, values in scores.items():
        row = name.rpartition(".")[0] if joint else name
        rows[row] = rows[row] + values if row in rows else values.clone()
        off.setdefault(row, set()).update(inactive.get(name, ()))

    num_heads = max(len(values) for values in rows.values())
    grid = torch.full((len(rows), num_heads), float("nan"), dtype=torch.float64)
    for index, values in enumerate(rows.values()):
        grid[index, : len(values)] = values

    figure = Figure(figsize=(3.2 + 0.4 * num_heads, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    crosses = [(head, index) for index, row in enumerate(rows) for head in sorted(off[row])]
    if crosses:
        axes.scatter(*zip(*crosses, strict=True), marker="x", color="red", s=60, linewidths=2)
    axes.set_xticks(range(num_heads))
    axes.set_yticks(range(len(rows)), labels=[_short(row) for row in rows], fontsize="small")
    axes.set_xlabel("head   (red cross: deactivated)" if crosses else "head")
    axes.set_title(title, loc="left")
    figure.colorbar(image, ax=axes, label="score")
    return figure


def figure_bytes(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _short(name: str) -> str:
    """The part of a name that tells rows apart: `layers.3` of `vit.layers.3.attention`."""
    parts = [part for part in name.split(".") if part not in ("attention", "self", "self_attn")]
    return ".".join(parts[-4:] if len(parts) > 4 else parts[1:]) or name
