"""The optimizer steps that are scored, and the one after which heads are selected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


WINDOWS = ("last_epoch", "all", "last_step")


@dataclass(frozen=True)
class SelectionWindow:
    """The steps at which heads are scored and selected.

    Attributes:
        first: The first optimizer step that is scored, counted from 1.
        last: The last one; the heads are selected after it.
        asked: The user's request, as messages quote it.
    """

    first: int
    last: int
    asked: str


def check_window_arguments(select_at: float | None, warmup_epochs: float | None, window: str) -> None:
    """Raise ValueError for arguments of `TaylorHeadScorer` that no training could fit."""
    if select_at is not None and warmup_epochs is not None:
        raise ValueError(
            f"give select_at or warmup_epochs, not both; got select_at={select_at}, warmup_epochs={warmup_epochs}"
        )
    # written so that nan is refused as well
    if select_at is not None and not (0 < select_at < 1 or (select_at >= 1 and float(select_at).is_integer())):
        raise ValueError(f"select_at is a share of the steps, in (0, 1), or a whole number of steps; got {select_at}")
    if warmup_epochs is not None and not 0 < warmup_epochs < math.inf:
        raise ValueError(f"warmup_epochs must be positive; got {warmup_epochs}")
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}; got {window!r}")


def plan_window(
    *,
    select_at: float | None,
    warmup_epochs: float | None,
    window: str,
    max_steps: int,
    steps_per_epoch: int | None,
) -> SelectionWindow:
    """The window that `TaylorHeadScorer`'s arguments ask for.

    Args:
        select_at: Argument of `TaylorHeadScorer`; one of this and `warmup_epochs` is None.
        warmup_epochs: Argument of `TaylorHeadScorer`.
        window: One of `WINDOWS`.
        max_steps: Number of optimizer steps of the training.
        steps_per_epoch: Number of optimizer steps of an epoch; None if unknown.

    Raises:
        ValueError: The selection comes after the end of training, or needs the length of an epoch and that is unknown.
    """
    needs = "warmup_epochs" if warmup_epochs is not None else "window='last_epoch'"
    if steps_per_epoch is None and (warmup_epochs is not None or window == "last_epoch"):
        raise ValueError(
            f"{needs} needs the length of an epoch, which is unknown for this training dataset; give select_at "
            "in steps (select_at=500) and window='all' or 'last_step'"
        )
    if warmup_epochs is not None:
        last = _whole_steps(warmup_epochs * steps_per_epoch)
        asked = f"warmup_epochs={warmup_epochs} of {steps_per_epoch} steps"
    else:
        last = _whole_steps(select_at * max_steps) if select_at < 1 else int(select_at)
        asked = f"select_at={select_at}"
    if last > max_steps:
        raise ValueError(
            f"{asked} selects heads at step {last}, after the end of training at step {max_steps}; select "
            "earlier or train longer"
        )
    length = {"last_epoch": steps_per_epoch, "all": last, "last_step": 1}[window]
    return SelectionWindow(max(1, last - length + 1), last, asked)


def steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Number of optimizer steps of an epoch, as Trainer counts them; None for a dataset of unknown length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def _whole_steps(steps: float) -> int:
    """Round up as TrainingArguments does, but read 0.28 of 25 steps (7.000000000000001) as 7."""
    return max(1, math.ceil(round(steps, 6)))
