"""Decoded and resized images on disk, made once and read by any number of runs and processes.

An entry is a folder named after the key, with `pixels.bin` (uint8, one image after another, each (3, H, W)) and
`entry.json`, which has a checksum of every image. The key covers everything that changes pixels, the files' contents
above all. An entry is written under another name and renamed when it is complete; while one process makes an entry,
others that need it wait. Every image is compared with its checksum whenever it is read; a damaged entry is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import filelock
import PIL

from ..adapter_folder.atomic import new_folder
from .cache_entry import ENTRY, PIXELS, CacheEntry, checksum, folder_size, read_entry
from .decoding import read_pixels
from .files import content_hashes
from .preprocessing import Preprocessing


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
CHUNK = 64  # images decoded before they are written
# an entry or, with an underscore, an unfinished one (see `new_folder`)
FOLDER_NAME = re.compile(r"([0-9a-f]{64})|_([0-9a-f]{64})\..+")


def default_cache_dir() -> Path:
    """`PEFT_HEADS_CACHE` of the environment, or `~/.cache/peft_heads/images`."""
    return Path(os.environ.get("PEFT_HEADS_CACHE") or "~/.cache/peft_heads/images").expanduser()


def pixel_key(rows: datasets.Dataset, preprocessing: Preprocessing, fingerprint: str) -> str:
    """The sha256 (hexadecimal) of everything that changes the pixels of the column `image`, which is not decoded.

    These are the list (`fingerprint`), content and time of every file (or the bytes themselves), the preprocessing
    without the normalisation, and the versions of Pillow and of the entry's format.

    Raises:
        ValueError, FileNotFoundError: A file cannot be read, or is gone.
    """
    settings = {
        "format": FORMAT_VERSION,
        "pillow": PIL.__version__,
        "fingerprint": fingerprint,
        "preprocessing": preprocessing.pixel_settings(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    images = rows["image"]
    hashes = iter(content_hashes(image["path"] for image in images if image["bytes"] is None))
    for image in images:
        if image["bytes"] is not None:
            digest.update(hashlib.sha256(image["bytes"]).digest())
        else:
            digest.update(next(hashes) + f" {os.stat(image['path']).st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cached_entry(
    rows: datasets.Dataset,
    preprocessing: Preprocessing,
    fingerprint: str,
    *,
    description: str = "images",
    cache_dir: str | os.PathLike | None = None,
    workers: int | None = None,
) -> CacheEntry:
    """The entry of these images; it is made if there is none.

    Args:
        rows: Data set with a column `image` that is not decoded.
        fingerprint: Fingerprint of the list that the rows come from.
        description: Name of the images, for people who ask what takes up their disk.
        cache_dir: Folder of the entries; default `default_cache_dir()`.
        workers: Number of threads that decode; default: that of `ThreadPoolExecutor`.

    Raises:
        ValueError: An image cannot be decoded (the message names its file), or `cache_dir` cannot be written.
            Nothing is left behind.
        FileNotFoundError: A file is gone.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = folder / pixel_key(rows, preprocessing, fingerprint)
    entry = read_entry(target)
    if entry is not None:
        return entry
    with _locked(target) as alone:
        entry = read_entry(target)  # made by the process that this one has waited for
        if entry is None:
            if target.exists():
                _warn_of_damage(target, description)
            _remove(target, alone)
            _write_entry(rows, preprocessing, fingerprint, description, target, workers)
            entry = read_entry(target)
    return entry


def remake_entry(
    damaged: CacheEntry,
    rows: datasets.Dataset,
    preprocessing: Preprocessing,
    fingerprint: str,
    workers: int | None = None,
) -> CacheEntry:
    """Make an entry again that has a damaged image, with one warning, unless another process has done so meanwhile.

    Arguments and errors as for `cached_entry`; and ValueError if the images are no longer those of the entry.
    """
    target = damaged.path
    with _locked(target) as alone:
        entry = read_entry(target)
        if entry is None or entry.is_damaged():
            _warn_of_damage(target, damaged.description)
            _remove(target, alone)
            _write_entry(rows, preprocessing, fingerprint, damaged.description, target, workers)
            entry = read_entry(target)
    return entry


