"""Trainer callbacks of a benchmark run: checkpoints and evaluations at the ends of epochs, and a clock."""

from __future__ import annotations

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class EpochEnds(TrainerCallback):
    """Saves, evaluates and stops at the ends of epochs.

    `save_strategy` would save at the last step of an epoch, before its end. A checkpoint at the end has the epoch's
    loss in its log, so that a resumed run has the log of an undisturbed one.

    Args:
        save_every, evaluate_every: Number of epochs between checkpoints, and between evaluations; 0 for none.
        stop_after: Number of epochs after which to save and stop.
    """

    def __init__(self, save_every: int = 0, evaluate_every: int = 0, stop_after: int | None = None) -> None:
        self.save_every = save_every
        self.evaluate_every = evaluate_every
        self.stop_after = stop_after

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        epoch = round(state.epoch)
        last = epoch >= args.num_train_epochs
        stop = epoch == self.stop_after
        if stop or (_is_due(epoch, self.save_every) and not last):
            control.should_save = True
        # after the last epoch the run is evaluated anyway
        if _is_due(epoch, self.evaluate_every) and not last:
            control.should_evaluate = True
        if stop:
            control.should_training_stop = True


class Clock(TrainerCallback, ExportableState):
    """Measures the seconds of training without evaluations. Checkpoints hold them: interruptions do not count."""

    def __init__(self) -> None:
        self.before = 0.0  # seconds before training began or was resumed
        self.began: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.before = saved.get("attributes", {}).get("seconds", 0.0)
        self.began = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.before -= kwargs["metrics"].get("eval_runtime", 0.0) if self.began is not None else 0.0

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.before, self.began = self.seconds(), None

    def seconds(self) -> float:
        return self.before + (0.0 if self.began is None else time.perf_counter() - self.began)

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds": self.seconds()}}


def _is_due(epoch: int, every: int) -> bool:
    return every > 0 and epoch % every == 0
