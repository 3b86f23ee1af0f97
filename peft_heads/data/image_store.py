"""Decoded and resized images on disk, made once and read by any number of runs and processes.

An entry is a folder named after the key, with `pixels.bin` (uint8, one image after another, each (3, H, W)) and
`entry.json`. The key covers everything that changes pixels. Entries are written beside and renamed; while one process
makes an entry, others that want it wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import filelock
import numpy as np
import PIL

from ..atomic import new_folder
from .images import decode_image
from .preprocessing import Preprocessing


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CHUNK = 64  # images that are decoded, then written
PIXELS, ENTRY = "pixels.bin", "entry.json"
# an entry, or with an underscore one that was not finished (see `new_folder`)
FOLDER_NAME = re.compile(r"([0-9a-f]{64})|_([0-9a-f]{64})\..+")


@dataclass(frozen=True, eq=False)
class CacheEntry:
    """A complete entry: its folder, size in bytes, the shapes (images, 2) of its images (H, W), and what it holds."""

    path: Path
    size: int
    shapes: np.ndarray
    description: str

    def pixels(self) -> np.memmap:
        """All pixels, mapped into memory, read-only (bytes,)."""
        return np.memmap(self.path / PIXELS, dtype=np.uint8, mode="r")

    def offsets(self) -> np.ndarray:
        """Where each image begins, and the end (images + 1,)."""
        return np.concatenate([[0], np.cumsum(3 * self.shapes.prod(axis=1))])


def default_cache_dir() -> Path:
    """`PEFT_HEADS_CACHE` of the environment, or `~/.cache/peft_heads/images`."""
    return Path(os.environ.get("PEFT_HEADS_CACHE") or "~/.cache/peft_heads/images").expanduser()


def pixel_key(rows: datasets.Dataset, preprocessing: Preprocessing, fingerprint: str) -> str:
    """sha256 (hexadecimal) of everything that changes the pixels of the column `image`, which is not decoded.

    That is the list (`fingerprint`), size and time of every file, or the bytes themselves, the preprocessing without
    the normalisation, Pillow's version and that of the entry's format.

    Raises:
        FileNotFoundError: A file is gone.
    """
    settings = {
        "format": FORMAT_VERSION,
        "pillow": PIL.__version__,
        "fingerprint": fingerprint,
        "preprocessing": preprocessing.pixel_settings(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for image in rows["image"]:
        if image["bytes"] is not None:
            digest.update(hashlib.sha256(image["bytes"]).digest())
            continue
        try:
            info = os.stat(image["path"])
        except OSError as error:
            raise FileNotFoundError(f"image {image['path']} is gone ({error.strerror})") from error
        digest.update(f"{info.st_size} {info.st_mtime_ns}\n".encode())
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
    """The entry of these images, made if there is none.

    Args:
        rows: With a column `image` that is not decoded.
        fingerprint: Of the list that the rows come from.
        description: For people who ask what takes up their disk.
        cache_dir: The folder of entries; default `default_cache_dir()`.
        workers: Threads that decode; default: those of `ThreadPoolExecutor`.

    Raises:
        ValueError: An image cannot be decoded (the message names its file), or `cache_dir` cannot be written.
            Nothing is left behind.
        FileNotFoundError: A file is gone.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = folder / pixel_key(rows, preprocessing, fingerprint)
    entry = _read_entry(target)
    if entry is not None:
        return entry
    with _locked(target) as alone:
        entry = _read_entry(target)  # of the process that was waited for
        if entry is None:
            for path in _folders(folder):
                # damaged, or of a process that was killed
                if path == target or (alone and _key(path) == target.name):
                    shutil.rmtree(path)
            _write_entry(rows, preprocessing, description, target, workers)
            entry = _read_entry(target)
    return entry


def cache_entries(cache_dir: str | os.PathLike | None = None) -> list[CacheEntry]:
    """The complete entries, in the order of their descriptions."""
    entries = filter(None, map(_read_entry, _folders(cache_dir)))
    return sorted(entries, key=lambda entry: (entry.description, entry.path))


def cache_size(cache_dir: str | os.PathLike | None = None) -> int:
    """Bytes in the cache, unfinished entries included."""
    return sum(map(_size, _folders(cache_dir)))


def clean_cache(cache_dir: str | os.PathLike | None = None) -> int:
    """Delete all entries but those that are being made; gives the number of bytes.

    Only what the cache has written is touched, whatever else is in the folder. A process that has an entry open goes
    on reading it (not on Windows).
    """
    freed = 0
    for path in _folders(cache_dir):
        target = path.parent / _key(path)
        with contextlib.suppress(filelock.Timeout), _locked(target, wait=False):
            freed += _size(path)
            shutil.rmtree(path)
            _lock_file(target).unlink(missing_ok=True)
    return freed


def _write_entry(rows, preprocessing: Preprocessing, description: str, target: Path, workers: int | None) -> None:
    try:
        with new_folder(target) as folder:
            shapes = _write_pixels(rows["image"], preprocessing, folder / PIXELS, workers)
            content = {"format": FORMAT_VERSION, "description": description, "shapes": shapes}
            (folder / ENTRY).write_text(json.dumps(content), encoding="utf-8")
    except (OSError, ValueError):
        if _read_entry(target) is None:  # where files cannot be locked, another process may have been faster
            raise
    logger.info("%s: decoded into %s (%.1f MB)", description, target.parent, _size(target) / 1e6)


def _write_pixels(images, preprocessing: Preprocessing, path: Path, workers: int | None) -> list[tuple[int, int]]:
    shapes = []
    with open(path, "wb") as file, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            for pixels in pool.map(lambda image: preprocessing.pixels(decode_image(image)), chunk):
                file.write(pixels.tobytes())
                shapes.append(pixels.shape[1:])
    return shapes


def _read_entry(path: Path) -> CacheEntry | None:
    """None if there is no complete entry."""
    try:
        content = json.loads((path / ENTRY).read_text(encoding="utf-8"))
        shapes = np.asarray(content["shapes"], dtype=np.int64).reshape(-1, 2)
        if (path / PIXELS).stat().st_size != 3 * shapes.prod(axis=1).sum():
            return None
        return CacheEntry(path, _size(path), shapes, str(content["description"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folders(cache_dir: str | os.PathLike | None) -> list[Path]:
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if FOLDER_NAME.fullmatch(path.name) and path.is_dir()]


def _key(path: Path) -> str:
    return "".join(filter(None, FOLDER_NAME.fullmatch(path.name).groups()))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _lock_file(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


@contextlib.contextmanager
def _locked(target: Path, wait: bool = True) -> Iterator[bool]:
    """One process at a time; the lock of a process that is killed is free again. False: nothing can be locked here."""
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
