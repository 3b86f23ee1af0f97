"""The offline suite's images: the labels can be measured in them, and they are always the same."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from peft_heads.data.image_folders import load_folder_split
from peft_heads.data.tasks import TASKS, find_task
from peft_heads.demo import offline_tasks
from peft_heads.demo.offline_tasks import draw_task, write_offline_task


NAMES = [task.name for task in TASKS if task.suite == "offline"]


@pytest.fixture(scope="module")
def drawn():
    return {name: draw_task(find_task(name, "offline")) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_balance(drawn, name):
    task = find_task(name, "offline")
    for split, (images, labels) in drawn[name].items():
        counts = np.bincount(labels, minlength=task.num_classes)
        assert images.dtype == np.uint8 and len(images) == len(labels) == task.sizes[split]
        assert counts.max() - counts.min() <= (1 if name != "digits" else len(labels) // 10)
    assert set(drawn[name]) == {"train", "val", "test"}


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_in_two_splits(drawn, name):
    digests = [hashlib.sha256(image).digest() for images, _ in drawn[name].values() for image in images]
    same = 0 if name != "digits" else 1  # one of scikit-learn's scans may be there twice
    assert len(digests) - len(set(digests)) <= same


def test_the_same_on_every_call(drawn):
    again = draw_task(find_task("distance", "offline"))
    for split, (images, labels) in drawn["distance"].items():
        assert np.array_equal(images, again[split][0]) and np.array_equal(labels, again[split][1])
    other = draw_task(find_task("distance", "offline"), seed=1)
    assert not np.array_equal(other["val"][0], again["val"][0])


def blobs(image):
    """Find connected bright regions, holes filled, without specks of noise: (labels, their numbers)."""
    regions, count = ndimage.label(ndimage.binary_fill_holes(ndimage.gaussian_filter(image.astype(float), 0.7) > 80))
    sizes = ndimage.sum_labels(np.ones_like(image), regions, range(1, count + 1))
    return regions, [i + 1 for i, size in enumerate(sizes) if size >= 4]


def centres(image):
    regions, numbers = blobs(image)
    return np.array(ndimage.center_of_mass(np.ones_like(image), regions, numbers)) + 0.5  # (y, x)


def test_count(drawn):
    images, labels = drawn["count"]["val"]
    right = [len(blobs(image)[1]) == label + 1 for image, label in zip(images, labels, strict=True)]
    assert np.mean(right) > 0.8  # faint and small ones are missed


def test_location(drawn):
    images, labels = drawn["location"]["val"]
    for image, label in zip(images, labels, strict=True):
        found = centres(image)
        assert len(found) == 1
        assert abs(found[0][1] - (4 + 3 * (label + 0.5))) < 2.5


def test_distance(drawn):
    images, labels = drawn["distance"]["val"]
    errors = []
    for image, label in zip(images, labels, strict=True):
        found = centres(image)
        if len(found) == 2:
            errors.append(abs(np.hypot(*(found[0] - found[1])) - (7 + 3 * (label + 0.5))))
    assert len(errors) > 150 and np.quantile(errors, 0.95) < 2.0  # half a class and the blur


def test_orientation(drawn):
    images, labels = drawn["orientation"]["val"]
    errors = []
    for image, label in zip(images, labels, strict=True):
        y, x = np.nonzero(image > 90)
        (a, b), (_, c) = np.cov(x, y)
        angle = 0.5 * np.arctan2(2 * b, a - c)
        errors.append(abs((angle - np.pi * (label + 0.5) / 8 + np.pi / 2) % np.pi - np.pi / 2))
    assert np.quantile(errors, 0.9) < np.pi / 16 + 0.15


def test_textures(drawn):
    """The first five textures are vertical, the others horizontal; and the band of frequencies rises."""
    images, labels = drawn["textures"]["test"]
    frequency = np.fft.fftfreq(32) * 32
    spectrum = np.abs(np.fft.fft2(images / 255.0 - 0.5)) ** 2
    spectrum[:, 0, 0] = 0
    radius = np.hypot(*np.meshgrid(frequency, frequency))
    means = [(spectrum[labels == k] * radius).sum() / spectrum[labels == k].sum() for k in range(10)]
    assert means[:5] == sorted(means[:5]) and means[5:] == sorted(means[5:])
    fx = (spectrum * np.abs(frequency)[None, None]).sum(axis=(1, 2))
    fy = (spectrum * np.abs(frequency)[None, :, None]).sum(axis=(1, 2))
    assert np.mean((fx > fy) == (labels < 5)) > 0.95


def test_written_as_image_folders(tmp_path, drawn):
    folder = write_offline_task(tmp_path, "digits")
    task = find_task("digits", "offline")
    for name in ("train", "val", "test"):
        split = load_folder_split(tmp_path, task, name)
        assert len(split.dataset) == task.sizes[name] and split.image_format == "PNG"
    images, labels = drawn["digits"]["val"]
    assert np.array_equal(Image.open(folder / "val" / f"{labels[7]:02}" / "0007.png"), images[7])
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*.png"))
    write_offline_task(tmp_path, "digits")
    assert before == sorted(path.stat().st_mtime_ns for path in folder.rglob("*.png"))


def test_several_processes_at_once(tmp_path, monkeypatch):
    drawings = []
    small = {split: (np.zeros((2, 8, 8), np.uint8), np.array([0, 1])) for split in ("train", "val", "test")}
    monkeypatch.setattr(offline_tasks, "draw_task", lambda task: drawings.append(task) or time.sleep(0.1) or small)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: write_offline_task(tmp_path, "digits"), range(4)))
    assert folders == {tmp_path / "digits"} and len(drawings) == 1


def test_unknown_task(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'cats' in the suite 'offline'"):
        write_offline_task(tmp_path, "cats")
