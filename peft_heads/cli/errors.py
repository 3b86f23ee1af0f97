"""Errors that are no bugs, in one line for the user; a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from safetensors import SafetensorError

from .._compat.libraries import is_network_error
from ..adapter_folder.weights_file import one_line


TRACEBACK = "PEFT_HEADS_TRACEBACK"  # set in the environment, every error keeps its traceback
INTERRUPTED = 130  # exit code of a command that Ctrl-C has ended, as shells have it

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Messages of a full disk without an error number, from safetensors (Rust) and torch's writer of archives (C++).
FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded", "File too large")
WRITER_TEXTS = ("PytorchStreamWriter failed writing", "iostream error", "unexpected pos")


class CommandError(Exception):
    """Message of a command to its user, where the machine is at fault and not the arguments."""


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line for the user; None for what may be a bug.

    The exit code is 2 for a wrong argument or unusable data that a check of this package has found. It is 1 for what
    the machine or the network has refused: a full disk, a folder without permission, a Hub that cannot be reached.
    """
    if os.environ.get(TRACEBACK):
        return None
    if isinstance(error, (ValueError, FileNotFoundError)) and raised_by_this_package(error):
        return 2, str(error)
    if isinstance(error, CommandError):
        return 1, str(error)
    full = disk_full(error)
    if full is not None:
        return 1, f"the disk is full: {full}"
    if isinstance(error, (OSError, SafetensorError)) or is_network_error(error):
        return 1, one_line(error)
    return None


def disk_full(error: BaseException) -> str | None:
    """What could not be written because a disk or a quota is full; None if the error has another reason."""
    for cause in _causes(error):
        text = one_line(cause)
        if isinstance(cause, OSError) and cause.errno in FULL:
            return text if cause.filename is None else f"{cause.filename}: {cause.strerror}"
        if any(known in text for known in FULL_TEXTS):
            return text
        if isinstance(cause, RuntimeError) and any(known in text for known in WRITER_TEXTS):
            return f"torch could not write: {text}"
    return None


def raised_by_this_package(error: BaseException) -> bool:
    """Whether a check of this package raised the error, so that its message is for the user."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "peft_heads"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
