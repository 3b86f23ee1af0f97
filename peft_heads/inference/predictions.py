"""The most probable classes of image files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._compat.libraries import image_suffixes
from ..data.files import files_below
from ..data.images import ImageTransform
from .classifiers import Classifier


FORMATS = ("text", "csv", "json")


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        file: Path of the image, as it was given or found.
        classes: Labels with their probabilities, the most probable first.
    """

    file: str
    classes: list[tuple[str, float]]


def find_images(paths: Iterable[str | os.PathLike]) -> list[str]:
    """The given files, and the image files at any depth in the given folders, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: One of the paths does not exist.
        ValueError: A folder holds no image, or a link that leads out of it.
    """
    found = []
    for path in map(os.fspath, paths):
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise FileNotFoundError(f"there is no file or folder {path}")
            found.append(path)
            continue
        suffixes = image_suffixes()
        images = sorted(name for name in files_below(path, os.path.realpath(path)) if name.lower().endswith(suffixes))
        if not images:
            raise ValueError(f"the folder {path} holds no images (files that end in .jpg, .png, .tif, …)")
        found += images
    return found


def predict(
    classifier: Classifier,
    files: Iterable[str],
    batch_size: int = 8,
    top_k: int = 1,
    unreadable: Callable[[ValueError], None] | None = None,
) -> Iterator[Prediction]:
    """Predict the classes of image files, decoded and preprocessed as in training, in their order.

    Args:
        top_k: Number of classes for each image; all of them if there are fewer.
        unreadable: Function that is told of every image that cannot be read, which is then passed over. Without it the
            first such image is an error.

    Raises:
        ValueError: An image cannot be read; or `batch_size` or `top_k` is below 1.
    """
    for name, value in (("batch_size", batch_size), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    labels = classifier.id2label
    for names, pixel_values in read_batches(classifier.image_processor, files, batch_size, unreadable):
        probabilities = classifier.logits(pixel_values).softmax(dim=-1)
        best = probabilities.topk(min(top_k, probabilities.shape[-1]))
        for name, values, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Prediction(name, [(labels[i], value) for i, value in zip(indices, values, strict=True)])


def read_batches(
    image_processor: Any,
    files: Iterable[str],
    batch_size: int,
    unreadable: Callable[[ValueError], None] | None = None,
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Files and their `pixel_values` (images, channels, height, width), at most `batch_size` at once, of one size."""
    transform = ImageTransform(image_processor)
    names, images = [], []
    for file in files:
        try:
            image = transform.pixel_values([file])
        except ValueError as error:
            if unreadable is None:
                raise
            unreadable(error)
            continue
        if images and (len(images) == batch_size or image.shape != images[0].shape):
            yield names, torch.cat(images)
            names, images = [], []
        names.append(file)
        images.append(image)
    if images:
        yield names, torch.cat(images)


def written(predictions: Iterable[Prediction], format: str) -> Iterator[str]:
    """Predictions as text, piece by piece: whole lines each.

    - "text": the file, and each label with its probability, between tabs.
    - "csv": the columns file, rank (from 1), label, probability.
    - "json": a list of `{"file": …, "predictions": [{"label": …, "probability": …}]}`.
    """
    if format == "text":
        for found in predictions:
            yield "\t".join([found.file, *(f"{label} {value:.4f}" for label, value in found.classes)]) + "\n"
    elif format == "csv":
        yield _csv("file", "rank", "label", "probability")
        for found in predictions:
            for rank, (label, value) in enumerate(found.classes, start=1):
                yield _csv(found.file, rank, label, f"{value:.6g}")
    else:
        before = "[\n"
        for found in predictions:
            classes = [{"label": label, "probability": float(f"{value:.6g}")} for label, value in found.classes]
            yield before + json.dumps({"file": found.file, "predictions": classes}, ensure_ascii=False)
            before = ",\n"
        yield "[]\n" if before == "[\n" else "\n]\n"


def label_of(file: str) -> str:
    """The name of the folder in which an image lies: its class in a folder of labelled images."""
    return Path(file).absolute().parent.name


def _csv(*values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
