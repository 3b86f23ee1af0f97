"""Images as the model's input, for a DataLoader: read from the cache, or decoded at every access."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import datasets
import numpy as np
import torch

from .cache_entry import CacheEntry
from .decoding import read_pixels
from .image_store import cache_entries, cache_size, cached_entry, clean_cache, remake_entry
from .preprocessing import Preprocessing
from .splits import Split


__all__ = [
    "CacheEntry",
    "CachedImages",
    "StreamedImages",
    "cache_entries",
    "cache_size",
    "clean_cache",
    "open_images",
]


class _Images(torch.utils.data.Dataset):
    """Examples `{"pixel_values": float32 (3, size, size), "labels": int}`.

    Attributes:
        labels: Class of every image.
        preprocessing: Preprocessing that was given.
    """

    def __init__(
        self,
        source: Split | datasets.Dataset,
        preprocessing: Preprocessing,
        *,
        augment: Callable[[list[torch.Tensor]], torch.Tensor] | None = None,
    ):
        """
        Args:
            source: Split, or dataset with columns `image` and `label` (class indices).
            augment: Function from a list of uint8 images (3, H, W) to float values in [0, 1] (images, 3, size, size),
                applied before the normalisation; see `augmentation`.

        Raises:
            ValueError: `preprocessing` leaves the crop to an augmentation and there is none, or labels are text.
        """
        if preprocessing.crop == "random" and augment is None:
            raise ValueError("crop='random' leaves the cropping to an augmentation: give augment, or crop='center'")
        self.rows = (source.dataset if isinstance(source, Split) else source).cast_column(
            "image", datasets.Image(decode=False)
        )
        self.labels = list(self.rows["label"])
        if not all(isinstance(label, int) for label in self.labels):
            raise ValueError("the column 'label' must hold class indices: dataset.class_encode_column('label')")
        self.preprocessing = preprocessing
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        indices = [range(len(self))[index] for index in indices]
        images = [torch.from_numpy(self.pixels(index)) for index in indices]
        if self.augment is not None:
            images = self.augment(images)
        return [
            {"pixel_values": self.preprocessing.normalize(image), "labels": self.labels[index]}
            for index, image in zip(indices, images, strict=True)
        ]

    def pixels(self, index: int) -> np.ndarray:
        """An image before augmentation and normalisation, uint8 (3, H, W)."""
        raise NotImplementedError


class CachedImages(_Images):
    """Images that were decoded and resized once; the first run makes the cache's entry.

    Every image is compared with its checksum when it is read. If the disk has changed it, the entry is made again, with
    one warning.

    Attributes:
        entry: The `CacheEntry`, with its folder and size.
    """

    def __init__(
        self,
        source: Split | datasets.Dataset,
        preprocessing: Preprocessing,
        *,
        augment: Callable[[list[torch.Tensor]], torch.Tensor] | None = None,
        cache_dir: str | os.PathLike | None = None,
        workers: int | None = None,
    ):
        """
        Args:
            cache_dir: Folder of the cache; default: `PEFT_HEADS_CACHE` of the environment, or
                `~/.cache/peft_heads/images`.
            workers: Number of threads that decode; default: that of `ThreadPoolExecutor`.

        Raises:
            ValueError: As above; or an image cannot be decoded, or `cache_dir` cannot be written.
            FileNotFoundError: A file is gone.
        """
        super().__init__(source, preprocessing, augment=augment)
        self._fingerprint = source.fingerprint if isinstance(source, Split) else _fingerprint(self.rows)
        self.entry = cached_entry(
            self.rows,
            preprocessing,
            self._fingerprint,
            description=f"{_title(source)}, {len(self):,} images",
            cache_dir=cache_dir,
            workers=workers,
        )
        self.entry.open()

    def pixels(self, index: int) -> np.ndarray:
        image = self.entry.image(index)
        if image is None:
            self.entry = remake_entry(self.entry, self.rows, self.preprocessing, self._fingerprint)
            image = self.entry.image(index)
        if image is None:
            raise ValueError(
                f"the image cache's entry {self.entry.path} is damaged, and again after it was made again: check the disk"
            )
        return image


class StreamedImages(_Images):
    """Images that are decoded at every access; the values are those of `CachedImages`, bit for bit.

    Raises (on access):
        ValueError: An image cannot be decoded; the message names its file.
    """

    def pixels(self, index: int) -> np.ndarray:
        return read_pixels(self.rows[index]["image"], self.preprocessing)


def open_images(
    source: Split | datasets.Dataset,
    preprocessing: Preprocessing,
    *,
    cache: bool | None = None,
    augment: Callable[[list[torch.Tensor]], torch.Tensor] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> CachedImages | StreamedImages:
    """Images from the cache, except test images, which are streamed: those of VTAB-1K are 58 GB at 224 x 224.

    Args:
        cache: Whether to cache; overrides that choice.
        source, preprocessing, augment, cache_dir: As for `CachedImages`.
    """
    if cache is None:
        cache = not (isinstance(source, Split) and source.name == "test")
    if cache:
        return CachedImages(source, preprocessing, augment=augment, cache_dir=cache_dir)
    return StreamedImages(source, preprocessing, augment=augment)


def _title(source: Split | datasets.Dataset) -> str:
    if not isinstance(source, Split):
        return str(source.split or "images")
    drawn = f" {source.shots} shots, seed {source.list_seed}" if source.shots else ""
    return f"{source.task.suite} {source.task.name} {source.name}{drawn}"


def _fingerprint(rows: datasets.Dataset) -> str:
    """The fingerprint of a dataset without a list: the names of its files. (Bytes are in the cache's key anyway.)"""
    paths = [image["path"] or "" for image in rows["image"]]
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()
