"""Whether a path is an ordinary file: a pipe or a device could be read without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def check_regular(path: str | os.PathLike) -> os.stat_result:
    """The system's information on a file.

    Raises:
        ValueError: It is not a regular file; the message continues a sentence that names the file.
        OSError: There is none.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("is not a regular file")
    return info


def check_ordinary(path: Path) -> None:
    """Raise ValueError, naming the path, unless it is an ordinary file or missing."""
    try:
        check_regular(path)
    except OSError:
        return  # missing, or unreadable: the error of reading it says more
    except ValueError as error:
        kind = "a folder" if path.is_dir() else "no ordinary file (a pipe or a device)"
        raise ValueError(f"{path} is {kind}; expected a file of an adapter") from error
