"""Folders of images as `datasets` reads them (`train_dir`, `validation_dir`), and why they have no labels."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import datasets

from .._compat.libraries import image_suffixes
from ..adapter_folder.ordinary import check_regular
from .files import HIDDEN, files_below


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def load_folders(folders: dict[str, str | None], cache_dir: str | None) -> datasets.DatasetDict:
    """Image folders with one sub-folder per class, by split. Linked folders are followed as long as they stay inside.

    Raises:
        FileNotFoundError: A folder is missing, or has no images.
        ValueError: A linked folder leads out; an image is a pipe or a device; images lie at different depths,
            or so deep that it is not clear which folder is their class.
    """
    given = {split: folder for split, folder in folders.items() if folder is not None}
    images, has_metadata = {}, False
    for split, folder in given.items():
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{'train' if split == 'train' else 'validation'}_dir {folder!r} is not a folder")
        images[split] = image_files(folder)
        has_metadata |= any(os.path.basename(path) in METADATA for path in images[split])
    if not has_metadata:
        for split, folder in given.items():
            check_depths(folder, images[split])
        if any(map(_is_read_otherwise, given.values())):
            return _as_datasets(images)
    data_files = {split: os.path.join(glob.escape(folder), "**") for split, folder in given.items()}
    try:
        return datasets.load_dataset("imagefolder", data_files=data_files, cache_dir=cache_dir)
    except (FileNotFoundError, ValueError) as error:  # no files, or none that are images
        raise FileNotFoundError(f"no images in {', '.join(given.values())}") from error


def image_files(folder: str) -> list[str]:
    """The images and lists of metadata at any depth, sorted; hidden ones are skipped.

    Raises:
        ValueError: A linked folder leads out, or something named like an image is a pipe, a device or a broken link.
    """
    suffixes = image_suffixes()
    found = []
    for path in files_below(folder, os.path.realpath(folder)):
        if path.lower().endswith(suffixes):
            try:
                check_regular(path)
            except (ValueError, OSError) as error:
                raise ValueError(f"image {path} cannot be read: {error}") from error
            found.append(path)
        elif os.path.basename(path) in METADATA:
            found.append(path)
    return sorted(found)


def check_depths(folder: str, images: list[str]) -> None:
    """Raise ValueError where it is not clear which folder is an image's class."""
    parts = [Path(path).relative_to(folder).parts for path in images]
    shallow, deep = min(parts, key=len, default=()), max(parts, key=len, default=())
    one = "there should be one sub-folder per class, with its images in it and no folders (cat/1.png, dog/2.png)"
    if len(shallow) != len(deep):
        raise ValueError(
            f"images lie at different depths in {folder}, {'/'.join(shallow)} and {'/'.join(deep)}: {one}"
        )
    if len(deep) > 2 and len({path[:-2] for path in parts}) > 1:
        raise ValueError(
            f"images lie {len(deep) - 1} folders deep in {folder}, such as {'/'.join(deep)}, whose class could be "
            f"{deep[0]} or {deep[-2]}: {one}"
        )


def why_no_labels(folder: str | None) -> str:
    """The end of a message: what keeps `datasets` from taking the sub-folders as labels."""
    if folder is None or not os.path.isdir(folder):
        return ""
    images = image_files(folder)
    metadata = next((path for path in images if os.path.basename(path) in METADATA), None)
    if metadata is not None:
        return f". {metadata} replaces the sub-folders as labels: write the labels into it as well, or move it away"
    try:
        check_depths(folder, images)
    except ValueError as error:
        return f". {error}"
    return ""


def _is_read_otherwise(folder: str) -> bool:
    """Whether `datasets` would read other images: it leaves out linked folders, and reads folders that we skip."""
    found = ((path, name) for path, names, _ in os.walk(folder) for name in names)
    return any(name in HIDDEN or os.path.islink(os.path.join(path, name)) for path, name in found)


def _as_datasets(images: dict[str, list[str]]) -> datasets.DatasetDict:
    """What `datasets` makes of images: the folder of an image is its class, unless there is only one folder."""
    classes = {split: [os.path.basename(os.path.dirname(path)) for path in paths] for split, paths in images.items()}
    names = sorted({name for found in classes.values() for name in found})
    data = datasets.DatasetDict()
    for split, paths in images.items():
        columns, features = {"image": paths}, {"image": datasets.Image()}
        if len(names) > 1:
            columns["label"], features["label"] = classes[split], datasets.ClassLabel(names=names)
        data[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return data
