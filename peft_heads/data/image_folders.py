"""A folder of images as a task: `<root>/<task>/{train,val,test}/<class>/` with images in them."""

from __future__ import annotations

import os
from pathlib import Path

from .files import ImageFolder, is_hidden
from .formats import Row
from .splits import Content, Split, TaskReport, make_report, make_split, summary
from .suites import FOLDER, SUITES
from .tasks import Task


LAYOUT = "image folder"


def folder_tasks(root: str | os.PathLike) -> list[Task]:
    """The tasks below `root`: its folders that have a folder `train`.

    Raises:
        FileNotFoundError: `root` is not a folder, or there is none in it.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    names = sorted(
        path.name for path in Path(root).iterdir() if not is_hidden(path.name) and (path / "train").is_dir()
    )
    if not names:
        raise FileNotFoundError(f"no folder in {root} has a folder 'train' in it: expected TASK/train/CLASS/IMAGE")
    return [folder_task(root, name) for name in names]


def folder_task(root: str | os.PathLike, name: str) -> Task:
    """The task of a folder, whose classes are the folders in its `train`.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are fewer than two classes.
    """
    train = Path(root) / name / "train"
    if not train.is_dir():
        raise FileNotFoundError(f"no folder {train}: expected TASK/train/CLASS/IMAGE below {root}")
    classes = class_folders(train)
    if len(classes) < 2:
        raise ValueError(f"{train} has {len(classes)} folders of classes; at least two are needed")
    return Task(name, FOLDER, FOLDER, len(classes), {})


def class_folders(split: Path) -> list[str]:
    """The names of the folders in a split's folder, sorted; hidden ones are skipped."""
    return sorted(path.name for path in split.iterdir() if path.is_dir() and not is_hidden(path.name))


def load_folder_split(
    root: str | os.PathLike, task: Task, split: str, image_range: tuple[float, float] | None = None
) -> Split:
    """A split of such a task. Hidden files and folders are skipped; links are followed within the task's folder.

    Every file is looked at and read, for its fingerprint; only those of more than 8 bits per channel are decoded.

    Args:
        image_range: Black and white in images of more than 8 bits, see `decode_image`.

    Raises:
        FileNotFoundError: There is no such split.
        ValueError: It has other classes than `train`, no images, files that are none or need an `image_range`, each
            named, or folders that are links and lead out of the task's folder.
    """
    names, content = _read(Path(root) / task.name, split, image_range)
    if content.faults:
        raise ValueError(f"{Path(root) / task.name / split} cannot be used: {summary(content.faults)}")
    return make_split(task, split, content, [row.label for row in content.rows], names, LAYOUT)


def check_folders(
    root: str | os.PathLike, names: list[str] | None = None, image_range: tuple[float, float] | None = None
) -> list[TaskReport]:
    """Check every file of the tasks below `root`, or of those named.

    Raises:
        FileNotFoundError: `root` is not a folder, there is no task in it, or none of a given name.
    """
    found = [folder_task(root, name) for name in names] if names else folder_tasks(root)
    return [_check(Path(root) / task.name, task, image_range) for task in found]


def _check(home: Path, task: Task, image_range: tuple[float, float] | None) -> TaskReport:
    contents, faults, notes = {}, [], []
    for split in SUITES[FOLDER].splits:
        if not (home / split).is_dir():
            notes.append(f"there is no folder {split}")
            continue
        try:
            _, contents[split] = _read(home, split, image_range)
            faults += contents[split].faults
        except ValueError as error:
            faults.append(str(error))
    return make_report(task, home, LAYOUT, contents, notes, faults)


def _read(home: Path, split: str, image_range: tuple[float, float] | None) -> tuple[list[str], Content]:
    """The classes, and the files with their faults."""
    folder = home / split
    if not folder.is_dir():
        splits = ", ".join(SUITES[FOLDER].splits)
        raise FileNotFoundError(f"{home.name} has no folder {folder} (splits of {FOLDER!r}: {splits})")
    names = class_folders(home / "train")
    others = sorted(set(class_folders(folder)) - set(names))
    if others:
        raise ValueError(f"{folder} has classes that {home / 'train'} has not: {', '.join(others[:10])}")
    images, content = ImageFolder(home, image_range), Content([], [], [])
    for label, name in enumerate(names):
        for image in images.below(f"{split}/{name}") if (folder / name).is_dir() else ():
            try:
                content.files.append(images.file("", image))
                content.rows.append(Row(image, label, image))
            except ValueError as error:
                content.faults.append(f"{image} {error}")
    if not content.rows:
        content.faults.append("it has no images")
    return names, content
