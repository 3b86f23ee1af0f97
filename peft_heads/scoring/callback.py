"""The Trainer callback: training events in, calls of a [`HeadScorer`] out; no mathematics here."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import warnings
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..adapter_folder.contents import FolderContents, folder_contents, set_image_processor
from ..adapter_folder.saving import write_contents
from ..adapter_folder.score_files import HEAT_MAP_FILE, SCORES_FILE, read_head_scores, write_head_scores
from ..heads.protocol import deactivated_heads, describe_masks, get_head_masks, module_patterns
from ..heads.scores import find_criterion
from .best_checkpoint import check_best_checkpoint, load_best_checkpoint
from .plotting import figure_bytes, plot_head_scores
from .scorer import HeadScorer, TwoScorersError
from .window import WINDOWS, plan_window, steps_per_epoch


logger = logging.getLogger(__name__)


class TaylorHeadScorer(TrainerCallback, ExportableState):
    """Scores the heads of a head-masked adapter during the warm-up and deactivates the least responsive.

    Says *when*; *what* is deactivated is said by [`HeadMaskedLoraConfig`]. At the selection the masks are set, the
    deactivated heads are recorded in `state.log_history` and logged at INFO, and the main process writes
    `head_scores.json` (all criteria's scores and the masks) and `head_scores.png` (a heat map) into `output_dir`.
    From then on both are saved and pushed with the adapter, whose card shows the heat map.
    Checkpoints hold masks and scores: a resumed run selects the same heads.

    Where all heads of a group have the same score (zero gradients, say), the first ones are deactivated: a warning names
    the group, and `degenerate` is true in the log and in `head_scores.json`. Another names the projections that no
    gradient has reached in the scored steps.

    This is the heads' warm-up; the learning rate's is `TrainingArguments`'.

    With `load_best_model_at_end` the active adapters become those of the best checkpoint, whatever their names. That is
    this callback's doing. Without it the fault is Trainer's, and any PEFT method's: an active adapter that is not named
    "default" gets the weights of "default" at the end, or keeps those of the last step. A model with an adapter by
    transformers' own `add_adapter`, without a PeftModel around it, can be trained and scored, but Trainer can neither
    load its best checkpoint (refused here) nor resume it.

    Args:
        select_at: Below 1 a share of the optimizer steps, from 1 on a step, as `TrainingArguments.warmup_steps` reads
            numbers. Defaults to 0.1: the papers' 10 of 100 epochs.
        warmup_epochs: Instead of `select_at`: the selection comes after so many epochs.
        window: The optimizer steps whose scores are averaged, up to the selection: the last epoch before it, all of
            the warm-up, or the last step alone. A window longer than the warm-up is cut to it.
        adapter_name: The adapter to score, which must be active; by default the first active one.

    Attributes:
        masks: `{module name: bool (num_heads,)}` once the heads are selected, None before.

    Raises:
        ValueError: Wrong arguments; when training begins: a selection after the end of training, a selection by
            Taylor scores of the first step alone while the adapter is zero (`lora_B`: every score would be zero), a
            model without a head-masked adapter, an adapter that is unknown or not active, a second scorer, an epoch
            of unknown length where it is needed, or `load_best_model_at_end` where the adapter could not be loaded.

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
    ) -> None:
        if select_at is not None and warmup_epochs is not None:
            raise ValueError(
                f"give select_at or warmup_epochs, not both; got select_at={select_at}, warmup_epochs={warmup_epochs}"
            )
        # written so that nan is refused as well
        if select_at is not None and not (0 < select_at < 1 or (select_at >= 1 and float(select_at).is_integer())):
            raise ValueError(
                f"select_at is a share of the steps, in (0, 1), or a whole number of steps; got {select_at}"
            )
        if warmup_epochs is not None and not 0 < warmup_epochs < math.inf:
            raise ValueError(f"warmup_epochs must be positive; got {warmup_epochs}")
        if window not in WINDOWS:
            raise ValueError(f"window must be one of {', '.join(WINDOWS)}; got {window!r}")
        self.select_at = 0.1 if select_at is None and warmup_epochs is None else select_at
        self.warmup_epochs = warmup_epochs
        self.window = window
        self.adapter_name = adapter_name
        self.masks = None
        self.progress: dict[str, Any] = {}
        self._training = False  # between the beginning and the end of a run
        self._scorer: HeadScorer | None = None
        self._contents: FolderContents | None = None  # of the folders that the adapter is going to be saved in
        self._trainer = None

    def attach(self, trainer) -> TaylorHeadScorer:
        """Log through `trainer.log`, so that TensorBoard and the like see the selection; adds the callback if needed."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    def close(self) -> None:
        """Let another scorer have the adapter; needed only after a run that broke off."""
        if self._scorer is not None:
            self._scorer.close()

    # Trainer events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        model = kwargs["model"]
        self.close()  # auto_find_batch_size begins again; or an earlier run broke off
        begins_again = self._training and self.masks is not None
        self.masks, self._training = None, True
        self._scorer = self._new_scorer(model, state)
        self._contents = folder_contents(model, self._scorer.adapter_name)
        _check_deepspeed(args, self._scorer.config)
        if args.load_best_model_at_end:
            check_best_checkpoint(model, _active_adapters(model))
        first, last = self._plan(args, state, kwargs.get("train_dataloader"))

        saved = _saved_progress(state, self._scorer.adapter_name) if state.global_step else {}
        self._check_settings(saved)
        self.progress = {"first_step": first, "select_step": last, "selected_at": saved.get("selected_at")}
        self.progress |= {"adapter": self._scorer.adapter_name, "settings": self._settings()}
        set_image_processor(model, kwargs.get("processing_class"), self._scorer.adapter_name)
        # a checkpoint of a run without this callback lacks the entry that Trainer updates at the next checkpoint
        state.stateful_callbacks.setdefault(type(self).__name__, {})

        masks = get_head_masks(model, self._scorer.adapter_name)
        if deactivated_heads(masks) or self.progress["selected_at"] is not None:
            if self.progress["selected_at"] is None and begins_again:
                logger.info("training begins again, with the heads that were selected: %s", describe_masks(masks))
                self.progress["selected_at"] = 0
            elif self.progress["selected_at"] is None:
                warnings.warn(
                    f"adapter {self._scorer.adapter_name!r} has deactivated heads already and keeps them: "
                    f"{describe_masks(masks)}. Nothing is scored"
                )
            self.masks = masks
            self._contents.head_scores = self._contents.head_scores or read_head_scores(args.output_dir)
            self._scorer.close()
            return

        self._scorer.check()
        if self._scorer.config.masks_heads:
            find_criterion(self._scorer.config.criterion)  # before the warm-up is trained for nothing
        self._restore_scores(saved)
        self._contents.selection_pending = True
        if state.global_step >= last:
            self._catch_up(args, state, control, kwargs.get("optimizer"))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.masks is None and self.progress["first_step"] <= state.global_step + 1:
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # Not on_epoch_end: a run resumed from a checkpoint at an epoch's last step never gets that event. The
        # checkpoint of this step is written afterwards and holds the masks.
        if self.masks is None and state.global_step >= self.progress["select_step"]:
            self._select(args, state, control, kwargs.get("optimizer"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._training = False
        self._contents.selection_pending = False
        self._scorer.close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Trainer has loaded what it takes for the adapter a moment ago
            load_best_checkpoint(kwargs["model"], _active_adapters(kwargs["model"]), state.best_model_checkpoint)
        if self.masks is None and self._scorer.config.masks_heads:
            warnings.warn(
                f"training ended at step {state.global_step}, before the selection at step "
                f"{self.progress['select_step']}: no head is deactivated"
            )
        selected_at = self.progress["selected_at"]
        best = state.best_global_step
        if args.load_best_model_at_end and selected_at is not None and best is not None and best < selected_at:
            warnings.warn(
                f"load_best_model_at_end has loaded the checkpoint of step {best}, which is older than the selection "
                f"of heads at step {selected_at}: the model has no deactivated heads. Evaluate only after the "
                "selection, or select earlier"
            )

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
        return {
            "args": {
                "select_at": None if self.warmup_epochs is not None else self.select_at,
                "warmup_epochs": self.warmup_epochs,
                "window": self.window,
                "adapter_name": self.adapter_name,
            },
            "attributes": {"progress": {**self.progress, "scores": scores} if self.progress else {}},
        }

    def _new_scorer(self, model: Any, state: TrainerState) -> HeadScorer:
        adapter_name = self._adapter_to_score(model)
        try:
            scorer = HeadScorer(model, adapter_name, recording=False)
        except TwoScorersError as error:
            if error.other.run is None or error.other.run is state:
                raise
            error.other.close()  # left behind by a run that broke off
            scorer = HeadScorer(model, adapter_name, recording=False)
        scorer.run = state
        return scorer

    def _adapter_to_score(self, model: Any) -> str:
        active = _active_adapters(model)
        name = self.adapter_name
        if name is None:
            return active[0] if active else "default"
        existing = getattr(model, "peft_config", {})
        if existing and name not in existing:
            raise ValueError(f"the model has no adapter {name!r}; it has: {', '.join(existing)}")
        if existing and name not in active:
            raise ValueError(
                f"adapter {name!r} is not active, so that no gradient would reach it (active: "
                f"{', '.join(active) or 'none'}); call model.set_adapter({name!r}) before training, or pass another "
                "adapter_name"
            )
        return name

    def _plan(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> tuple[int, int]:
        """First and last optimizer step of the scoring window; heads are selected after the last."""
        window = plan_window(
            select_at=self.select_at,
            warmup_epochs=self.warmup_epochs,
            window=self.window,
            max_steps=state.max_steps,
            steps_per_epoch=steps_per_epoch(args, dataloader),
        )
        if window.last == 1 and not state.global_step:
            self._check_first_step(window.asked)
        if window.last == state.max_steps and self._scorer.config.masks_heads:
            warnings.warn(
                f"{window.asked} selects heads at step {window.last}, the last of training: no step is trained with "
                "the masks"
            )
        return window.first, window.last

    def _check_first_step(self, asked: str) -> None:
        """Raise ValueError if heads are to be selected by what can only be zero."""
        scorer, config = self._scorer, self._scorer.config
        masked = any(not layer.get_head_mask(scorer.adapter_name).all() for layer in scorer.layers.values())
        if masked or not config.masks_heads or not find_criterion(config.criterion).is_taylor:
            return  # nothing will be selected, or not by products with the adapter's parameters
        zero = scorer.without_update()
        if zero:
            raise ValueError(
                f"{asked} selects heads by the {config.criterion!r} scores of step 1 alone, which are products with the "
                f"adapter's parameters, and these are zero before step 1 (lora_B of a new adapter) in "
                f"{module_patterns(zero, scorer.layouts)}: every score would be zero. Select later (select_at=2 or "
                "more, several epochs of warm-up), or by another criterion (grad_norm)"
            )

    def _settings(self) -> dict[str, Any]:
        return self._scorer.config.selection_settings

    def _check_settings(self, saved: dict[str, Any]) -> None:
        """Masks that were selected by other settings would be described wrongly, or mean something else."""
        if saved.get("selected_at") is None:
            return  # until the selection the settings may change: the scores of all criteria are gathered
        now = self._settings()
        changed = [
            f"{name}={now[name]!r} (was {old!r})" for name, old in saved["settings"].items() if now[name] != old
        ]
        if changed:
            raise ValueError(
                f"the checkpoint's heads were selected at step {saved['selected_at']} by other settings: this run has "
                f"{', '.join(changed)}; resume with the same, or from a checkpoint before the selection"
            )

    def _restore_scores(self, saved: dict[str, Any]) -> None:
        scores = saved.get("scores")
        if not scores or not (scores["num_steps"] or scores["num_skipped"]):
            return
        before = (saved["first_step"], saved["select_step"])
        now = (self.progress["first_step"], self.progress["select_step"])
        if before != now:
            raise ValueError(
                f"the checkpoint has scored heads for the window of steps {before[0]} to {before[1]}, but this run's "
                f"window is {now[0]} to {now[1]}; resume with the same select_at, warmup_epochs, window and length "
                f"of training, or pass select_at={before[1]}"
            )
        self._scorer.load_state_dict(scores)

    def _catch_up(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any) -> None:
        """Resumed after the selection step with nothing selected: select now, if there is something to select by."""
        config = self._scorer.config
        if config.masks_heads and find_criterion(config.criterion).needs_gradients and not self._scorer.num_steps:
            raise ValueError(
                f"training resumes at step {state.global_step}, after the selection of heads at step "
                f"{self.progress['select_step']}, and the checkpoint holds neither masks nor scores; pass a "
                f"select_at of more than {state.global_step}"
            )
        self._select(args, state, control, optimizer)

    def _select(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any) -> None:
        scorer = self._scorer
        scores, degenerate = scorer.all_scores(), scorer.is_degenerate()
        self.masks = scorer.apply(optimizer)
        self.progress["selected_at"] = state.global_step
        self._contents.selection_pending = False

        heads = describe_masks(self.masks)
        logger.info("step %d: deactivated heads by %s: %s", state.global_step, scorer.config.criterion, heads)
        entry = {"deactivated_heads": heads, "degenerate": degenerate}
        if self._trainer is not None:
            should_log = control.should_log
            self._trainer.log(entry)
            control.should_log = should_log  # which logging resets: the loss of this step is still to come
        else:
            # a callback has no handle on the trainer, and reporters stand before it
            state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
        if state.is_world_process_zero:
            self._write(args.output_dir, state, scores, degenerate)

    def _write(self, output_dir: str, state: TrainerState, scores: dict[str, dict], degenerate: bool) -> None:
        config = self._scorer.config
        report = {
            "peft_heads_version": importlib.metadata.version("peft-heads"),
            "adapter": self._scorer.adapter_name,
            "step": state.global_step,
            "epoch": state.epoch,
            "window": {
                "first_step": self.progress["first_step"],
                "last_step": self.progress["select_step"],
                "steps_counted": self._scorer.num_steps,
                "steps_skipped": self._scorer.num_skipped,
            },
            **self._settings(),
            # whether in some group all heads had the same score, so that their order alone has decided
            "degenerate": degenerate,
            "deactivated_heads": deactivated_heads(self.masks),
            "masks": {name: mask.tolist() for name, mask in self.masks.items()},
            "scores": {c: {name: s.tolist() for name, s in by_name.items()} for c, by_name in scores.items()},
        }
        shown = config.criterion if config.criterion in scores else next(iter(scores))
        figure = plot_head_scores(
            scores[shown],
            self.masks,
            joint=config.joint,
            title=f"Head responsiveness ({shown}), step {state.global_step}",
        )
        self._contents.head_scores = {
            SCORES_FILE: json.dumps(report, indent=1).encode(),
            HEAT_MAP_FILE: figure_bytes(figure),
        }
        write_head_scores(output_dir, self._contents.head_scores)


def _check_deepspeed(args: TrainingArguments, config: Any) -> None:
    """Raise ValueError for what does not work with DeepSpeed."""
    state = AcceleratorState()
    if state.distributed_type != DistributedType.DEEPSPEED:
        return
    if getattr(config, "use_dora", False) and state.deepspeed_plugin.zero_stage == 3:
        # saving needs the norms of frozen rows, and one process alone saves
        raise ValueError("DoRA with ZeRO 3: the adapter could not be saved; use ZeRO 1 or 2, or use_dora=False")
    # DeepSpeed keeps its loss scale to itself, and has changed it by the time a callback could ask
    if args.fp16 or state.mixed_precision == "fp16":
        raise ValueError(
            "fp16=True with DeepSpeed: the heads' scores would be those of a scaled loss; train with bf16=True, or with "
            "fp16=True without DeepSpeed"
        )


def _active_adapters(model: Any) -> list[str]:
    """Names of the active adapters, whoever has put them into the model: PEFT, or transformers' `add_adapter`."""
    active = getattr(model, "active_adapters", None)
    if isinstance(active, list):
        return active
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return list(layer.active_adapters) if layer is not None else []


def _saved_progress(state: TrainerState, adapter_name: str) -> dict[str, Any]:
    """Our entry in a checkpoint. Trainer restores callbacks only on request, but always loads their state.

    Raises:
        ValueError: The checkpoint's entries are those of other adapters.
    """
    saved = state.stateful_callbacks.get(TaylorHeadScorer.__name__) or []
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
