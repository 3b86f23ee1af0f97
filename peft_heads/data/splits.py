"""One split of a task: the images that were found, the data set made of them, and the report of a check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from .files import ImageFile, content_hashes
from .formats import Row
from .tasks import Task


SHOWN_FAULTS = 10


@dataclass
class Content:
    """A list and its files; `rows` and `files` correspond unless there are `faults`.

    Attributes:
        repeated: Number of lines left out because they repeat earlier ones.
        drawn: How the split was drawn, where the tree has no list for it.
    """

    rows: list[Row]
    files: list[ImageFile]
    faults: list[str]
    repeated: int = 0
    drawn: str | None = None

    def fingerprint(self) -> str:
        """sha256 over path, label and size in bytes of every image, in the order of the list."""
        digest = hashlib.sha256()
        for row, file in zip(self.rows, self.files, strict=True):
            digest.update(f"{row.image} {row.label} {file.size}\n".encode())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """sha256 over path, label and the SHA-256 of the content of every image, in the order of the list.

        Reads all files, each once per process.
        """
        digest = hashlib.sha256()
        hashes = content_hashes(file.path for file in self.files)
        for row, content in zip(self.rows, hashes, strict=True):
            digest.update(f"{row.image} {row.label} {content.hex()}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """One split of a task, with everything about it that belongs in a result.

    Attributes:
        dataset: Columns `image` (path, not decoded) and `label` (`ClassLabel`).
        layout: Name of the published form of the tree.
        image_format: "JPEG", "PNG", …, by the files' content; "JPEG+PNG" if both occur.
        fingerprint: sha256 over the list's lines (path, label) and the sizes of the files.
        content_fingerprint: sha256 over the list's lines and the contents of the files.
        repeated: Number of lines left out because they repeat earlier ones.
        drawn: How the split was drawn, where the tree has no list for it.
        shots, list_seed: The training list, of a few-shot task.
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
    """What a check found of one task; the task is in order if there are no `faults`."""

    task: Task
    folder: Path | None = None
    layout: str | None = None
    image_format: str | None = None
    images: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def make_split(
    task: Task,
    name: str,
    content: Content,
    labels: list[int],
    class_names: list[str],
    layout: str,
    shots: int | None = None,
    list_seed: int | None = None,
) -> Split:
    """The split of a content without faults; `labels` are those of its rows, as indices into `class_names`."""
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=class_names)}
    )
    columns = {"image": [file.path for file in content.files], "label": labels}
    return Split(
        task=task,
        name=name,
        dataset=datasets.Dataset.from_dict(columns, features=features),
        layout=layout,
        image_format=image_format([content]),
        fingerprint=content.fingerprint(),
        content_fingerprint=content.content_fingerprint(),
        repeated=content.repeated,
        drawn=content.drawn,
        shots=shots,
        list_seed=list_seed,
    )


def make_report(
    task: Task, folder: Path, layout: str, contents: Mapping[str, Content], notes: list[str], faults: list[str]
) -> TaskReport:
    """The report of a check that read `contents`, `{list in words: content}`."""
    images = {name: len(content.rows) for name, content in contents.items()}
    return TaskReport(task, folder, layout, image_format(contents.values()), images, tuple(notes), tuple(faults))


def image_format(contents: Iterable[Content]) -> str:
    """The formats of all files: "JPEG", "JPEG+PNG", …."""
    return "+".join(sorted({file.format for content in contents for file in content.files}))


def summary(faults: list[str] | tuple[str, ...]) -> str:
    """The first faults in one line, and how many more there are."""
    more = len(faults) - SHOWN_FAULTS
    return "; ".join(faults[:SHOWN_FAULTS]) + (f"; and {more:,} more" if more > 0 else "")
