"""The lists of a task's folder: their rows, and everything that is wrong with them and with their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import ImageFolder
from ..formats import Layout, Row
from ..splits import Content
from ..suites import SUITES
from ..tasks import Task


DRAW_SEED = 0


def class_names(folder: Path, task: Task, layout: Layout) -> tuple[list[str | int], list[str]]:
    """The classes in order, and faults; see `Suite.names_classes`."""
    suite = SUITES[task.suite]
    if not suite.names_classes:
        return list(range(task.num_classes)), []
    paths = [layout.list_path(folder, split) for split in suite.splits]
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
        names: Classes of `class_names`; labels are not checked if there are none.
        image_range: Black and white in images of more than 8 bits, see `decode_image`.

    Raises:
        FileNotFoundError: There is no such list.
    """
    path = layout.list_path(folder, split, shots, list_seed)
    drawn = None
    if split in layout.drawn_from and not path.is_file():
        path = layout.list_path(folder, layout.drawn_from[split])
        drawn = f"from {path.name} with seed {DRAW_SEED}"
    if not path.is_file():
        raise FileNotFoundError(f"no list {path.relative_to(folder)} in {folder}")
    lines = layout.read(path)
    rows, faults = list(lines.rows), list(lines.faults)
    expected = task.size(split, shots) if check_sizes else None
    rows, repeated, contradictions = _without_repeats(rows, None if drawn else expected)
    if drawn:  # from images that occur once: a second copy could be drawn into the other part
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
    """The part of the rows that belongs to a split, by the published sizes. Drawn, as lists may be sorted by class."""
    order = np.random.default_rng(DRAW_SEED).permutation(len(rows))
    first, second = SUITES[task.suite].chosen_by
    train, val = task.sizes.get(first, 800), task.sizes.get(second, 200)
    number = len(rows) * train // (train + val)
    return [rows[i] for i in sorted(order[:number] if split == first else order[number:])]


def _without_repeats(rows: list[Row], expected: int | None) -> tuple[list[Row], int, list[str]]:
    """The rows without repeats, their number, and contradictions; repeats stay if the published size counts them."""
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
    """Fill in the files of the rows, and what is wrong with files and labels."""
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
