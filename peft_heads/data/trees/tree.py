"""The folder of a task in one of the published forms: its lists, and everything that is wrong with them and the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import ImageFolder
from ..formats import Layout, Row
from ..splits import Content
from ..suites import SUITES
from ..tasks import Task


DRAW_SEED = 0


@dataclass(frozen=True)
class Tree:
    """The folder of one task.

    Attributes:
        layout: Form in which it was published.
        classes: Classes in the order of their labels; none if the lists name other classes than the task has.
        faults: Faults of the classes.
    """

    task: Task
    folder: Path
    layout: Layout
    classes: tuple[str | int, ...]
    faults: tuple[str, ...]

    def read(
        self,
        split: str,
        shots: int | None = None,
        list_seed: int | None = None,
        check_sizes: bool = True,
        image_range: tuple[float, float] | None = None,
    ) -> Content:
        """Read a split's list and check its files.

        Args:
            image_range: Black and white in images of more than 8 bits, see `decode_image`.

        Raises:
            FileNotFoundError: There is no such list.
        """
        path, drawn = self.layout.list_path(self.folder, split, shots, list_seed), None
        if split in self.layout.drawn_from and not path.is_file():
            path = self.layout.list_path(self.folder, self.layout.drawn_from[split])
            drawn = f"from {path.name} with seed {DRAW_SEED}"
        if not path.is_file():
            raise FileNotFoundError(f"no list {path.relative_to(self.folder)} in {self.folder}")
        lines = self.layout.read(path)
        expected = self.task.size(split, shots) if check_sizes else None
        rows, repeated, contradictions = _without_repeats(lines.rows, None if drawn else expected)
        if drawn:  # from images that occur once: a second copy could be drawn into the other part
            rows = _draw(rows, split, self.task)
        content = Content(rows, [], lines.faults + contradictions, repeated, drawn)
        if expected not in (None, len(rows)):
            also = f" (and {repeated:,} lines that repeat others)" if repeated else ""
            content.faults.append(f"{path.name} lists {len(rows):,} images{also}, {expected:,} expected")
        elif not rows:
            content.faults.append(f"{path.name} lists no images")
        self._check_files(content, ImageFolder(self.folder, image_range))
        return content

    def _check_files(self, content: Content, images: ImageFolder) -> None:
        """Fill in the files of the rows, and the faults of files and labels; labels are checked if there are classes."""
        known, classes = set(self.classes), self.classes
        base = self.layout.image_folder(self.folder, content.rows[0].image) if content.rows else ""
        for row in content.rows:
            if classes and row.label not in known:
                content.faults.append(
                    f"{row.where}: label {row.label} is not one of {len(classes)} classes "
                    f"({classes[0]} to {classes[-1]})"
                )
            try:
                content.files.append(images.file(base, row.image))
            except ValueError as error:
                content.faults.append(f"{row.where}: {row.image!r} {error}")


def open_tree(root: str | Path, task: Task) -> Tree:
    """The folder of a task below `root`, its layout, and its classes.

    Raises:
        FileNotFoundError: There is no such folder, or it has none of the lists.
        ValueError: There are several folders of this task.
    """
    folder = _task_folder(root, task)
    layout = _find_layout(folder, task)
    return Tree(task, folder, layout, *_classes(folder, task, layout))


def _task_folder(root: str | Path, task: Task) -> Path:
    """The task's folder in `root`, under its name or an alias.

    Raises:
        FileNotFoundError: There is none.
        ValueError: There are several aliases, and none of them is the name itself.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; it should hold one folder per task ({task.name}, …)")
    if (root / task.name).is_dir():
        return root / task.name
    found = [path for path in sorted(root.iterdir()) if task.is_called(path.name) and path.is_dir()]
    if not found:
        raise FileNotFoundError(
            f"no folder {task.name} (or {', '.join(task.aliases) or 'another spelling'}) in {root}"
        )
    if len(found) > 1:
        raise ValueError(
            f"{root} holds {task.name} under several names, {', '.join(path.name for path in found)}: keep one"
        )
    return found[0]


def _find_layout(folder: Path, task: Task) -> Layout:
    """The layout of a task's folder, the same for all its splits.

    Raises:
        FileNotFoundError: The folder has none of the lists.
    """
    suite = SUITES[task.suite]
    for layout in suite.layouts:
        lists = [layout.list_path(folder, split) for split in suite.splits]
        if any(path.is_file() for path in lists):
            return layout
        if suite.shots and any(lists[0].parent.glob(f"{lists[0].name}.*")):  # train_meta.list.num_shot_1.seed_0, …
            return layout
    names = " nor ".join(layout.list_name.format(split="test") for layout in suite.layouts)
    raise FileNotFoundError(f"{folder} holds no list of {task.name}, neither {names} nor those of other splits")


def _classes(folder: Path, task: Task, layout: Layout) -> tuple[tuple[str | int, ...], tuple[str, ...]]:
    """The classes in order, and faults; see `Suite.names_classes`."""
    suite = SUITES[task.suite]
    if not suite.names_classes:
        return tuple(range(task.num_classes)), ()
    paths = [layout.list_path(folder, split) for split in suite.splits]
    names = {row.label for path in paths if path.is_file() for row in layout.read(path).rows}
    if len(names) != task.num_classes:
        return (), (f"the lists name {len(names)} classes, {task.num_classes} expected",)
    if len({type(name) for name in names}) > 1:
        return (), ("the lists name some classes by number and others by text",)
    return tuple(sorted(names)), ()


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
