"""The report of a selection: `head_scores.json`, and `head_scores.png` with the heat map."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict
from typing import Any

from transformers import TrainerState

from ..adapter_folder.score_files import HEAT_MAP_FILE, SCORES_FILE
from ..heads.protocol import deactivated_heads
from .cutting import CutReport
from .plotting import figure_bytes, plot_head_scores
from .scorer import HeadScorer


def report_files(scorer: HeadScorer, cut: CutReport, state: TrainerState) -> dict[str, bytes]:
    """The contents of both files, by file name.

    Args:
        scorer: The scorer that has selected the heads.
        cut: What it has selected, and by which scores.
        state: Trainer's state at the selection.
    """
    report = {
        "peft_heads_version": importlib.metadata.version("peft-heads"),
        "adapter": scorer.adapter_name,
        "step": state.global_step,
        "epoch": state.epoch,
        "window": {
            "first_step": cut.window.first,
            "last_step": cut.window.last,
            "steps_counted": cut.steps_counted,
            "steps_skipped": cut.steps_skipped,
        },
        **scorer.config.selection_settings,
        "degenerate": cut.degenerate,
        "deactivated_heads": deactivated_heads(cut.masks),
        "masks": {name: mask.tolist() for name, mask in cut.masks.items()},
        "scores": {c: {name: s.tolist() for name, s in by_name.items()} for c, by_name in cut.scores.items()},
        **_pruning(cut),
    }
    criterion = scorer.config.criterion
    shown = criterion if criterion in cut.scores else next(iter(cut.scores))
    figure = plot_head_scores(
        cut.scores[shown],
        cut.masks,
        joint=scorer.config.joint,
        title=f"Head responsiveness ({shown}), step {state.global_step}",
    )
    return {SCORES_FILE: json.dumps(report, indent=1).encode(), HEAT_MAP_FILE: figure_bytes(figure)}


def _pruning(cut: CutReport) -> dict[str, Any]:
    """What is reported where there are several cuts or neurons: of neurons their numbers alone."""
    report: dict[str, Any] = {}
    if cut.cuts > 1:
        report["cut"] = {"number": cut.number, "of": cut.cuts}
    if cut.neuron_masks:
        report["neurons"] = {
            name: {"deactivated": int((~mask).sum()), "of": len(mask)} for name, mask in cut.neuron_masks.items()
        }
        report["speed"] = cut.speed
    if cut.chosen is not None:
        report["chosen"] = asdict(cut.chosen)
    return report
