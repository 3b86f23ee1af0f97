"""The local folder of an adapter, downloaded if a repository holds it."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, WEIGHTS_NAME


# The small files of an adapter; everything else that a repository may hold stays there.
FILES = ("*.json", "*.safetensors", WEIGHTS_NAME, "README.md")


def local_folder(path_or_repo: str | os.PathLike, subfolder: str | None = None, **kwargs: Any) -> str:
    """The folder of an adapter on this machine. It is downloaded once; afterwards everything is local.

    Args:
        path_or_repo: Folder or Hub repository of the adapter.
        subfolder: The adapter's folder inside of it.
        kwargs: `revision`, `token`, `cache_dir` of the repository.

    Raises:
        FileNotFoundError: There is neither a folder nor a repository of that name and revision, or it cannot be read.
        ValueError: It holds no adapter.
    """
    folder = os.fspath(path_or_repo)
    if not os.path.isdir(folder):
        patterns = [f"{subfolder}/{name}" for name in FILES] if subfolder else list(FILES)
        others = None if subfolder else "*/*"  # checkpoints that Trainer has pushed as well
        try:
            folder = snapshot_download(folder, allow_patterns=patterns, ignore_patterns=others, **kwargs)
        except (OSError, ValueError) as error:
            revision = f" at revision {kwargs['revision']!r}" if kwargs.get("revision") else ""
            raise FileNotFoundError(
                f"no adapter {path_or_repo!r}{revision}: neither a local folder nor a repository that can be read "
                f"({type(error).__name__}: {error})"
            ) from error
    folder = os.path.join(folder, subfolder) if subfolder else folder
    if not os.path.exists(os.path.join(folder, CONFIG_NAME)):
        raise ValueError(
            f"Can't find '{CONFIG_NAME}' in {path_or_repo}{f'/{subfolder}' if subfolder else ''}: it holds no adapter"
        )
    return folder
