"""The data of any suite: which tasks there are, one split of a task, and a check of all its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

from .image_folders import check_folders, folder_task, folder_tasks, load_folder_split
from .splits import Split, TaskReport
from .suites import find_suite
from .tasks import Task, find_task
from .trees import check_tree, load_split


def find_tasks(root: str | os.PathLike, suite: str, names: Sequence[str] = ()) -> tuple[Task, ...]:
    """The tasks of a suite that are named, or all.

    Args:
        root: Folder that holds one folder per task; asked only where the suite's tasks are whatever folders there are.

    Raises:
        ValueError: There is no such suite or task.
        FileNotFoundError: There is no folder of this name, or none at all.
    """
    known = find_suite(suite).tasks
    if known:
        return tuple(find_task(name, suite) for name in names) or known
    return tuple(folder_task(root, name) for name in names) or tuple(folder_tasks(root))


def load_task(
    root: str | os.PathLike,
    suite: str,
    name: str,
    split: str,
    *,
    shots: int | None = None,
    list_seed: int | None = None,
    check_sizes: bool = True,
    image_range: tuple[float, float] | None = None,
) -> Split:
    """A split of a task of any suite; arguments and errors as for `load_split`."""
    kind = find_suite(suite)
    if kind.generated:
        return _load_generated(os.path.abspath(root), suite, name, split)
    if not kind.layouts:
        return load_folder_split(root, folder_task(root, name), split, image_range)
    task = find_task(name, suite)
    return load_split(
        root, task, split, shots=shots, list_seed=list_seed, check_sizes=check_sizes, image_range=image_range
    )


@lru_cache
def _load_generated(root: str, suite: str, name: str, split: str) -> Split:
    """Read once per process: nobody but this package writes these images, and there are thousands of runs."""
    task = find_task(name, suite)
    loaded = load_folder_split(root, task, split)
    if len(loaded.dataset) != task.size(split):
        raise ValueError(
            f"{os.path.join(root, name, split)} holds {len(loaded.dataset):,} images (expected {task.size(split):,}); "
            "delete the folder of the task, it is made again"
        )
    return loaded


def check_tasks(
    root: str | os.PathLike,
    suite: str,
    names: Sequence[str] = (),
    image_range: tuple[float, float] | None = None,
) -> list[TaskReport]:
    """Check every file of the tasks of a suite that are named, or of all; errors as for `find_tasks`."""
    if not find_suite(suite).layouts:
        return check_folders(root, list(names), image_range)
    return check_tree(root, suite, tuple(dict.fromkeys(find_task(name, suite) for name in names)), image_range)