def cache_entries(cache_dir: str | os.PathLike | None = None) -> list[CacheEntry]:
    """The complete entries, sorted by their descriptions."""
    entries = filter(None, map(read_entry, _folders(cache_dir)))
    return sorted(entries, key=lambda entry: (entry.description, entry.path))


def cache_size(cache_dir: str | os.PathLike | None = None) -> int:
    """The size of the cache in bytes, unfinished entries included."""
    return sum(map(folder_size, _folders(cache_dir)))


def clean_cache(cache_dir: str | os.PathLike | None = None) -> int:
    """Delete all entries except those that are being made; returns the number of bytes that were freed.

    Only what the cache has written is deleted, whatever else is in the folder. A process that has an entry open can
    still read it (not on Windows).
    """
    freed = 0
    for path in _folders(cache_dir):
        target = path.parent / _key(path)
        with contextlib.suppress(filelock.Timeout), _locked(target, wait=False):
            freed += folder_size(path)
            shutil.rmtree(path)
            _lock_file(target).unlink(missing_ok=True)
    return freed


def _warn_of_damage(target: Path, description: str) -> None:
    warnings.warn(
        f"the image cache's entry {target} ({description}) is damaged: it is not what was written there. It is made "
        "again; check the disk"
    )


def _remove(target: Path, alone: bool) -> None:
    """Delete a damaged entry, and what killed processes have left of it if no other process can be at work."""
    for path in _folders(target.parent):
        if path == target or (alone and _key(path) == target.name):
            shutil.rmtree(path)


def _write_entry(
    rows: datasets.Dataset,
    preprocessing: Preprocessing,
    fingerprint: str,
    description: str,
    target: Path,
    workers: int | None,
) -> None:
    try:
        with new_folder(target) as folder:
            shapes, checksums = _write_pixels(rows["image"], preprocessing, folder / PIXELS, workers)
            content = {"format": FORMAT_VERSION, "description": description, "shapes": shapes, "checksums": checksums}
            (folder / ENTRY).write_text(json.dumps(content), encoding="utf-8")
            if pixel_key(rows, preprocessing, fingerprint) != target.name:
                raise ValueError(f"{description}: the files have changed since they were looked at; start again")
    except (OSError, ValueError):
        if read_entry(target) is None:  # where files cannot be locked, another process may have been faster
            raise
    logger.info("%s: decoded into %s (%.1f MB)", description, target.parent, folder_size(target) / 1e6)


def _write_pixels(
    images, preprocessing: Preprocessing, path: Path, workers: int | None
) -> tuple[list[tuple[int, int]], list[int]]:
    """Write all images into one file; returns their shapes and checksums."""
    shapes, checksums = [], []
    with open(path, "wb") as file, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            for pixels in pool.map(lambda image: read_pixels(image, preprocessing), chunk):
                file.write(pixels.data)
                shapes.append(pixels.shape[1:])
                checksums.append(checksum(pixels, shapes[-1]))
    return shapes, checksums


def _folders(cache_dir: str | os.PathLike | None) -> list[Path]:
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if FOLDER_NAME.fullmatch(path.name) and path.is_dir()]


def _key(path: Path) -> str:
    return "".join(filter(None, FOLDER_NAME.fullmatch(path.name).groups()))


def _lock_file(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


@contextlib.contextmanager
def _locked(target: Path, wait: bool = True) -> Iterator[bool]:
    """Let one process at a time work on an entry; yields False where files cannot be locked.

    The lock of a process that is killed is free again.
    """
    lock = filelock.FileLock(_lock_file(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except NotImplementedError:  # a file system without locks; renaming is safe all the same
        pass
    except OSError as error:
        if isinstance(error, filelock.Timeout):
            raise
        raise ValueError(
            f"the image cache {target.parent} cannot be written ({error.strerror}): choose another folder, by the "
            "environment variable PEFT_HEADS_CACHE for example"
        ) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()
