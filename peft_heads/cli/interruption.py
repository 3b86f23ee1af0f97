"""Messages when a training is interrupted or the disk is full: how far it came, and how to go on."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer

from ..adapter_folder.checkpoints import last_complete_checkpoint
from ..plugins import plugin_words
from .errors import CommandError, disk_full


SECRETS = ("--token", "--hub_token")


@contextmanager
def how_to_go_on(trainer: Trainer, argv: list[str]) -> Iterator[None]:
    """Around the training: Ctrl-C and a full disk are reported with the step and the command that resumes.

    Args:
        trainer: The training; its `output_dir` holds the checkpoints.
        argv: The words after `peft-heads train`.

    Raises:
        KeyboardInterrupt, CommandError: With a message for the user.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted at step {_where(trainer, argv)}") from interrupt
    except Exception as error:
        full = disk_full(error)
        if full is None:
            raise
        raise CommandError(f"the disk is full ({full}) at step {_where(trainer, argv)}") from error


def resume_command(argv: list[str], checkpoint: str) -> str:
    """The command that resumes this run from a checkpoint. The last of two equal arguments counts."""
    if "WORLD_SIZE" in os.environ:  # begun by torchrun or accelerate, whose own words are not known here
        return f"the same command and --resume_from_checkpoint {shlex.quote(checkpoint)}"
    words = [*plugin_words(), *_without_secrets(argv), "--resume_from_checkpoint", checkpoint]
    if any(word.partition("=")[0] == "--overwrite_output_dir" for word in argv):
        words.append("--overwrite_output_dir=false")
    return shlex.join(["peft-heads", "train", *words])


def _where(trainer: Trainer, argv: list[str]) -> str:
    args = trainer.args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the checkpoint that was being written
        last = last_complete_checkpoint(args.output_dir, args.save_only_model)
    step = f"{trainer.state.global_step:,} of {trainer.state.max_steps:,}"
    if last is None:
        return (
            f"{step}; there is no checkpoint to resume from (--save_steps and --save_strategy say when one is written)"
        )
    return f"{step}; resume with: {resume_command(argv, last)}"


def _without_secrets(argv: list[str]) -> list[str]:
    """The words without tokens: what a terminal shows ends in logs."""
    words = []
    for index, word in enumerate(argv):
        name, given, _ = word.partition("=")
        if index and argv[index - 1] in SECRETS:
            word = "TOKEN"
        elif name in SECRETS and given:
            word = f"{name}=TOKEN"
        words.append(word)
    return words
