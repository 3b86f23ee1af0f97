"""Which folder below a root is a task's, and in which of the published forms it is."""

from __future__ import annotations

from pathlib import Path

from ..formats import Layout
from ..suites import SUITES
from ..tasks import Task


def task_folder(root: str | Path, task: Task) -> Path:
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


def find_layout(folder: Path, task: Task) -> Layout:
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
