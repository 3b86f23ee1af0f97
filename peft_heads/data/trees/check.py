"""A check of published trees: every list and every file of a task, and what the lists say of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..splits import Content, TaskReport, make_report
from ..suites import SUITES, Suite
from ..tasks import Task
from .tree import open_tree


def check_tree(
    root: str | Path,
    suite: str,
    tasks: Iterable[Task] | None = None,
    image_range: tuple[float, float] | None = None,
) -> list[TaskReport]:
    """Check every list and file of a suite's tasks (or of `tasks`) below `root`.

    Args:
        image_range: Black and white in images of more than 8 bits; without it, images that need it are faults.

    Raises:
        FileNotFoundError: `root` is not a folder.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    return [_check_task(root, task, image_range) for task in tasks or SUITES[suite].tasks]


def _check_task(root: str | Path, task: Task, image_range: tuple[float, float] | None) -> TaskReport:
    try:
        tree = open_tree(root, task)
    except (FileNotFoundError, ValueError) as error:
        return TaskReport(task, faults=(str(error),))
    contents, notes, faults, suite = {}, [], [*tree.faults], SUITES[task.suite]
    for split, shots, list_seed in suite.lists():
        label = split if shots is None else f"{split} ({shots} shots, seed {list_seed})"
        try:
            content = contents[label] = tree.read(split, shots, list_seed, image_range=image_range)
        except FileNotFoundError as error:
            faults.append(str(error))
            continue
        faults += content.faults
        if content.repeated:
            notes.append(f"{label}: {content.repeated} lines repeat others and are left out")
        if content.drawn:
            notes.append(f"{label}: drawn {content.drawn}")
    return make_report(task, tree.folder, tree.layout.name, contents, notes, faults + _faults_between(contents, suite))


def _faults_between(contents: dict[str, Content], suite: Suite) -> list[str]:
    """Test images among those to train or choose on, and a list of both parts that has other classes than the parts."""
    faults = []
    test = {row.image for row in contents["test"].rows} if "test" in contents else set()
    for label, content in contents.items():
        common = test & {row.image for row in content.rows} if label != "test" else ()
        if common:
            faults.append(f"{len(common):,} images of {label} are test images as well, the first {min(common)!r}")
    parts, both = suite.chosen_by, suite.reported[0]
    if both not in parts and all(name in contents for name in (*parts, both)):
        counts = {name: Counter(row.label for row in contents[name].rows) for name in (*parts, both)}
        if counts[parts[0]] + counts[parts[1]] != counts[both]:
            faults.append(f"{parts[0]} and {parts[1]} together have other labels than {both}")
    return faults
