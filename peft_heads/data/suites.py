"""The suites: everything that differs between them, in one table. All other code asks `SUITES`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .formats import Layout, read_json_list, read_json_object, read_text_list
from .tasks import LIST_SEEDS, OFFLINE, SHOTS, TASKS, Task


FOLDER = "folder"
# Where a command is not told the suite.
DEFAULT_SUITE = "vtab"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that are trained and evaluated under one protocol.

    Attributes:
        name: Name on the command line and in results.
        splits: Names of the splits of its tasks.
        chosen_by: (trained on, evaluated on): the splits of the runs by which settings are chosen.
        reported: (trained on, evaluated on): the splits of the runs that are reported.
        tasks: Its tasks, in the papers' order; none where they are whatever folders the user has.
        layouts: Forms in which its trees were published; none where each task is a folder of images by class.
        shots: Images per class in its training lists; none where a task has a single training list.
        list_seeds: Seeds of its training lists, for each of `shots`.
        names_classes: Whether its lists name classes by any numbers or text, instead of 0, 1, ….
        generated: Whether its images are made by this package.
    """

    name: str
    splits: tuple[str, ...] = ("train", "val", "test")
    chosen_by: tuple[str, str] = ("train", "val")
    reported: tuple[str, str] = ("train", "test")
    tasks: tuple[Task, ...] = ()
    layouts: tuple[Layout, ...] = ()
    shots: tuple[int, ...] = ()
    list_seeds: tuple[int, ...] = ()
    names_classes: bool = False
    generated: bool = False

    def lists(self) -> list[tuple[str, int | None, int | None]]:
        """`(split, shots, list_seed)` of all lists of one of its tasks."""
        train = list(itertools.product(["train"], self.shots, self.list_seeds))
        return train + [(split, None, None) for split in self.splits if not (train and split == "train")]


def _tasks(suite: str) -> tuple[Task, ...]:
    return tuple(task for task in TASKS if task.suite == suite)


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="vtab",
            splits=("train800", "val200", "train800val200", "test"),
            chosen_by=("train800", "val200"),
            reported=("train800val200", "test"),
            tasks=_tasks("vtab"),
            layouts=(
                Layout("text lists", read_text_list, "{split}.txt", ("",)),
                Layout(
                    "JSON lists",
                    read_json_list,
                    "{split}.json",
                    ("images", ""),
                    drawn_from={"train800": "train800val200", "val200": "train800val200"},
                ),
            ),
        ),
        Suite(
            name="fewshot",
            tasks=_tasks("fewshot"),
            layouts=(
                Layout("few-shot lists", read_text_list, "annotations/{split}_meta.list", ("images", "", "jpg")),
            ),
            shots=SHOTS,
            list_seeds=LIST_SEEDS,
        ),
        Suite(
            name="fgvc",
            tasks=_tasks("fgvc"),
            layouts=(Layout("JSON objects", read_json_object, "{split}.json", ("images", "Images", "")),),
            names_classes=True,
        ),
        Suite(name=FOLDER),
        Suite(name=OFFLINE, tasks=_tasks(OFFLINE), generated=True),
    )
}


def find_suite(name: str) -> Suite:
    """The suite of a name.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]
