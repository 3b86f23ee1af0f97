"""The optimizer steps that are scored, and the one after which heads are selected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from .cuts import plan_cuts


WINDOWS = ("last_epoch", "all", "last_step")
# Time of the last of several cuts where none is given: half of training, so that the other half recovers.
LAST_CUT = 0.5


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


def check_schedule(
    select_at: float | None, warmup_epochs: float | None, window: str, cuts: int, last_cut: float | None
) -> None:
    """Raise ValueError for arguments of `TaylorHeadScorer` that say when, and that no training could fit."""
    check_window_arguments(select_at, warmup_epochs, window)
    check_cut_arguments(cuts, last_cut)


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


def check_cut_arguments(cuts: int, last_cut: float | None) -> None:
    """Raise ValueError for arguments of `TaylorHeadScorer` that make no schedule of cuts."""
    if isinstance(cuts, bool) or not isinstance(cuts, int) or cuts < 1:
        raise ValueError(
            f"cuts is the number of times that units are switched off, an integer of at least 1; got {cuts!r}"
        )
    if last_cut is not None and cuts == 1:
        raise ValueError(f"last_cut={last_cut} needs several cuts; pass cuts=2 or more, or leave last_cut out")
    if last_cut is not None and not (0 < last_cut < 1 or (last_cut >= 1 and float(last_cut).is_integer())):
        raise ValueError(f"last_cut is a share of the steps, in (0, 1), or a whole number of steps; got {last_cut}")


def plan_windows(
    *,
    select_at: float | None,
    warmup_epochs: float | None,
    window: str,
    cuts: int,
    last_cut: float | None,
    max_steps: int,
    steps_per_epoch: int | None,
) -> list[SelectionWindow]:
    """The windows of all cuts: a later one begins after the cut before it.

    Args:
        select_at, warmup_epochs, window, max_steps, steps_per_epoch: As in `plan_window`, for the first cut.
        cuts: Number of cuts.
        last_cut: Time of the last one: below 1 a share of the steps, else a step; half of training if None.

    Raises:
        ValueError: As `plan_window` does; or there are more cuts than steps, or the last one comes after the end.
    """
    given = {"select_at": select_at, "warmup_epochs": warmup_epochs, "window": window}
    windows = [plan_window(**given, max_steps=max_steps, steps_per_epoch=steps_per_epoch)]
    last_cut = LAST_CUT if last_cut is None else last_cut
    last = _whole_steps(last_cut * max_steps) if last_cut < 1 else int(last_cut)
    if cuts > 1 and last > max_steps:
        raise ValueError(
            f"last_cut={last_cut} is after the end of training at step {max_steps}; cut earlier or train longer"
        )
    steps = plan_cuts(windows[0].last, last, cuts)
    for number, step in enumerate(steps[1:], 2):
        begin = max(windows[-1].last, step - _length(window, step, steps_per_epoch)) + 1
        windows.append(SelectionWindow(begin, step, f"cut {number} of {cuts}"))
    return windows


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
    return SelectionWindow(max(1, last - _length(window, last, steps_per_epoch) + 1), last, asked)


def steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int | None:
    """Number of optimizer steps of an epoch, as Trainer counts them; None for a dataset of unknown length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def _length(window: str, last: int, steps_per_epoch: int | None) -> int:
    """Number of steps of a window that ends with a step."""
    return {"last_epoch": steps_per_epoch, "all": last, "last_step": 1}[window]


def _whole_steps(steps: float) -> int:
    """Round up as TrainingArguments does, but read 0.28 of 25 steps (7.000000000000001) as 7."""
    return max(1, math.ceil(round(steps, 6)))
