"""The scores that have led to an adapter's masks, and their heat map, beside its weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..heads.protocol import deactivated_heads
from .atomic import write_atomically


if TYPE_CHECKING:
    import torch

SCORES_FILE, HEAT_MAP_FILE = "head_scores.json", "head_scores.png"


def write_head_scores(folder: str | os.PathLike, head_scores: dict[str, bytes]) -> None:
    """Write scores and heat map, by file name, into a folder."""
    for name, content in head_scores.items():
        write_atomically(Path(folder) / name, content)


def read_head_scores(folder: str | os.PathLike) -> dict[str, bytes]:
    """Scores and heat map that an earlier run has written into `folder`, by file name; empty unless both are there."""
    paths = [Path(folder) / name for name in (SCORES_FILE, HEAT_MAP_FILE)]
    return {path.name: path.read_bytes() for path in paths} if all(path.exists() for path in paths) else {}


def led_to(report: bytes | None, settings: dict[str, Any], masks: dict[str, torch.Tensor]) -> bool:
    """Whether the scores of `head_scores.json` are those by which masks were selected.

    Args:
        report: Contents of the file; None if there is none.
        settings: How the heads were selected, by the configuration's fields.
        masks: The masks.
    """
    try:
        report = json.loads(report or "{}")
        # earlier versions noted fewer settings
        same_settings = all(report.get(name, value) == value for name, value in settings.items())
        return same_settings and report["deactivated_heads"] == deactivated_heads(masks)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # not a file of ours
