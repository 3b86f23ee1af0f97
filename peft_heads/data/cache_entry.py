"""One entry of the cache of images: its files, read and compared with their checksums."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash


PIXELS, ENTRY = "pixels.bin", "entry.json"


@dataclass(frozen=True, eq=False)
class CacheEntry:
    """A complete entry.

    Attributes:
        path: Its folder.
        size: In bytes.
        shapes: (H, W) of its images (images, 2).
        checksums: Of its images, in the order of the shapes.
        description: What it holds.
    """

    path: Path
    size: int
    shapes: np.ndarray
    checksums: tuple[int, ...]
    description: str

    def pixels(self) -> np.memmap:
        """All pixels, mapped into memory, read-only (bytes,)."""
        return np.memmap(self.path / PIXELS, dtype=np.uint8, mode="r")

    def offsets(self) -> np.ndarray:
        """Where each image begins, and the end (images + 1,)."""
        return np.concatenate([[0], np.cumsum(3 * self.shapes.prod(axis=1))])

    def is_damaged(self) -> bool:
        """Whether an image is not what was written; all are read."""
        try:
            pixels, offsets = self.pixels(), self.offsets()
        except (OSError, ValueError):  # gone, or empty
            return len(self.shapes) > 0
        ends = zip(offsets[:-1], offsets[1:], self.shapes, self.checksums, strict=True)
        return any(checksum(pixels[begin:end], shape) != expected for begin, end, shape, expected in ends)


def checksum(pixels: np.ndarray, shape: tuple[int, int]) -> int:
    """The checksum (XXH3, 64 bits) of an image's contiguous bytes, and of its height and width."""
    return xxhash.xxh3_64_intdigest(pixels.data, seed=int(shape[0]) << 32 | int(shape[1]))


def read_entry(path: Path) -> CacheEntry | None:
    """None if there is no complete entry."""
    try:
        content = json.loads((path / ENTRY).read_text(encoding="utf-8"))
        shapes = np.asarray(content["shapes"], dtype=np.int64).reshape(-1, 2)
        checksums = tuple(map(int, content["checksums"]))
        complete = (path / PIXELS).stat().st_size == 3 * shapes.prod(axis=1).sum() and (shapes > 0).all()
        if not complete or len(checksums) != len(shapes):
            return None
        return CacheEntry(path, folder_size(path), shapes, checksums, str(content["description"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
