"""Distillation over a run of Trainer: when the teacher is copied, where it is kept, and when it is gone again."""

from __future__ import annotations

import hashlib
import logging
import weakref
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapter_folder.atomic import write_atomically
from ..adapter_folder.checkpoints import TEACHER_FILE
from .distillation import Distillation, Teacher, check_distillation


logger = logging.getLogger(__name__)

TEACHERS = ("cut", "start")
# The run that adds to a model's loss. One that broke off would go on adding in the next.
_DISTILLED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Distillation]] = weakref.WeakKeyDictionary()


def check_distillation_arguments(distill: float, distill_temperature: float, teacher: str) -> None:
    """Raise ValueError for arguments of `TaylorHeadScorer` that make no distillation."""
    # written so that nan is refused as well
    if not 0 <= distill < float("inf"):
        raise ValueError(f"distill is the weight of the teacher's term in the loss, at least 0; got {distill}")
    if not 0 < distill_temperature < float("inf"):
        raise ValueError(f"distill_temperature must be positive; got {distill_temperature}")
    if teacher not in TEACHERS:
        raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}; got {teacher!r}")


class Teaching:
    """The distillation of one `TaylorHeadScorer`.

    Args:
        weight: Factor of the teacher's term in the loss; 0 for no distillation.
        temperature: Temperature of the predictions that are compared.
        when: When the teacher is copied: just before the first cut, or at the start of training.
    """

    def __init__(self, weight: float, temperature: float, when: str) -> None:
        check_distillation_arguments(weight, temperature, when)
        self.weight, self.temperature, self.when = weight, temperature, when
        self._teacher: Teacher | None = None
        self._content = b""  # of the file in the checkpoints
        self._distillation: Distillation | None = None

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the teacher's file; None as long as there is no teacher."""
        return hashlib.sha256(self._content).hexdigest() if self._content else None

    def begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        adapter_name: str,
        saved: dict[str, Any],
        begins_again: bool,
    ) -> None:
        """Prepare for a run.

        Args:
            args, state, model: Trainer's.
            adapter_name: The adapter.
            saved: The checkpoint's entry, where training resumes from one.
            begins_again: Whether Trainer has begun this run before; its teacher is kept then.

        Raises:
            ValueError: The settings do not go together, or the checkpoint's teacher is missing.
        """
        _end_distillation(model)
        self.close()
        if not begins_again:
            self._teacher, self._content = None, b""
        if not self.weight:
            return
        check_distillation(args, model.peft_config[adapter_name])
        if saved.get("teacher"):
            self._content = _read_teacher(args, state, saved["teacher"])
            self._teacher = Teacher.of(model, adapter_name)
            self._teacher.load(safetensors.torch.load(self._content))
        elif state.global_step and (self.when == "start" or saved.get("selected_at") is not None):
            raise ValueError(
                f"training resumes at step {state.global_step}, past the moment at which the teacher is copied "
                f"(teacher={self.when!r}), and the checkpoint was written without distillation; resume with distill=0, or from an "
                "earlier checkpoint"
            )
        elif self._teacher is None and self.when == "start":
            self._copy(model, adapter_name)
        if self._teacher is not None:
            self._distil(model)

    def before_cut(self, model: nn.Module, adapter_name: str) -> None:
        """Copy the teacher, unless there is one."""
        if self.weight and self._teacher is None:
            self._copy(model, adapter_name)
            self._distil(model)

    def check_step(self) -> None:
        """Raise ValueError if the loss that is trained by lacks the teacher's term."""
        if self._distillation is not None:
            self._distillation.check_step()

    def save(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the teacher into the checkpoint that Trainer has just written; the main process does."""
        if not self._content or not args.should_save or state.is_hyper_param_search:
            return
        folder = _checkpoint(args, state)
        if folder.is_dir():
            write_atomically(folder / TEACHER_FILE, self._content)
        else:
            logger.warning("%s is not there: the checkpoint of this step cannot be resumed with distillation", folder)

    def close(self) -> None:
        """Leave the model's loss alone."""
        if self._distillation is not None:
            self._distillation.close()
            self._distillation = None

    def _copy(self, model: nn.Module, adapter_name: str) -> None:
        self._teacher = Teacher.of(model, adapter_name)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._teacher.tensors.items()}
        self._content = safetensors.torch.save(tensors)

    def _distil(self, model: nn.Module) -> None:
        self._distillation = Distillation(model, self._teacher, self.weight, self.temperature)
        _DISTILLED[_inner(model)] = weakref.ref(self._distillation)


def _end_distillation(model: nn.Module) -> None:
    """Take away what a run that broke off has left on a model."""
    other = _DISTILLED.pop(_inner(model), lambda: None)()
    if other is not None:
        other.close()


def _inner(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _read_teacher(args: TrainingArguments, state: TrainerState, fingerprint: str) -> bytes:
    """The file of a checkpoint's teacher. Trainer does not tell callbacks which checkpoint it resumes from."""
    folders = [_checkpoint(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    places = [path for folder in dict.fromkeys(folders) if (path := folder / TEACHER_FILE).is_file()]
    for path in places:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == fingerprint:
            return content
    if places:
        raise ValueError(
            f"{places[0]} is not the teacher of the checkpoint that training resumes from: it was changed, or belongs to "
            "another run; resume with distill=0, or from another checkpoint"
        )
    raise ValueError(
        f"{TEACHER_FILE} is missing, by which the checkpoint of step {state.global_step} was distilled (looked in: "
        f"{', '.join(map(str, dict.fromkeys(folders)))}); put it there, resume from a checkpoint in output_dir or say so "
        "by TrainingArguments(resume_from_checkpoint=…), or resume with distill=0"
    )
