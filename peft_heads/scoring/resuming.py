"""The scoring's entry in a checkpoint, and whether a resumed run may continue from it.

The entry of a checkpoint is `TaylorHeadScorer.progress` with the statistics so far: `first_step` and `select_step`
(the window), `selected_at` (None before the selection), `adapter`, `settings` and `scores`.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerState


def saved_progress(state: TrainerState, callback_name: str, adapter_name: str) -> dict[str, Any]:
    """Our entry in a checkpoint; empty without one. Trainer restores callbacks only on request, but loads their state.

    Args:
        state: Trainer's state, as loaded from the checkpoint.
        callback_name: The name under which the callback's state is saved: that of its class.
        adapter_name: The adapter that this run scores.

    Raises:
        ValueError: The checkpoint's entries are those of other adapters.
    """
    saved = state.stateful_callbacks.get(callback_name) or []
    saved = saved if isinstance(saved, list) else [saved]  # one entry per scorer, or more: Trainer appends
    found = [progress for entry in saved if (progress := entry.get("attributes", {}).get("progress", {}))]
    # before the adapter's name was recorded, there was one scorer
    own = [progress for progress in found if progress.get("adapter", adapter_name) == adapter_name]
    if found and not own:
        others = ", ".join(dict.fromkeys(repr(progress["adapter"]) for progress in found))
        raise ValueError(
            f"the checkpoint has scored the heads of adapter {others}, but this run scores {adapter_name!r}; activate "
            "the checkpoint's adapter (set_adapter, TaylorHeadScorer's adapter_name), or begin a new run"
        )
    return own[-1] if own else {}


def check_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if the checkpoint's heads were selected by other settings than this run's.

    The masks would be described wrongly, or mean something else. Until the selection the settings may change: the
    statistics of all criteria are collected.

    Args:
        saved: The checkpoint's entry.
        now: The `selection_settings` of this run's configuration.
    """
    if saved.get("selected_at") is None:
        return
    was = saved["settings"]  # of neurons, too, if the checkpoint's adapter prunes them
    changed = [f"{name}={now.get(name)!r} (was {old!r})" for name, old in was.items() if now.get(name) != old]
    if changed:
        raise ValueError(
            f"the checkpoint's heads were selected at step {saved['selected_at']} by other settings: this run has "
            f"{', '.join(changed)}; resume with the same, or from a checkpoint before the selection"
        )


def saved_scores(saved: dict[str, Any], first_step: int, select_step: int) -> dict[str, Any] | None:
    """The statistics in the checkpoint's entry, for `HeadScorer.load_state_dict`; None if no step was scored.

    Args:
        saved: The checkpoint's entry.
        first_step: First step of this run's window.
        select_step: Last step of it.

    Raises:
        ValueError: They were gathered for another window.
    """
    scores = saved.get("scores")
    if not scores or not (scores["num_steps"] or scores["num_skipped"]):
        return None
    before = (saved["first_step"], saved["select_step"])
    if before != (first_step, select_step):
        raise ValueError(
            f"the checkpoint has scored heads for the window of steps {before[0]} to {before[1]}, but this run's "
            f"window is {first_step} to {select_step}; resume with the same select_at, warmup_epochs, window and length "
            f"of training, or pass select_at={before[1]}"
        )
    return scores
