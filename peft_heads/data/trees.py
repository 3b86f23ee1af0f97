"""Benchmark trees on disk as `datasets.Dataset`, checked against the task's row before anything is decoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from .contents import Content, class_names, read_content
from .layouts import find_layout, task_folder
from .tasks import LIST_SEEDS, SHOTS, TASKS, Task


SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Split:
    """One split of a task, and what belongs into every result about it.

    Attributes:
        dataset: `image` (path, nothing decoded) and `label` (`ClassLabel`).
        layout: Which of the published forms the tree has.
        image_format: "JPEG", "PNG", …, by the files' content; "JPEG+PNG" if both occur.
        fingerprint: sha256 over the list's lines (path, label) and the sizes of the files.
        content_fingerprint: sha256 over the list's lines and the contents of the files.
        repeated: Lines left out because they repeat an earlier one.
        drawn: How the split was made where the tree has no list for it.
    """

    task: Task
    name: str
    dataset: datasets.Dataset
    layout: str
    image_format: str
    fingerprint: str
    content_fingerprint: str
    repeated: int = 0
    drawn: str | None = None
    shots: int | None = None
    list_seed: int | None = None

    def to_dict(self) -> dict:
        """Plain values for a result file."""
        return {
            "suite": self.task.suite,
            "task": self.task.name,
            "split": self.name,
            "images": len(self.dataset),
            "layout": self.layout,
            "image_format": self.image_format,
            "fingerprint": self.fingerprint,
            "content_fingerprint": self.content_fingerprint,
            "repeated": self.repeated,
            "drawn": self.drawn,
            "shots": self.shots,
            "list_seed": self.list_seed,
        }


@dataclass(frozen=True)
class TaskReport:
    """What `check_tree` found of one task; in order if there are no `faults`."""

    task: Task
    folder: Path | None = None
    layout: str | None = None
    image_format: str | None = None
    images: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def load_split(
    root: str | Path,
    task: Task,
    split: str,
    *,
    shots: int | None = None,
    list_seed: int | None = None,
    check_sizes: bool = True,
    image_range: tuple[float, float] | None = None,
) -> Split:
    """A split of the task below `root`. Every file is looked at and read, for its fingerprint; none is copied.

    Of all images, only those of more than 8 bits per channel are decoded here.

    Args:
        root: Holds one folder per task.
        split: One of `task.splits`.
        shots, list_seed: Choose the training list of a few-shot task.
        check_sizes: Whether the number of images must be the published one (`task.size`).
        image_range: What is black and white in images of more than 8 bits, see `decode_image`.

    Raises:
        ValueError: no such split, or faults of the tree, each with its list and line; an image that needs an
            `image_range` is one.
        FileNotFoundError: the task's folder or the list is not there.
    """
    shots, list_seed = _check_request(task, split, shots, list_seed)
    folder = task_folder(root, task)
    layout = find_layout(folder, task)
    names, faults = class_names(folder, task, layout)
    content = read_content(folder, task, layout, names, split, shots, list_seed, check_sizes, image_range)
    faults += content.faults
    if faults:
        raise ValueError(f"{task.name} ({split}) in {folder} cannot be used: {summary(faults)}")
    return Split(
        task=task,
        name=split,
        dataset=_dataset(content, task, names),
        layout=layout.name,
        image_format="+".join(sorted(content.formats())),
        fingerprint=content.fingerprint(),
        content_fingerprint=content.content_fingerprint(),
        repeated=content.repeated,
        drawn=content.drawn,
        shots=shots,
        list_seed=list_seed,
    )


def check_tree(
    root: str | Path,
    suite: str,
    tasks: list[Task] | None = None,
    image_range: tuple[float, float] | None = None,
) -> list[TaskReport]:
    """Check every list and file of a suite's tasks (or of `tasks`) below `root`.

    Args:
        image_range: What is black and white in images of more than 8 bits; without it those that need it are faults.

    Raises:
        FileNotFoundError: `root` is not a folder.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    return [_check_task(root, task, image_range) for task in tasks or [task for task in TASKS if task.suite == suite]]


def summary(faults: list[str] | tuple[str, ...]) -> str:
    """The first faults in one line, and how many more there are."""
    more = len(faults) - SHOWN_FAULTS
    return "; ".join(faults[:SHOWN_FAULTS]) + (f"; and {more:,} more" if more > 0 else "")


def _check_request(task: Task, split: str, shots, list_seed) -> tuple[int | None, int | None]:
    if split not in task.splits:
        raise ValueError(f"{task.name} has no split {split!r}; there are {', '.join(task.splits)}")
    if task.suite != "fewshot":
        if shots is not None or list_seed is not None:
            raise ValueError(f"shots and list_seed are for few-shot tasks; {task.name} is one of {task.suite!r}")
        return None, None
    if split != "train":
        return None, None  # the same lists whatever the training list
    if shots not in SHOTS or list_seed not in LIST_SEEDS:
        raise ValueError(
            f"the training list of {task.name} needs shots ({', '.join(map(str, SHOTS))}) and list_seed "
            f"({', '.join(map(str, LIST_SEEDS))}); got {shots} and {list_seed}"
        )
    return shots, list_seed


def _dataset(content: Content, task: Task, names: list) -> datasets.Dataset:
    index = {name: i for i, name in enumerate(names)}
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=[str(name) for name in names])}
    )
    columns = {
        "image": [file.path for file in content.files],
        "label": [index[row.label] for row in content.rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _check_task(root: str | Path, task: Task, image_range: tuple[float, float] | None) -> TaskReport:
    try:
        folder = task_folder(root, task)
        layout = find_layout(folder, task)
    except (FileNotFoundError, ValueError) as error:
        return TaskReport(task, faults=(str(error),))
    names, faults = class_names(folder, task, layout)
    contents, notes = {}, []
    for split, shots, list_seed in _lists(task):
        label = split if shots is None else f"{split} ({shots} shots, seed {list_seed})"
        try:
            content = contents[label] = read_content(
                folder, task, layout, names, split, shots, list_seed, image_range=image_range
            )
        except FileNotFoundError as error:
            faults.append(str(error))
            continue
        faults += content.faults
        if content.repeated:
            notes.append(f"{label}: {content.repeated} lines repeat others and are left out")
        if content.drawn:
            notes.append(f"{label}: drawn {content.drawn}")
    return TaskReport(
        task,
        folder,
        layout.name,
        "+".join(sorted({name for content in contents.values() for name in content.formats()})),
        {label: len(content.rows) for label, content in contents.items()},
        tuple(notes),
        tuple(faults + _faults_between(contents)),
    )


def _lists(task: Task) -> list[tuple[str, int | None, int | None]]:
    if task.suite != "fewshot":
        return [(split, None, None) for split in task.splits]
    train = [("train", shots, list_seed) for shots in SHOTS for list_seed in LIST_SEEDS]
    return [*train, ("val", None, None), ("test", None, None)]


def _faults_between(contents: dict[str, Content]) -> list[str]:
    """Test images among those to train or select on, and second copies that are not the same images' classes."""
    faults = []
    test = {row.image for row in contents["test"].rows} if "test" in contents else set()
    for label, content in contents.items():
        common = test & {row.image for row in content.rows} if label != "test" else ()
        if common:
            faults.append(f"{len(common):,} images of {label} are test images as well, the first {min(common)!r}")
    parts = ("train800", "val200", "train800val200")
    if all(part in contents for part in parts):
        train, val, both = (Counter(row.label for row in contents[part].rows) for part in parts)
        if train + val != both:
            faults.append("train800 and val200 together have other labels than train800val200")
    return faults
