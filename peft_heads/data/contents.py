"""What a list of a task's folder says, and everything that is wrong with it and with its files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import ImageFile, ImageFolder, content_hashes
from .layouts import Layout
from .lists import Row
from .tasks import Task


DRAW_SEED = 0
# JSON trees have no lists of their own for these
DRAWN = {"train800": "train800val200", "val200": "train800val200"}


@dataclass
class Content:
    """A list with its files. `rows` and `files` go together unless there are `faults`.

    Attributes:
        repeated: Lines left out because they repeat an earlier one.
        drawn: How the split was made where the tree has no list for it.
    """

    rows: list[Row]
    files: list[ImageFile]
    faults: list[str]
    repeated: int = 0
    drawn: str | None = None

    def formats(self) -> set[str]:
        return {file.format for file in self.files}

    def fingerprint(self) -> str:
        """sha256 over path, label and size in bytes of every image, in the order of the list."""
        digest = hashlib.sha256()
        for row, file in zip(self.rows, self.files, strict=True):
            digest.update(f"{row.image} {row.label} {file.size}\n".encode())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """sha256 over path, label and the SHA-256 of the content of every image, in the order of the list.

        All files are read, once in a process.
        """
        digest = hashlib.sha256()
        hashes = content_hashes(file.path for file in self.files)
        for row, content in zip(self.rows, hashes, strict=True):
            digest.update(f"{row.image} {row.label} {content.hex()}\n".encode())
        return digest.hexdigest()


def class_names(folder: Path, task: Task, layout: Layout) -> tuple[list[str | int], list[str]]:
    """The classes in order, and faults. FGVC lists name classes by any number or text; elsewhere they are 0, 1, …"""
    if task.suite != "fgvc":
        return list(range(task.num_classes)), []
    paths = [layout.list_path(folder, split) for split in task.splits]
    names = {row.label for path in paths if path.is_file() for row in layout.read(path).rows}
    if len(names) != task.num_classes:
        return [], [f"the lists name {len(names)} classes, {task.num_classes} expected"]
    if len({type(name) for name in names}) > 1:
        return [], ["the lists name some classes by number and others by text"]
    return sorted(names), []


def read_content(
    folder: Path,
    task: Task,
    layout: Layout,
    names: list[str] | list[int],
    split: str,
    shots: int | None = None,
    list_seed: int | None = None,
    check_sizes: bool = True,
    image_range: tuple[float, float] | None = None,
) -> Content:
    """Read a split's list and look at its files.

    Args:
        names: What `class_names` says; labels are not checked if it is empty.
        image_range: Of images of more than 8 bits, see `decode_image`.

    Raises:
        FileNotFoundError: there is no such list.
    """
    path = layout.list_path(folder, split, shots, list_seed)
    drawn = None
    if layout.list_name == "{split}.json" and split in DRAWN and not path.is_file():
        path = layout.list_path(folder, DRAWN[split])
        drawn = f"from {path.name} with seed {DRAW_SEED}"
    if not path.is_file():
        raise FileNotFoundError(f"no list {path.relative_to(folder)} in {folder}")
    lines = layout.read(path)
    rows, faults = list(lines.rows), list(lines.faults)
    expected = task.size(split, shots) if check_sizes else None
    rows, repeated, contradictions = _without_repeats(rows, None if drawn else expected)
    if drawn:  # of every image once: a second copy could be drawn into the other part
        rows = _draw(rows, split, task)
    content = Content(rows, [], faults + contradictions, repeated, drawn)
    if expected not in (None, len(rows)):
        also = f" (and {repeated:,} lines that repeat others)" if repeated else ""
        content.faults.append(f"{path.name} lists {len(rows):,} images{also}, {expected:,} expected")
    elif not rows:
        content.faults.append(f"{path.name} lists no images")
    _look_at_files(content, ImageFolder(folder, image_range), layout, names)
    return content


def _draw(rows: list[Row], split: str, task: Task) -> list[Row]:
    """Four fifths of the rows (as in the task's row), or the rest; the list may be sorted by class."""
    order = np.random.default_rng(DRAW_SEED).permutation(len(rows))
    train, val = task.sizes.get("train800", 800), task.sizes.get("val200", 200)
    number = len(rows) * train // (train + val)
    return [rows[i] for i in sorted(order[:number] if split == "train800" else order[number:])]


def _without_repeats(rows: list[Row], expected: int | None) -> tuple[list[Row], int, list[str]]:
    """Lines that say the same again are left out, unless the published size counts them."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.image, row)
    contradictions = [
        f"{row.where}: {row.image!r} has label {row.label}, but {first[row.image].label} in {first[row.image].where}"
        for row in rows
        if row.label != first[row.image].label
    ]
    if len(rows) == expected and len(first) != expected:
        return rows, 0, contradictions
    return list(first.values()), len(rows) - len(first), contradictions


def _look_at_files(content: Content, images: ImageFolder, layout: Layout, names: list) -> None:
    known = set(names)
    base = layout.image_folder(Path(images.folder), content.rows[0].image) if content.rows else ""
    for row in content.rows:
        if names and row.label not in known:
            content.faults.append(
                f"{row.where}: label {row.label} is not one of {len(names)} classes ({names[0]} to {names[-1]})"
            )
        try:
            content.files.append(images.file(base, row.image))
        except ValueError as error:
            content.faults.append(f"{row.where}: {row.image!r} {error}")
