"""One entry of the cache of images: its files, read and compared with their checksums."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash


PIXELS, ENTRY = "pixels.bin", "entry.json"


@dataclass(frozen=True, eq=False)
class CacheEntry:
    """A complete entry.

    Attributes:
        path: Folder of the entry.
        size: Size in bytes.
        shapes: (H, W) of the images (images, 2).
        checksums: Checksums of the images, in the order of the shapes.
        description: Name of the images, for people.
    """

    path: Path
    size: int
    shapes: np.ndarray
    checksums: tuple[int, ...]
    description: str

    def open(self) -> None:
        """Map the pixels into memory now instead of at the first image: the entry may be deleted meanwhile."""
        self._pixels  # noqa: B018

    def image(self, index: int) -> np.ndarray | None:
        """The pixels of an image, uint8 (3, H, W); None if they are not what was written."""
        begin, end = self._offsets[index : index + 2]
        image, shape = np.array(self._pixels[begin:end]), self.shapes[index]
        return image.reshape(3, *shape) if checksum(image, shape) == self.checksums[index] else None

    def is_damaged(self) -> bool:
        """Whether any image is not what was written; reads all of them."""
        try:
            self.open()
        except (OSError, ValueError):  # gone, or empty
            return len(self.shapes) > 0
        return any(self.image(index) is None for index in range(len(self.shapes)))

    @cached_property
    def _pixels(self) -> np.memmap:
        """All pixels, mapped into memory, read-only (bytes,)."""
        return np.memmap(self.path / PIXELS, dtype=np.uint8, mode="r")

    @cached_property
    def _offsets(self) -> np.ndarray:
        """The beginning of each image, and the end of the last (images + 1,)."""
        return np.concatenate([[0], np.cumsum(3 * self.shapes.prod(axis=1))])

    def __getstate__(self) -> dict:
        """Without the mapped file, which every worker process maps itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_pixels"}


def checksum(pixels: np.ndarray, shape: tuple[int, int]) -> int:
    """The checksum (XXH3, 64 bits) of an image's contiguous bytes, and of its height and width."""
    return xxhash.xxh3_64_intdigest(pixels.data, seed=int(shape[0]) << 32 | int(shape[1]))


def read_entry(path: Path) -> CacheEntry | None:
    """The entry in a folder; None if it is not complete."""
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
