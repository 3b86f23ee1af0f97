"""The forms in which benchmark trees were published: how their lists are read, and where lists and images lie."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


# `..`, an absolute path, a drive, or a NUL byte: such a path leads out of the folder, or nowhere
LEAVES = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:|\0")


class Row(NamedTuple):
    """One line of a list: the image's path as listed, its class, and the line's place for messages (`test.txt:3`)."""

    image: str
    label: int | str
    where: str


class Lines(NamedTuple):
    """The rows of a list, and what is wrong with it."""

    rows: list[Row]
    faults: list[str]


def read_text_list(path: Path) -> Lines:
    """Read lines such as `relative/path of an image.jpg 307`: the label follows the last space."""
    text, faults = _read(path)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        image, _, label = line.rstrip().rpartition(" ")
        where = f"{path.name}:{number}"
        if not image or not re.fullmatch(r"-?\d{1,9}", label, re.ASCII):
            faults.append(f"{where}: {_short(line)} is not an image's path, a space and a label")
        else:
            rows.append(Row(image, int(label), where))
    return Lines(rows, faults)


def read_json_list(path: Path) -> Lines:
    """Read a list of objects with one entry, `{"path": label}`."""

    def pairs(content):
        return content if isinstance(content, list) else None

    def row(entry):
        return entry[0] if isinstance(entry, tuple) and len(entry) == 1 else None

    return _read_json(path, pairs, row, "a list of objects with one entry, path: label")


def read_json_object(path: Path) -> Lines:
    """Read one object, `{"path": class}`; classes are integers or text."""

    def pairs(content):
        return content if isinstance(content, tuple) else None

    return _read_json(path, pairs, lambda entry: entry, "an object of path: class", labels=(int, str))


@dataclass(frozen=True)
class Layout:
    """One form of a task's folder.

    Attributes:
        name: Name in results.
        read: Function that reads one list.
        list_name: Path of a split's list in the task's folder.
        image_folders: Folders, in the task's folder, from which the paths in the lists may start; the first that fits
            counts.
        drawn_from: `{split: the list from which it is drawn if it has none of its own}`.
    """

    name: str
    read: Callable[[Path], Lines]
    list_name: str
    image_folders: tuple[str, ...]
    drawn_from: Mapping[str, str] = field(default_factory=dict, hash=False)

    def list_path(self, folder: Path, split: str, shots: int | None = None, list_seed: int | None = None) -> Path:
        drawn = f".num_shot_{shots}.seed_{list_seed}" if shots is not None else ""
        return folder / (self.list_name.format(split=split) + drawn)

    def image_folder(self, folder: Path, image: str) -> str:
        """The one of `image_folders` that holds `image`."""
        found = (base for base in self.image_folders if os.path.exists(os.path.join(folder, base, image)))
        return next(found, self.image_folders[0])


def _read_json(path: Path, pairs: Callable, row: Callable, form: str, labels: tuple = (int,)) -> Lines:
    text, faults = _read(path)
    if faults:
        return Lines([], faults)
    try:
        # objects as tuples of pairs: a dict would drop a path that stands twice
        entries = pairs(json.loads(text, object_pairs_hook=tuple))
    except (ValueError, RecursionError) as error:
        return Lines([], [f"{path.name} is no JSON: {error}"])
    if entries is None:
        return Lines([], [f"{path.name} is not {form}"])
    rows = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path.name}, entry {number}"
        pair = row(entry)
        if pair is None or not isinstance(pair[1], labels) or isinstance(pair[1], bool):
            faults.append(f"{where}: {_short(entry)} is no image's path with a label")
        else:
            rows.append(Row(*pair, where))
    return Lines(rows, faults)


def _read(path: Path) -> tuple[str, list[str]]:
    try:
        return path.read_text(encoding="utf-8-sig"), []
    except UnicodeDecodeError as error:
        return "", [f"{path.name} is not UTF-8: {error}"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
