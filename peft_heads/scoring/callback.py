"""The Trainer callback: it turns training events into calls of a [`HeadScorer`], and computes nothing itself."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..adapter_folder.contents import FolderContents, folder_contents, set_image_processor
from ..adapter_folder.saving import write_contents
from ..adapter_folder.score_files import read_head_scores, write_head_scores
from ..heads.criterion_registry import find_criterion
from .active_adapters import active_adapters, adapter_to_score
from .best_checkpoint import check_best_checkpoint, load_best_checkpoint, warn_if_before_selection
from .checks import check_compilation, check_deepspeed, check_late_selection, check_windows
from .cutting import Cutting
from .report import report_files
from .resuming import check_settings, saved_progress, saved_scores
from .scorer import HeadScorer
from .teaching import Teaching
from .window import SelectionWindow, check_schedule, plan_windows, steps_per_epoch


logger = logging.getLogger(__name__)


class TaylorHeadScorer(TrainerCallback, ExportableState):
    """Scores the heads of a head-masked adapter during the warm-up and deactivates the least responsive.

    This callback decides *when*; the adapter's configuration decides *what* is deactivated: heads, and MLP neurons where
    it prunes. With `target_speed` the first cut decides how many. At the selection the masks are set, the deactivated
    heads are recorded in `state.log_history` and logged at INFO, and the main process writes `head_scores.json` (the
    scores by all criteria, and the masks) and `head_scores.png` (a heat map) into `output_dir`. From then on both are
    saved and pushed with the adapter, whose card shows the heat map.
    Checkpoints hold masks and scores: a resumed run selects the same heads.

    With several `cuts` units go step by step, cubically: most at the first cuts, none but those planned after the last.
    What is off stays off, and each cut is decided by the steps since the one before it.

    With `distill` the model learns from itself as it was with everything on (`scoring.distillation`); the teacher lies
    in the checkpoints as `teacher.safetensors`.

    Where all heads of a group have the same score, for instance because all gradients are zero, the first heads are
    deactivated: a warning names the group, and `degenerate` is true in the log and in `head_scores.json`. Another
    warning names the projections that no gradient has reached in the scored steps.

    The warm-up meant here is that of the heads; the learning rate's is set in `TrainingArguments`.

    With `load_best_model_at_end` this callback loads the active adapters of the best checkpoint, whatever their names.
    Trainer alone, with any PEFT method, gives an active adapter that is not named "default" the weights of "default",
    or leaves it those of the last step. A model with an adapter by transformers' own `add_adapter`, without a PeftModel
    around it, can be trained and scored, but Trainer can neither load its best checkpoint (refused here) nor resume it.

    Args:
        select_at: Time of the selection: below 1 a share of the optimizer steps, from 1 on a step, as in
            `TrainingArguments.warmup_steps`. Defaults to 0.1: the papers' 10 of 100 epochs.
        warmup_epochs: Number of epochs before the selection, instead of `select_at`.
        window: The optimizer steps whose scores are averaged: the last epoch before the selection, all of the warm-up,
            or the last step alone. A window longer than the warm-up is cut to it.
        adapter_name: The adapter to score, which must be active; by default the first active one.
        cuts: Number of times that units are switched off, evenly spaced from the selection to `last_cut`.
        last_cut: Time of the last cut, as in `select_at`. Defaults to half of training.
        distill: Weight of the distance to the teacher's predictions in the loss; 0 for no teacher.
        distill_temperature: Temperature of the predictions that are compared.
        teacher: When the teacher is copied: just before the first `"cut"`, or at the `"start"` of training.

    Attributes:
        masks: `{module name: bool (num_heads,)}` once the heads are selected, None before.
        neuron_masks: `{first layer of an MLP: bool (num_neurons,)}`, likewise; empty for an adapter that prunes none.

    Raises:
        ValueError: Wrong arguments; when training begins: a selection after the end of training, more cuts than steps,
            a `target_speed` that no numbers of heads and neurons reach, settings that distillation does not go with, a
            selection by Taylor scores of the first step alone while the adapter is zero (`lora_B`: every score would
            be zero), a model without a head-masked adapter, an adapter that is unknown or not active, a second scorer,
            an epoch of unknown length where it is needed, or `load_best_model_at_end` where the adapter could not be
            loaded.

    Example:

        ```py
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[TaylorHeadScorer(warmup_epochs=10)])
        ```
    """

    def __init__(
        self,
        select_at: float | None = None,
        warmup_epochs: float | None = None,
        window: str = "last_epoch",
        adapter_name: str | None = None,
        cuts: int = 1,
        last_cut: float | None = None,
        distill: float = 0.0,
        distill_temperature: float = 2.0,
        teacher: str = "cut",
    ) -> None:
        check_schedule(select_at, warmup_epochs, window, cuts, last_cut)
        self.select_at = 0.1 if select_at is None and warmup_epochs is None else select_at
        self.warmup_epochs, self.window = warmup_epochs, window
        self.cuts, self.last_cut, self.adapter_name = cuts, last_cut, adapter_name
        self.masks = self.neuron_masks = None
        self.progress: dict[str, Any] = {}
        self.distill, self.distill_temperature, self.teacher = distill, distill_temperature, teacher
        self._teaching = Teaching(distill, distill_temperature, teacher)
        self._training = False  # between the beginning and the end of a run
        self._scorer: HeadScorer | None = None
        self._cutting: Cutting | None = None
        self._contents: FolderContents | None = None  # of the folders that the adapter is going to be saved in
        self._trainer = None

    def attach(self, trainer) -> TaylorHeadScorer:
        """Log through `trainer.log`, so that TensorBoard and the like see the selection; adds the callback if needed."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    def close(self) -> None:
        """Let another scorer have the adapter; needed only after a run that was interrupted."""
        self._teaching.close()
        if self._scorer is not None:
            self._scorer.close()

    # Trainer events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        model = kwargs["model"]
        self.close()  # auto_find_batch_size begins again; or an earlier run was interrupted
        again = self._cutting if self._training and self.masks is not None else None
        begins_again, self._training = self._training, True
        self.masks = self.neuron_masks = None
        self._scorer = HeadScorer(model, adapter_to_score(model, self.adapter_name), recording=False, run=state)
        self._contents = folder_contents(model, self._scorer.adapter_name)
        check_deepspeed(args, self._scorer.config)
        check_compilation(args, self._scorer.config)
        if args.load_best_model_at_end:
            check_best_checkpoint(model, active_adapters(model))
        self._cutting = Cutting(self._scorer, self._plan(args, state, kwargs.get("train_dataloader")))

        name, settings = self._scorer.adapter_name, self._scorer.config.selection_settings
        saved = saved_progress(state, TaylorHeadScorer.__name__, name) if state.global_step else {}
        check_settings(saved, settings)
        set_image_processor(model, kwargs.get("processing_class"), name)
        # a checkpoint of a run without this callback lacks the entry that Trainer updates at the next checkpoint
        state.stateful_callbacks.setdefault(type(self).__name__, {})

        selected_at = self._cutting.begin(saved, again)
        if self._cutting.made:
            self.masks, self.neuron_masks = self._scorer.present_masks()
            self._contents.head_scores = self._contents.head_scores or read_head_scores(args.output_dir)
        self.progress = {"selected_at": selected_at, "adapter": name, "settings": settings, **self._cutting.progress()}
        if self._cutting.next is None:
            self._scorer.close()
        else:
            self._scorer.check()
            if self._scorer.config.masks_heads:
                find_criterion(self._scorer.config.criterion)  # before the warm-up is trained for nothing
            scores = saved_scores(saved, self._cutting.next.first, self._cutting.next.last)
            if scores is not None:
                self._scorer.load_state_dict(scores)
            self._contents.selection_pending = True
        self._teaching.begin(args, state, model, name, saved, begins_again)
        if self._cutting.is_due(state.global_step):
            check_late_selection(self._scorer, state.global_step, self._cutting.next.last)
            self._cut(args, state, control, **kwargs)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._cutting.listens_at(state.global_step + 1):
            self._scorer.start()

    def on_pre_optimizer_step(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._scorer.recording:
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            counted = self._scorer.update(loss_scale=scaler.get_scale() if scaler is not None else 1.0)
            if not counted:
                logger.warning(
                    "step %d: the gradients are not finite, the step does not count for the head scores",
                    state.global_step + 1,
                )
        self._teaching.check_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # Not on_epoch_end: a run resumed from a checkpoint at an epoch's last step never gets that event. The
        # checkpoint of this step is written afterwards and holds the masks.
        if self._cutting.is_due(state.global_step):
            self._cut(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._teaching.save(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._training = False
        self._contents.selection_pending = False
        self.close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # after Trainer, which has just loaded the file that it takes for the adapter's
            load_best_checkpoint(kwargs["model"], active_adapters(kwargs["model"]), state.best_model_checkpoint)
        if self._cutting.next is not None and self._cutting.switches_off:
            what = "no head is deactivated" if self.masks is None else "fewer units are off than planned"
            warnings.warn(
                f"training ended at step {state.global_step}, before the selection at step "
                f"{self.progress['select_step']}: {what}"
            )
        if args.load_best_model_at_end:
            last = self._cutting.windows[-1].last
            warn_if_before_selection(state.best_global_step, self.progress["selected_at"], last)

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # At a checkpoint Trainer uploads output_dir with the checkpoint's weights, but without card and labels.
        # (transformers before 5.0 has no such event: there the card comes with the upload at the end.)
        if self._scorer is not None and state.is_world_process_zero:
            if hasattr(kwargs["model"], "create_or_update_model_card"):  # a PeftModel
                kwargs["model"].create_or_update_model_card(args.output_dir)
            write_contents(args.output_dir, self._scorer.config, self._contents, warn=False)

    # ExportableState: what checkpoints hold

    def state(self) -> dict[str, Any]:
        scores = self._scorer.state_dict() if self._scorer is not None and self.progress else None
        more = {"teacher": self._teaching.fingerprint}
        return {
            "args": {
                "select_at": None if self.warmup_epochs is not None else self.select_at,
                "warmup_epochs": self.warmup_epochs,
                "window": self.window,
                "adapter_name": self.adapter_name,
                "cuts": self.cuts,
                "last_cut": self.last_cut,
                "distill": self.distill,
                "distill_temperature": self.distill_temperature,
                "teacher": self.teacher,
            },
            "attributes": {"progress": {**self.progress, **more, "scores": scores} if self.progress else {}},
        }

    def _plan(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> list[SelectionWindow]:
        """The optimizer steps that are scored for each cut, which follows the last of them."""
        windows = plan_windows(
            select_at=self.select_at,
            warmup_epochs=self.warmup_epochs,
            window=self.window,
            cuts=self.cuts,
            last_cut=self.last_cut,
            max_steps=state.max_steps,
            steps_per_epoch=steps_per_epoch(args, dataloader),
        )
        check_windows(self._scorer, windows, state)
        return windows

    def _cut(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        scorer = self._scorer
        self._teaching.before_cut(kwargs["model"], scorer.adapter_name)
        cut = self._cutting.cut(kwargs.get("optimizer"))
        self.masks, self.neuron_masks = cut.masks, cut.neuron_masks
        if self.progress["selected_at"] is None:
            self.progress["selected_at"] = state.global_step
        self._contents.selection_pending = self._cutting.next is not None
        if state.is_world_process_zero:
            files = report_files(scorer, cut, state)
            self._contents.head_scores = files
            write_head_scores(args.output_dir, files)
        self.progress |= self._cutting.progress()

        for line in cut.lines(scorer.config):
            logger.info("step %d: %s", state.global_step, line)
        self._log(cut.log_entry(), state, control)

    def _log(self, entry: dict[str, Any], state: TrainerState, control: TrainerControl) -> None:
        """Log through `trainer.log` where attached: otherwise a callback has no trainer, and the reporters ran before it."""
        if self._trainer is None:
            state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
            return
        should_log = control.should_log
        self._trainer.log(entry)
        control.should_log = should_log  # which logging resets: the loss of this step is still to come
