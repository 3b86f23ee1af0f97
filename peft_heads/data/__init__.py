"""Images for training and evaluation: data sets, benchmark trees, preprocessing, augmentation, and the image cache."""

from __future__ import annotations

import importlib
from typing import Any


# Imported when first used: the command line must not wait for `datasets` before it prints its help.
_HOMES = {
    "SUITES": "suites",
    "Augmentation": "augmentation",
    "CachedImages": "cache",
    "ImageTransform": "images",
    "Preprocessing": "preprocessing",
    "StreamedImages": "cache",
    "check_tasks": "loading",
    "collate": "images",
    "decode_image": "decoding",
    "find_task": "tasks",
    "label_names": "images",
    "load_image_dataset": "images",
    "load_image_processor": "images",
    "load_split": "trees",
    "load_task": "loading",
    "open_images": "cache",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
