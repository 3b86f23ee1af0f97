"""The images of the offline suite: digits, and five generated tasks in the spirit of VTAB-1K's structured ones.

Grey images of 32 x 32 pixels (the digits, real scans, 8 x 8), as image folders. Nothing is downloaded; a
task's images are drawn from a seed of their own. As in VTAB-1K's structured tasks, there are weak cues beside the one
that is asked for (more shapes have more ink, distant ones lie nearer to the edges), and classes of measured values blur
at their borders. Lengths are in pixels, angles in radians, x to the right, y down.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split

from ..adapter_folder.atomic import new_folder
from ..data.tasks import OFFLINE, Task, find_task
from .digits import grey_digits


SIZE = 32
SEED = 20261125
TEXTURE_KINDS = 5

_X, _Y = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)


def write_offline_task(root: str | os.PathLike, name: str) -> Path:
    """Write `<root>/<name>/{train,val,test}/<class>/<index>.png`, unless it is there; complete or not at all.

    Args:
        root: Folder of the tasks.
        name: Name of a task of the suite.

    Raises:
        ValueError: There is no such task.
    """
    task = find_task(name, OFFLINE)
    folder = Path(root) / task.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / f".{task.name}.lock"):  # one of several processes writes it
        if not folder.exists():
            _write(task, folder)
    return folder


def _write(task: Task, folder: Path) -> None:
    with new_folder(folder) as target:
        for split, (images, labels) in draw_task(task).items():
            for label in range(task.num_classes):
                (target / split / f"{label:02}").mkdir(parents=True)
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(image).save(target / split / f"{label:02}" / f"{index:04}.png")


def draw_task(task: Task, seed: int = SEED) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`{split: (images uint8 (n, height, width), labels (n,))}` of a task of the suite."""
    if task.name == "digits":
        return _digits(task, seed)
    splits = {}
    for split, size in task.sizes.items():
        generator = np.random.default_rng([seed, zlib.crc32(f"{task.name} {split}".encode())])
        # as equal numbers of images per class as possible
        labels = generator.permutation(np.arange(size) % task.num_classes)
        images = np.stack([_photograph(_DRAWINGS[task.name](label, generator), generator) for label in labels])
        splits[split] = images, labels
    return splits


def _digits(task: Task, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    images, labels = grey_digits()
    rest, splits = np.arange(len(images)), {}
    for split in ("train", "val"):
        splits[split], rest = train_test_split(
            rest, train_size=task.sizes[split], stratify=labels[rest], random_state=seed
        )
    splits["test"] = rest
    return {split: (images[rows], labels[rows]) for split, rows in splits.items()}


def _photograph(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Grey levels (SIZE, SIZE) in [0, 1] to uint8, with random contrast and noise."""
    image = image * generator.uniform(0.6, 1.0) + generator.normal(0, 0.08, image.shape)
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8)


def _count(label: int, generator: np.random.Generator) -> np.ndarray:
    """One to eight separate discs, squares and rings; corners and noise may bridge a gap."""
    places: list[tuple[float, float, float]] = []
    image = np.zeros((SIZE, SIZE))
    while len(places) <= label:
        radius = generator.uniform(1.5, 3.0)
        x, y = generator.uniform(radius + 1, SIZE - radius - 1, 2)
        if all(math.hypot(x - a, y - b) > radius + r + 1.5 for a, b, r in places):
            places.append((x, y, radius))
            image = np.maximum(image, generator.uniform(0.7, 1) * _shape(generator, x, y, radius))
    return image


def _location(label: int, generator: np.random.Generator) -> np.ndarray:
    """A shape whose centre lies in one of eight columns."""
    radius, margin = generator.uniform(2.5, 5.5), 4.0
    width = (SIZE - 2 * margin) / 8
    x = margin + width * (label + generator.uniform(0, 1))
    return _shape(generator, x, generator.uniform(margin, SIZE - margin), radius)


def _orientation(label: int, generator: np.random.Generator) -> np.ndarray:
    """An ellipse or a bar in one of eight ranges of angles, which divide half a turn."""
    angle = math.pi * (label + generator.uniform(0, 1)) / 8
    x, y = generator.uniform(10, SIZE - 10, 2)
    length = generator.uniform(6, 10)
    width = length * generator.uniform(0.3, 0.6)
    u, v = _turned(x, y, angle)
    if generator.random() < 0.5:
        return _fill((np.hypot(u / length, v / width) - 1) * width)
    return _fill(np.maximum(np.abs(u) - length, np.abs(v) - width))


def _distance(label: int, generator: np.random.Generator) -> np.ndarray:
    """Two shapes whose centres are 7 to 25 pixels apart, in six classes."""
    while True:
        distance = 7 + 3 * (label + generator.uniform(0, 1))
        x, y, turn = generator.uniform(4, SIZE - 4), generator.uniform(4, SIZE - 4), generator.uniform(0, 2 * math.pi)
        other_x, other_y = x + distance * math.cos(turn), y + distance * math.sin(turn)
        if 4 <= other_x <= SIZE - 4 and 4 <= other_y <= SIZE - 4:
            break
    first = _shape(generator, x, y, generator.uniform(2, 3.2))
    return np.maximum(first, _shape(generator, other_x, other_y, generator.uniform(2, 3.2)))


def _textures(label: int, generator: np.random.Generator) -> np.ndarray:
    """Ten kinds of filtered noise: five frequency bands, each with vertical or horizontal stripes."""
    kind, lying = label % TEXTURE_KINDS, label >= TEXTURE_KINDS
    frequency = np.fft.fftfreq(SIZE) * SIZE  # cycles per image
    fx, fy = np.meshgrid(frequency, frequency)
    radius = np.hypot(fx, fy)
    angle = np.arctan2(fy, fx) - (math.pi / 2 if lying else 0) - generator.normal(0, 0.25)
    centre = 2.5 * 1.45**kind * math.exp(generator.normal(0, 0.1))
    band = np.exp(-0.5 * (np.log(np.maximum(radius, 0.5) / centre) / 0.3) ** 2) * np.exp(2.0 * np.cos(2 * angle))
    band[0, 0] = 0
    noise = np.fft.ifft2(np.fft.fft2(generator.normal(0, 1, (SIZE, SIZE))) * band).real
    return 0.5 + 0.2 * noise / noise.std()


def _shape(generator: np.random.Generator, x: float, y: float, radius: float) -> np.ndarray:
    """A disc, a square or a ring, rotated at random."""
    kind, (u, v) = generator.integers(3), _turned(x, y, generator.uniform(0, math.pi))
    if kind == 0:
        return _fill(np.hypot(u, v) - radius)
    if kind == 1:
        return _fill(np.maximum(np.abs(u), np.abs(v)) - radius * 0.88)
    return _fill(np.abs(np.hypot(u, v) - radius * 0.75) - radius * 0.3)


def _turned(x: float, y: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (SIZE, SIZE) of the pixels around (x, y), in axes rotated by `angle`."""
    cos, sin = math.cos(angle), math.sin(angle)
    return (_X - x) * cos + (_Y - y) * sin, (_Y - y) * cos - (_X - x) * sin


def _fill(distance: np.ndarray) -> np.ndarray:
    """1 inside, 0 outside, with a smooth edge of one pixel; `distance` from the outline, negative inside."""
    return np.clip(0.5 - distance, 0, 1)


_DRAWINGS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "count": _count,
    "location": _location,
    "orientation": _orientation,
    "distance": _distance,
    "textures": _textures,
}
