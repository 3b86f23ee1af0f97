"""A split of a published tree as a data set."""

from __future__ import annotations

from pathlib import Path

from ..splits import Split, make_split, summary
from ..suites import SUITES
from ..tasks import Task
from .tree import open_tree


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
        root: Folder that holds one folder per task.
        split: One of the suite's `splits`.
        shots, list_seed: The training list of a few-shot task.
        check_sizes: Whether the number of images must be the published one (`task.size`).
        image_range: Black and white in images of more than 8 bits, see `decode_image`.

    Raises:
        ValueError: There is no such split, or the tree has faults, each named with its list and line. An image that
            needs an `image_range` is a fault.
        FileNotFoundError: The task's folder or the list is missing.
    """
    shots, list_seed = _check_request(task, split, shots, list_seed)
    tree = open_tree(root, task)
    content = tree.read(split, shots, list_seed, check_sizes, image_range)
    faults = [*tree.faults, *content.faults]
    if faults:
        raise ValueError(f"{task.name} ({split}) in {tree.folder} cannot be used: {summary(faults)}")
    labels = {name: label for label, name in enumerate(tree.classes)}
    return make_split(
        task,
        split,
        content,
        [labels[row.label] for row in content.rows],
        [str(name) for name in tree.classes],
        tree.layout.name,
        shots,
        list_seed,
    )


def _check_request(task: Task, split: str, shots, list_seed) -> tuple[int | None, int | None]:
    """The training list to read; of other splits there is one list, whatever the training list."""
    suite = SUITES[task.suite]
    if split not in suite.splits:
        raise ValueError(f"{task.name} has no split {split!r}; there are {', '.join(suite.splits)}")
    if not suite.shots:
        if shots is not None or list_seed is not None:
            raise ValueError(f"shots and list_seed are for few-shot tasks; {task.name} is one of {task.suite!r}")
        return None, None
    if split != "train":
        return None, None
    if shots not in suite.shots or list_seed not in suite.list_seeds:
        raise ValueError(
            f"the training list of {task.name} needs shots ({', '.join(map(str, suite.shots))}) and list_seed "
            f"({', '.join(map(str, suite.list_seeds))}); got {shots} and {list_seed}"
        )
    return shots, list_seed
