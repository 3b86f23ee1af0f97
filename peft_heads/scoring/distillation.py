"""Distillation: a model whose heads and neurons are switched off learns from itself as it was before.

The teacher stands on the same backbone weights. Only what training changes, the adapter and the classifier, is copied,
with everything switched on (Hinton, Vinyals and Dean 2015; here the teacher is the unpruned model).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from transformers import TrainingArguments


# What Trainer passes beside the images, and a pass for logits alone does without.
_FOR_THE_LOSS = ("labels", "num_items_in_batch")


class Teacher:
    """A copy of what an adapter's training changes, by which the model computes as it did when the copy was made.

    Args:
        tensors: `{name in the model: tensor}` of everything that differs from the model as it goes on.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def of(cls, model: nn.Module, adapter_name: str) -> Teacher:
        """A copy of a model as it is: what is trained (adapter, classifier), and the adapter's masks."""
        return cls({name: tensor.detach().clone() for name, tensor in _changing(model, adapter_name).items()})

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the values of a saved copy.

        Raises:
            ValueError: They are those of another model.
        """
        for name, here in self.tensors.items():
            there = tensors.get(name)
            if there is None or there.shape != here.shape:
                shape = "none" if there is None else tuple(there.shape)
                raise ValueError(
                    f"the saved teacher is that of another model: for {name} it has {shape}, not {tuple(here.shape)}"
                )
        if len(tensors) > len(self.tensors):
            surplus = next(name for name in tensors if name not in self.tensors)
            raise ValueError(f"the saved teacher is that of another model: this one does not train {surplus}")
        self.tensors = {name: tensors[name].to(here) for name, here in self.tensors.items()}

    @torch.no_grad()
    def logits(self, model: nn.Module, *args: Any, **inputs: Any) -> torch.Tensor:
        """The teacher's logits: the model in evaluation mode, with the copied tensors in place of its own.

        The mode of every module, and random numbers, are as before afterwards.
        """
        with _evaluation_mode(model):
            return functional_call(model, self.tensors, args, inputs)["logits"]


class Distillation:
    """Adds the distance from the teacher's predictions to the loss that a model returns while it trains.

    The loss becomes `loss + weight * T^2 * KL(teacher || student)`, with both predictions softened by the temperature
    T. It is the mean over the images, scaled as the loss itself is: Trainer passes the number of items of all
    micro-batches of a step to models that divide by it.

    Args:
        model: The model whose forward pass returns the loss, possibly wrapped for distributed training.
        teacher: What is learned from.
        weight: Factor of the added term.
        temperature: T.
    """

    def __init__(self, model: nn.Module, teacher: Teacher, weight: float, temperature: float) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self._asks_teacher = self._reached = self._checked = False
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        # A weak reference: an object that is dropped without close(), as after an interrupted run, adds nothing more.
        this = weakref.ref(self)
        self._handle = inner.register_forward_hook(
            lambda *call: None if (alive := this()) is None else alive._add_to_loss(*call), with_kwargs=True
        )

    def close(self) -> None:
        """Leave the model's loss alone from now on."""
        self._handle.remove()

    def check_step(self) -> None:
        """Raise ValueError if the backward passes of the first step have not gone through the added term.

        A Trainer with a loss of its own (`compute_loss_func`, an overridden `compute_loss`) does not use the model's.
        """
        if not self._checked and not self._reached:
            raise ValueError(
                "distillation has no effect: no gradient has reached the term that it adds to the model's loss. "
                "Trainer must use the loss that the model returns (no compute_loss_func, no compute_loss of your own "
                "that leaves outputs.loss out); else pass distill=0"
            )
        self._checked = True

    def _add_to_loss(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self._asks_teacher or not model.training or not torch.is_grad_enabled():
            return None
        if not isinstance(output, Mapping) or output.get("loss") is None or output.get("logits") is None:
            raise ValueError(
                "distillation needs a model that returns loss and logits by name, given images and labels; got "
                + (f"{', '.join(output)}" if isinstance(output, Mapping) else type(output).__name__)
            )
        self._asks_teacher = True
        try:
            inputs = {name: value for name, value in kwargs.items() if name not in _FOR_THE_LOSS}
            wanted = self.teacher.logits(model, *args, **inputs)
        finally:
            self._asks_teacher = False
        added = distillation_loss(output["logits"], wanted, self.temperature, kwargs.get("num_items_in_batch"))
        added.register_hook(self._note_gradient)
        output["loss"] = output["loss"] + self.weight * added
        return output

    def _note_gradient(self, grad: torch.Tensor) -> None:
        self._reached = True


def distillation_loss(
    logits: torch.Tensor, wanted: torch.Tensor, temperature: float, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """`T^2 * KL(teacher || student)` of softened predictions (Hinton, Vinyals and Dean 2015, section 2).

    Args:
        logits: The student's, (images, classes).
        wanted: The teacher's, likewise.
        temperature: T.
        num_items: What the sum over the images is divided by; their number if None.

    Example:
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> distillation_loss(same, same, temperature=2.0).item()
        0.0
    """
    student = log_softmax(logits.float() / temperature, dim=-1)
    teacher = log_softmax(wanted.float() / temperature, dim=-1)
    total = kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * total / (len(logits) if num_items is None else num_items)


def check_distillation(args: TrainingArguments, config: Any) -> None:
    """Raise ValueError for settings under which a teacher would do nothing, or something else than meant.

    Args:
        args: Trainer's arguments.
        config: The adapter's configuration.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"distill does not work with label_smoothing_factor={args.label_smoothing_factor:g}: Trainer then computes "
            "a loss of its own and ignores the model's; pass label_smoothing_factor=0 or distill=0"
        )
    if getattr(config, "has_few_bits", False):
        raise ValueError(
            "distill does not work with adapter_bits or classifier_bits below 32: the teacher would be given the "
            "codes of today's weights; pass distill=0, or 32 bits"
        )
    if args.torch_compile:
        raise ValueError("distill does not work with torch_compile=True; drop one of the two")
    if args.n_gpu > 1:
        raise ValueError(
            f"distill does not work with nn.DataParallel, which Trainer uses on {args.n_gpu} GPUs in one process; "
            "start one process per GPU (torchrun), or let one GPU be seen (CUDA_VISIBLE_DEVICES=0)"
        )
    distributed_type = AcceleratorState().distributed_type
    if distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            f"distill does not work under {distributed_type.value}, which shards what the teacher is copied from; use "
            "DistributedDataParallel, or distill=0"
        )


def _changing(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """`{name: tensor}` of what training and selection change: parameters that are trained, and the adapter's masks."""
    mask = re.compile(rf"_mask\.{re.escape(adapter_name)}\.off$")
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if mask.search(name)}


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, without a call of `train` or `eval`, which some modules act on."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
