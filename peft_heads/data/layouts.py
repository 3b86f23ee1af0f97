"""Where the published trees keep their lists and images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .lists import Lines, read_json_list, read_json_object, read_text_list
from .tasks import Task


@dataclass(frozen=True)
class Layout:
    """One form of a task's folder.

    Attributes:
        name: Goes into results.
        read: Reads one list.
        list_name: Path of a split's list in the task's folder.
        image_folders: What the paths in the lists may start from, in the task's folder; the first that fits counts.
    """

    name: str
    read: Callable[[Path], Lines]
    list_name: str
    image_folders: tuple[str, ...]

    def list_path(self, folder: Path, split: str, shots: int | None = None, list_seed: int | None = None) -> Path:
        drawn = f".num_shot_{shots}.seed_{list_seed}" if shots is not None else ""
        return folder / (self.list_name.format(split=split) + drawn)

    def image_folder(self, folder: Path, image: str) -> str:
        """That one of `image_folders` in which `image` lies."""
        found = (base for base in self.image_folders if os.path.exists(os.path.join(folder, base, image)))
        return next(found, self.image_folders[0])


LAYOUTS = {
    "vtab": (
        Layout("text lists", read_text_list, "{split}.txt", ("",)),
        Layout("JSON lists", read_json_list, "{split}.json", ("images", "")),
    ),
    "fewshot": (Layout("few-shot lists", read_text_list, "annotations/{split}_meta.list", ("images", "", "jpg")),),
    "fgvc": (Layout("JSON objects", read_json_object, "{split}.json", ("images", "Images", "")),),
}


def task_folder(root: str | Path, task: Task) -> Path:
    """The task's folder in `root`, under its name or an alias.

    Raises:
        FileNotFoundError: there is none.
        ValueError: several aliases are there, and the name itself is not.
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
        FileNotFoundError: the folder has none of the lists.
    """
    layouts = LAYOUTS[task.suite]
    for layout in layouts:
        if any(layout.list_path(folder, split).is_file() for split in task.splits):
            return layout
    if task.suite == "fewshot" and any((folder / "annotations").glob("train_meta.list.*")):
        return layouts[0]
    names = " nor ".join(layout.list_name.format(split="test") for layout in layouts)
    raise FileNotFoundError(f"{folder} holds no list of {task.name}, neither {names} nor those of other splits")
