"""`--push_to_hub`: refused before the training if it cannot work, and harmless if it fails afterwards."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_token
from transformers import Trainer, TrainingArguments

from .._compat.libraries import is_network_error
from ..adapter_folder.weights_file import one_line


def check_hub(args: TrainingArguments) -> None:
    """Raise ValueError if the Hub is to be used and the environment forbids it, or there is no token."""
    if not args.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push_to_hub needs the Hub, but HF_HUB_OFFLINE is set. {_without(args)}")
    if not (args.hub_token or get_token()):
        raise ValueError(
            f"--push_to_hub needs a token: log in with `hf auth login`, or give --hub_token. {_without(args)}"
        )


@contextmanager
def reachable_hub(args: TrainingArguments) -> Iterator[None]:
    """Around the creation of the repository, before the training; raises ValueError if the Hub refuses or is away."""
    try:
        yield
    except Exception as error:
        if not args.push_to_hub or not _of_hub(error):
            raise
        raise ValueError(f"--push_to_hub: {one_line(error)}. {_without(args)}") from error


def push(trainer: Trainer) -> str | None:
    """Upload what was saved.

    Returns None. If the upload failed: why, where everything lies, and how to upload it later.
    """
    try:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    except Exception as error:
        if not _of_hub(error):
            raise
        return (
            f"--push_to_hub: {one_line(error)}. Nothing is lost: all that was trained lies in "
            f"{trainer.args.output_dir}; upload it later: {_upload(trainer.args)}"
        )
    return None


def _of_hub(error: Exception) -> bool:
    return isinstance(error, OSError) or is_network_error(error)


def _without(args: TrainingArguments) -> str:
    return f"Nothing was trained; without --push_to_hub it is, and can be uploaded later: {_upload(args)}"


def _upload(args: TrainingArguments) -> str:
    folder = Path(args.output_dir)
    repository = args.hub_model_id or folder.absolute().name
    return f"hf upload {shlex.quote(repository)} {shlex.quote(str(folder))} --exclude 'checkpoint-*' '_*'"
