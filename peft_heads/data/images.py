"""Image-classification data as a `datasets.DatasetDict`, and its preprocessing by the checkpoint's image processor.

The arguments have the names of transformers' image-classification example.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import datasets
import torch

from .._compat.transformers import load_pil_image_processor
from .dataset_checks import check_columns, check_labels, check_same_labels
from .decoding import NamingImage, decode_image, name_of
from .deep_images import check_image_range
from .preprocessing import resized_by_shorter_side
from .train_folders import load_folders


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    *,
    image_column_name: str = "image",
    label_column_name: str = "label",
    train_val_split: float | None = 0.15,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 42,
    image_range: tuple[float, float] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> datasets.DatasetDict:
    """Load the splits "train" and "validation", as far as they exist, and check their columns and labels.

    Images are decoded on access by `decode_image`: RGB, and errors name the file.

    Args:
        dataset_name: Dataset of the Hub, local folder that `load_dataset` can read, or folder written by
            `save_to_disk` (nothing is ever written into it).
        dataset_config_name: Configuration of a Hub dataset.
        train_dir, validation_dir: Image folders with one sub-folder per class, instead of `dataset_name`.
        train_val_split: Share of the training images set aside (drawn with `seed`) where the data has no
            "validation" split; 0 or None sets nothing aside.
        max_train_samples, max_eval_samples: Number of images to keep, drawn with `seed`.
        image_range: (LOW, HIGH), the values of black and white in images of more than 8 bits, see `decode_image`. Give
            it to `ImageTransform` as well.

    Raises:
        ValueError: Arguments contradict each other, columns are wrong, or labels cannot be trained on; folders are
            links that lead elsewhere, or images lie at different depths.
        FileNotFoundError: There is nothing to load under that name.
    """
    check_image_range(image_range)
    if dataset_name and (train_dir or validation_dir):
        raise ValueError("give either dataset_name or train_dir / validation_dir, not both")
    if dataset_name:
        data = _load_named(dataset_name, dataset_config_name, cache_dir, token)
    elif train_dir or validation_dir:
        data = load_folders({"train": train_dir, "validation": validation_dir}, cache_dir)
    else:
        raise ValueError(
            "no data: give dataset_name (Hub or saved folder) or train_dir / validation_dir (image folders)"
        )

    data = datasets.DatasetDict({split: data[split] for split in ("train", "validation") if split in data} or data)
    for split, rows in data.items():
        folder = dataset_name or (train_dir if split == "train" else validation_dir)
        check_columns(split, rows, image_column_name, label_column_name, folder)
        check_labels(split, rows, label_column_name)
        data[split] = rows.cast_column(image_column_name, NamingImage(rows.features[image_column_name], image_range))
    check_same_labels(data, label_column_name)
    if "validation" not in data and "train" in data and train_val_split:
        data = _split_off_validation(data["train"], train_val_split, seed)
    return _limit(data, {"train": max_train_samples, "validation": max_eval_samples}, seed)


def label_names(data: Mapping[str, datasets.Dataset], label_column_name: str = "label") -> list[str]:
    """The class names in the order of the class indices: `ClassLabel` names, integers as text, or sorted strings."""
    feature = next(iter(data.values())).features[label_column_name]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = {value for rows in data.values() for value in rows.unique(label_column_name)}
    if isinstance(next(iter(values)), str):
        return sorted(values)
    return [str(index) for index in range(max(values) + 1)]


def load_image_processor(
    name_or_path: str,
    do_normalize: bool | None = None,
    image_range: tuple[float, float] | None = None,
    **kwargs,
):
    """The checkpoint's image processor with the PIL backend, so that results do not depend on torchvision.

    Code that comes with the checkpoint runs only with `trust_remote_code=True`; nobody is asked.

    Args:
        do_normalize: Whether to normalise, instead of the checkpoint's own setting; saved with the processor.
        image_range: (LOW, HIGH), the values of black and white in images of more than 8 bits, for [`ImageTransform`];
            saved with the processor, which does not use it.

    Raises:
        FileNotFoundError: There is no image processor that can be read.
        ValueError: `image_range`, or the one that was saved, is not two numbers.
    """
    image_range = check_image_range(image_range)
    try:
        processor = load_pil_image_processor(name_or_path, **kwargs)
    # the last ones for JSON that is no mapping, of the wrong types, or nested too deeply
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise FileNotFoundError(
            f"no image processor in {str(name_or_path)!r}, its preprocessor_config.json is missing or cannot be read "
            f"({' '.join(str(error).split())}); name another checkpoint's with --image_processor_name"
        ) from error
    if do_normalize is not None:
        processor.do_normalize = do_normalize
    if image_range is not None:
        processor.image_range = list(image_range)
    image_range_of(processor)
    return processor


def image_range_of(processor) -> tuple[float, float] | None:
    """The values of black and white in images of more than 8 bits, as saved with an image processor, or None.

    Raises:
        ValueError: It is not two numbers.
    """
    return check_image_range(getattr(processor, "image_range", None))


class ImageTransform:
    """For `Dataset.with_transform`: turns images and labels into `pixel_values` (C, H, W) and `labels` (class index).

    The image processor does what the checkpoint was trained with (resize, rescale, normalise). There is no random
    augmentation. Images that `datasets` has not decoded (`datasets.Image(decode=False)`) are decoded here; only
    so, or after `load_image_dataset`, an error names the file and 16-bit colours are read in full.

    Raises:
        ValueError: An image cannot be decoded, or becomes too large; the message names its file.
    """

    def __init__(
        self,
        processor,
        image_column: str = "image",
        label_column: str = "label",
        names=None,
        image_range: tuple[float, float] | None = None,
    ):
        """
        Args:
            names: Class names in order, needed where the label column holds strings.
            image_range: (LOW, HIGH), the values of black and white in images of more than 8 bits, see `decode_image`.
                Default: `processor.image_range`; if given it is written there, and so saved with the processor.
        """
        if image_range is not None:
            processor.image_range = list(check_image_range(image_range))
        self.processor = processor
        self.image_range = image_range_of(processor)
        self.image_column = image_column
        self.label_column = label_column
        self.label2id = {name: index for index, name in enumerate(names or [])}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        labels = [self.label2id[x] if isinstance(x, str) else x for x in batch[self.label_column]]
        return {"pixel_values": list(self.pixel_values(batch[self.image_column])), "labels": labels}

    def pixel_values(self, images: list) -> torch.Tensor:
        """The model's input (images, C, H, W), float32, for images that `decode_image` accepts."""
        return self.processor([self._decode(image) for image in images], return_tensors="pt")["pixel_values"]

    def _decode(self, image):
        decoded = decode_image(image, self.image_range)
        shorter = dict(getattr(self.processor, "size", None) or {}).get("shortest_edge")
        longer = dict(self.processor.size).get("longest_edge") if shorter else None
        if shorter and not longer and getattr(self.processor, "do_resize", True):
            try:
                resized_by_shorter_side(decoded.size, shorter)
            except ValueError as error:
                raise ValueError(f"image {name_of(image)} cannot be resized: {error}") from error
        return decoded


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack examples to `pixel_values` (batch, C, H, W) and `labels` (batch,), int64."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples], dtype=torch.int64),
    }


