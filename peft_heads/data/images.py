"""Image-classification data as a `datasets.DatasetDict`, and its preprocessing by the checkpoint's image processor.

The arguments have the names of transformers' image-classification example.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping

import datasets
import PIL.Image
import torch

from .._compat import load_pil_image_processor


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
    cache_dir: str | None = None,
    token: str | None = None,
) -> datasets.DatasetDict:
    """Load the splits "train" and "validation", whichever there are, and check their columns and labels.

    Args:
        dataset_name: A dataset of the Hub, a local folder that `load_dataset` can read, or a folder written by
            `save_to_disk` (nothing is ever written into it).
        dataset_config_name: The configuration of a Hub dataset.
        train_dir, validation_dir: Image folders with one sub-folder per class, instead of `dataset_name`.
        train_val_split: Share of the training images set aside (drawn with `seed`) where the data has no
            "validation" split; 0 or None sets nothing aside.
        max_train_samples, max_eval_samples: Keep that many images, drawn with `seed`.

    Raises:
        ValueError: contradictory arguments, wrong columns, or labels that cannot be trained on.
        FileNotFoundError: nothing to load under that name.
    """
    if dataset_name and (train_dir or validation_dir):
        raise ValueError("give either dataset_name or train_dir / validation_dir, not both")
    if dataset_name:
        data = _load_named(dataset_name, dataset_config_name, cache_dir, token)
    elif train_dir or validation_dir:
        data = _load_folders({"train": train_dir, "validation": validation_dir}, cache_dir)
    else:
        raise ValueError(
            "no data: give dataset_name (Hub or saved folder) or train_dir / validation_dir (image folders)"
        )

    data = datasets.DatasetDict({split: data[split] for split in ("train", "validation") if split in data} or data)
    for split, rows in data.items():
        _check_columns(split, rows, image_column_name, label_column_name)
        _check_labels(split, rows, label_column_name)
    _check_same_labels(data, label_column_name)
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


def load_image_processor(name_or_path: str, do_normalize: bool | None = None, **kwargs):
    """The checkpoint's image processor with the PIL backend: results do not depend on torchvision being there.

    Code that comes with it runs only with `trust_remote_code=True`; nobody is asked.

    Args:
        do_normalize: Overrides the checkpoint's own setting; it is saved with the processor.
    """
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
    return processor


class ImageTransform:
    """For `Dataset.with_transform`: a batch of images and labels to `pixel_values` (C, H, W) and `labels` (class index).

    The image processor does everything as the checkpoint was made for (resize, rescale, normalise). There is no
    random augmentation. Images that `datasets` has not decoded (`datasets.Image(decode=False)`) are decoded here.

    Raises:
        ValueError: An image cannot be decoded; the message names its file.
    """

    def __init__(self, processor, image_column: str = "image", label_column: str = "label", names=None):
        """`names`: the class names in order, needed where the label column holds strings."""
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.label2id = {name: index for index, name in enumerate(names or [])}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        images = [decode_image(image) for image in batch[self.image_column]]
        pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        labels = [self.label2id[x] if isinstance(x, str) else x for x in batch[self.label_column]]
        return {"pixel_values": list(pixel_values), "labels": labels}


def decode_image(image) -> PIL.Image.Image:
    """An image of a `datasets.Image` column, decoded or not, in RGB mode and the right way up (EXIF).

    Raises:
        ValueError: It cannot be decoded, or has more pixels than Pillow's limit; the message names its file.
    """
    if not isinstance(image, dict):
        return image.convert("RGB")
    try:
        return datasets.Image().decode_example(image).convert("RGB")
    # PIL raises SyntaxError for a damaged PNG
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"image {image['path'] or '(bytes without a name)'} cannot be read: {error}") from error


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack to `pixel_values` (batch, C, H, W) and `labels` (batch,), int64."""
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


def _load_folders(folders: dict[str, str | None], cache_dir: str | None) -> datasets.DatasetDict:
    data_files = {}
    for split, folder in folders.items():
        if folder is None:
            continue
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{'train' if split == 'train' else 'validation'}_dir {folder!r} is not a folder")
        data_files[split] = os.path.join(glob.escape(folder), "**")
    try:
        return datasets.load_dataset("imagefolder", data_files=data_files, cache_dir=cache_dir)
    except (FileNotFoundError, ValueError) as error:  # no files, or none that are images
        raise FileNotFoundError(f"no images in {', '.join(filter(None, folders.values()))}") from error


def _check_columns(split: str, rows: datasets.Dataset, image_column: str, label_column: str) -> None:
    found = ", ".join(f"{name!r} ({type(feature).__name__})" for name, feature in rows.features.items())
    if len(rows) == 0:
        raise ValueError(f"the split {split!r} has no rows")
    if image_column not in rows.features:
        raise ValueError(
            f"no image column {image_column!r} in split {split!r}; it has {found}: choose one with --image_column_name"
        )
    if not isinstance(rows.features[image_column], datasets.Image):
        raise ValueError(
            f"column {image_column!r} of split {split!r} holds no images; it has {found}: choose another with "
            "--image_column_name, or save the data after dataset.cast_column(name, datasets.Image())"
        )
    if label_column not in rows.features:
        raise ValueError(
            f"no label column {label_column!r} in split {split!r}; it has {found}: choose one with "
            "--label_column_name. An image folder needs at least two sub-folders, one per class (cat/1.png, dog/2.png)"
        )


def _check_labels(split: str, rows: datasets.Dataset, label_column: str) -> None:
    feature = rows.features[label_column]
    kind = "int" if isinstance(feature, datasets.ClassLabel) else getattr(feature, "dtype", "")
    if not kind.startswith(("int", "uint", "string", "large_string")):
        raise ValueError(
            f"column {label_column!r} of split {split!r} is {feature}: one class per image is needed (ClassLabel, "
            "integers or strings); choose another with --label_column_name"
        )
    values = rows.unique(label_column)
    if any(value is None or (isinstance(value, int) and value < 0) for value in values):
        raise ValueError(f"split {split!r} has images without a label (None or negative) in column {label_column!r}")


def _check_same_labels(data: datasets.DatasetDict, label_column: str) -> None:
    """A separate validation split must speak of the classes that are trained."""
    if not {"train", "validation"} <= set(data):
        return
    features = {split: data[split].features[label_column] for split in ("train", "validation")}
    if features["train"] != features["validation"]:
        raise ValueError(
            f"the label column {label_column!r} differs between the splits: train {features['train']}, "
            f"validation {features['validation']}; cast both to one ClassLabel"
        )
    values = {split: set(data[split].unique(label_column)) for split in features}
    unseen = sorted(values["validation"] - values["train"])
    if unseen:
        if isinstance(features["train"], datasets.ClassLabel):
            unseen = features["train"].int2str(unseen)
        raise ValueError(f"validation has labels that no training image has: {', '.join(map(str, unseen[:10]))}")


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
