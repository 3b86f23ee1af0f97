"""Checks that a data set has one image and one class per row, in the named columns; each message says the way out."""

from __future__ import annotations

import datasets

from .train_folders import why_no_labels


def check_columns(split: str, rows: datasets.Dataset, image_column: str, label_column: str, folder: str) -> None:
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
            + why_no_labels(folder)
        )


def check_labels(split: str, rows: datasets.Dataset, label_column: str) -> None:
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


def check_same_labels(data: datasets.DatasetDict, label_column: str) -> None:
    """Raise ValueError unless the validation split, if there is one, has the classes of the training split."""
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
