"""Facts about the other libraries: Optuna, the Hub's client, datasets."""

from __future__ import annotations

from typing import Any


def trial_id(trial: Any) -> int:
    """The number by which an Optuna storage knows a trial.

    Delete when Optuna's trials have a public name for it.
    """
    return trial._trial_id


def is_network_error(error: BaseException) -> bool:
    """Whether an error comes from the HTTP library of the Hub's client, and is no `OSError`.

    huggingface_hub 0 uses requests, whose errors are `OSError`s; 1 uses httpx, and 2 httpx2.

    Delete when huggingface_hub raises errors of its own, or `OSError`, where no server answers.
    """
    return any(cls.__module__.partition(".")[0] in ("httpx", "httpx2") for cls in type(error).__mro__)


def image_suffixes() -> tuple[str, ...]:
    """Endings of the names of files that `datasets` takes as images in folders, in lower case.

    Delete when `datasets` follows linked folders and passes over those of file servers: nothing else needs them.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return tuple(ImageFolder.EXTENSIONS)
