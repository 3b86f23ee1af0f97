from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel
from sklearn.datasets import load_digits

from peft_heads.demo.digits import load_digits_dataset


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()


def pixel_bytes(split):
    return [image.tobytes() for image in split[:]["image"]]


def test_split_sizes_and_columns(digits):
    assert {name: len(split) for name, split in digits.items()} == {"train": 1000, "test": 797}
    for split in digits.values():
        assert split.column_names == ["image", "label"]


def test_labels_are_the_digits(digits):
    label = digits["train"].features["label"]
    assert isinstance(label, ClassLabel)
    assert label.names == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


def test_images_are_rgb_8x8_over_the_full_range(digits):
    for image in digits["test"][:20]["image"]:
        assert (image.mode, image.size) == ("RGB", (8, 8))
    values = np.stack([np.asarray(image) for image in digits["test"][:]["image"]])
    assert (values.min(), values.max()) == (0, 255)
    assert (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all()


def test_splits_partition_the_scans_with_their_labels(digits):
    raw = load_digits()
    expected = Counter(
        (np.rint(scan * 255 / 16).astype(np.uint8).tobytes(), int(y))
        for scan, y in zip(raw.images, raw.target, strict=True)
    )
    found = Counter()
    for split in digits.values():
        columns = split[:]
        found.update(
            (np.asarray(image)[..., 0].tobytes(), y)
            for image, y in zip(columns["image"], columns["label"], strict=True)
        )
    assert found == expected


def test_splits_are_stratified(digits):
    share = {name: np.bincount(split["label"], minlength=10) / len(split) for name, split in digits.items()}
    np.testing.assert_allclose(share["train"], share["test"], atol=0.002)


def test_split_depends_on_the_seed_alone(digits):
    again, other = load_digits_dataset(seed=0), load_digits_dataset(seed=1)
    for name in ("train", "test"):
        assert pixel_bytes(again[name]) == pixel_bytes(digits[name])
        assert again[name]["label"][:] == digits[name]["label"][:]
        assert pixel_bytes(other[name]) != pixel_bytes(digits[name])
