"""Finds what keeps heads from being scored, before training begins rather than after the warm-up."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerState, TrainingArguments

from ..heads.criterion_registry import find_criterion
from ..heads.protocol import module_patterns
from .gated_modules import needs_gates
from .scorer import HeadScorer
from .window import SelectionWindow


def check_deepspeed(args: TrainingArguments, config: Any) -> None:
    """Raise ValueError for settings that do not work with DeepSpeed.

    Args:
        args: Trainer's arguments.
        config: The adapter's configuration.
    """
    state = AcceleratorState()
    if state.distributed_type != DistributedType.DEEPSPEED:
        return
    if getattr(config, "use_dora", False) and state.deepspeed_plugin.zero_stage == 3:
        # saving needs the norms of frozen rows, and only one process saves
        raise ValueError("DoRA with ZeRO 3: the adapter could not be saved; use ZeRO 1 or 2, or use_dora=False")
    # DeepSpeed keeps its loss scale to itself, and has changed it by the time a callback could ask
    if args.fp16 or state.mixed_precision == "fp16":
        raise ValueError(
            "fp16=True with DeepSpeed: the heads' scores would be those of a scaled loss; train with bf16=True, or with "
            "fp16=True without DeepSpeed"
        )


def check_compilation(args: TrainingArguments, config: Any) -> None:
    """Raise ValueError if Trainer compiles the model, whose heads or neurons need gates.

    Args:
        args: Trainer's arguments.
        config: The adapter's configuration.
    """
    if args.torch_compile and needs_gates(config):
        raise ValueError(
            "torch_compile=True: a compiled model overlooks hooks that come later, so that no gates can be put on its heads "
            "and neurons for the scoring; train without torch_compile, or choose a criterion that needs no gates "
            "(absolute, grad_norm)"
        )


def check_windows(scorer: HeadScorer, windows: Sequence[SelectionWindow], state: TrainerState) -> None:
    """Raise ValueError for a first cut that scores could not decide; warn of a last one that nothing follows.

    Args:
        scorer: The adapter's scorer.
        windows: The windows of all cuts.
        state: Trainer's state.
    """
    first, last = windows[0], windows[-1]
    if first.last == 1 and not state.global_step:
        check_first_step(scorer, first.asked)
    if last.last == state.max_steps and switches_off(scorer.config):
        warnings.warn(
            f"{last.asked} selects heads at step {last.last}, the last of training: no step is trained with the masks"
        )


def switches_off(config: Any) -> bool:
    """Whether an adapter's settings switch any head or neuron off."""
    return config.masks_heads or bool(getattr(config, "neuron_ratio", None))


def check_first_step(scorer: HeadScorer, asked: str) -> None:
    """Raise ValueError if heads are to be selected after step 1 alone by scores that can only be zero.

    Args:
        scorer: The adapter's scorer.
        asked: The user's request, as the message quotes it.
    """
    config = scorer.config
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


def check_late_selection(scorer: HeadScorer, step: int, select_step: int) -> None:
    """Raise ValueError if a run resumes after the selection step, and has nothing to select heads by.

    Args:
        scorer: The adapter's scorer, with the statistics of the checkpoint.
        step: The step at which training resumes.
        select_step: The step after which heads were to be selected.
    """
    config = scorer.config
    by_gradients = config.masks_heads and find_criterion(config.criterion).needs_gradients
    by_gates = switches_off(config) and needs_gates(config)
    if (by_gradients or by_gates) and not scorer.num_steps:
        raise ValueError(
            f"training resumes at step {step}, after the selection of heads at step {select_step}, and the checkpoint "
            f"holds neither masks nor scores; pass a select_at of more than {step}"
        )
