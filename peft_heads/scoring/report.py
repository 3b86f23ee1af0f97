"""The report of a selection: `head_scores.json`, and `head_scores.png` with the heat map."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import torch
from transformers import TrainerState

from ..adapter_folder.score_files import HEAT_MAP_FILE, SCORES_FILE
from ..heads.protocol import deactivated_heads
from .plotting import figure_bytes, plot_head_scores
from .scorer import HeadScorer


def report_files(
    scorer: HeadScorer,
    progress: dict[str, Any],
    state: TrainerState,
    scores: dict[str, dict[str, torch.Tensor]],
    masks: dict[str, torch.Tensor],
    degenerate: bool,
) -> dict[str, bytes]:
    """The contents of both files, by file name.

    Args:
        scorer: The scorer that has selected the heads.
        progress: `TaylorHeadScorer.progress`.
        state: Trainer's state at the selection.
        scores: `{criterion: {projection: (num_heads,)}}`.
        masks: `{projection: bool (num_heads,)}`, True = active.
        degenerate: Whether in some group all heads had the same score, so that their order alone has decided.
    """
    report = {
        "peft_heads_version": importlib.metadata.version("peft-heads"),
        "adapter": scorer.adapter_name,
        "step": state.global_step,
        "epoch": state.epoch,
        "window": {
            "first_step": progress["first_step"],
            "last_step": progress["select_step"],
            "steps_counted": scorer.num_steps,
            "steps_skipped": scorer.num_skipped,
        },
        **scorer.config.selection_settings,
        "degenerate": degenerate,
        "deactivated_heads": deactivated_heads(masks),
        "masks": {name: mask.tolist() for name, mask in masks.items()},
        "scores": {c: {name: s.tolist() for name, s in by_name.items()} for c, by_name in scores.items()},
    }
    criterion = scorer.config.criterion
    shown = criterion if criterion in scores else next(iter(scores))
    figure = plot_head_scores(
        scores[shown],
        masks,
        joint=scorer.config.joint,
        title=f"Head responsiveness ({shown}), step {state.global_step}",
    )
    return {SCORES_FILE: json.dumps(report, indent=1).encode(), HEAT_MAP_FILE: figure_bytes(figure)}