def _load_named(name: str, config_name: str | None, cache_dir: str | None, token: str | None):
    is_dict, is_single = (os.path.isfile(os.path.join(name, f)) for f in ("dataset_dict.json", "state.json"))
    if is_dict or is_single:
        if config_name:
            raise ValueError(f"dataset_config_name={config_name!r} does not apply to {name}, saved by save_to_disk")
        data = datasets.load_from_disk(name)
        return data if is_dict else datasets.DatasetDict({"train": data})
    try:
        return datasets.load_dataset(name, config_name, cache_dir=cache_dir, token=token)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"no dataset {name!r}: neither a local folder nor reachable on the Hub ({type(error).__name__}: {error})"
        ) from error


def _split_off_validation(train: datasets.Dataset, share: float, seed: int) -> datasets.DatasetDict:
    if not 0 < share < 1:
        raise ValueError(f"train_val_split={share} must lie between 0 and 1")
    if len(train) < 2:
        raise ValueError("one training image cannot be split; give validation data or train_val_split=0")
    size = min(math.ceil(share * len(train)), len(train) - 1)
    # In memory: the order would otherwise be written next to the user's data (train_test_split cannot do without).
    rows = train.shuffle(seed=seed, keep_in_memory=True)
    return datasets.DatasetDict(
        {
            "train": rows.select(range(size, len(rows)), keep_in_memory=True),
            "validation": rows.select(range(size), keep_in_memory=True),
        }
    )


def _limit(data: datasets.DatasetDict, limits: dict[str, int | None], seed: int) -> datasets.DatasetDict:
    for split, limit in limits.items():
        if limit is None or split not in data:
            continue
        if limit < 1:
            name = "max_train_samples" if split == "train" else "max_eval_samples"
            raise ValueError(f"{name}={limit} must be at least 1")
        rows = data[split].shuffle(seed=seed, keep_in_memory=True)
        data[split] = rows.select(range(min(limit, len(rows))), keep_in_memory=True)
    return data
