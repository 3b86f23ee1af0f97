"""Label names beside an adapter's weights, for adapters of every type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .atomic import write_atomically
from .ordinary import check_ordinary
from .settings import read_json


# Not config.json: transformers takes a folder that has one for a full checkpoint and no longer for an adapter.
LABELS_FILE = "labels.json"


def write_labels(folder: str | os.PathLike, id2label: dict[int, str]) -> None:
    """Store label names beside an adapter; `load_image_classifier` reads them for adapters of every type."""
    write_atomically(Path(folder) / LABELS_FILE, json.dumps({"id2label": id2label}, indent=1, ensure_ascii=False))


def read_labels(folder: str | os.PathLike) -> dict[int, str] | None:
    """The label names stored in an adapter's folder, None if there are none.

    Raises:
        ValueError: The file is not what `write_labels` writes.
    """
    path = Path(folder) / LABELS_FILE
    if not path.exists():
        return None
    check_ordinary(path)
    try:
        labels = {int(index): str(label) for index, label in read_json(path)["id2label"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is not a label file, expected {{"id2label": {{"0": "name", …}}}}: {error}'
        ) from error
    missing = next((index for index in range(len(labels)) if index not in labels), None)
    if missing is not None:
        raise ValueError(
            f"{path} names no class {missing}, but others up to {max(labels)}; expected all from 0 on, without gaps"
        )
    return labels


def find_labels(path_or_repo: str, subfolder: str | None = None, **download_kwargs: Any) -> dict[int, str] | None:
    """The label names of an adapter in a folder or on the Hub; None if it has none, or only numbered ones."""
    folder = Path(path_or_repo, subfolder or "")
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(path_or_repo, LABELS_FILE, subfolder=subfolder, **download_kwargs)).parent
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
    labels = read_labels(folder)
    numbered = labels and all(label == f"LABEL_{index}" for index, label in labels.items())
    return None if numbered else labels
