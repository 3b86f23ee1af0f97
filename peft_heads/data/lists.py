"""The lists of a benchmark tree, in the three forms in which they were published, as rows with their place in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


# `..`, an absolute path, a drive, or a NUL byte: such a path leads out of the folder, or nowhere
LEAVES = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:|\0")


class Row(NamedTuple):
    """One line of a list: an image's path as it stands there, its class, and the place for messages (`test.txt:3`)."""

    image: str
    label: int | str
    where: str


class Lines(NamedTuple):
    """What a list holds, and what is wrong with it."""

    rows: list[Row]
    faults: list[str]


def read_text_list(path: Path) -> Lines:
    """`relative/path of an image.jpg 307` on each line: the label follows the last space."""
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
    """A list of objects with one entry, `{"path": label}`."""

    def pairs(content):
        return content if isinstance(content, list) else None

    def row(entry):
        return entry[0] if isinstance(entry, tuple) and len(entry) == 1 else None

    return _read_json(path, pairs, row, "a list of objects with one entry, path: label")


def read_json_object(path: Path) -> Lines:
    """One object, `{"path": class}`; classes are integers or text."""

    def pairs(content):
        return content if isinstance(content, tuple) else None

    return _read_json(path, pairs, lambda entry: entry, "an object of path: class", labels=(int, str))


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
