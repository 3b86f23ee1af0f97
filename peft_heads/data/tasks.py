"""The tasks as rows of data: VTAB-1K, five few-shot sets, five fine-grained ones (FGVC), and six of our own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field


OFFLINE = "offline"
SHOTS = (1, 2, 4, 8, 16)
LIST_SEEDS = (0, 1, 2)  # each few-shot training list was drawn three times


@dataclass(frozen=True)
class Task:
    """One classification task. `dataclasses.replace(task, sizes=…)` describes a smaller tree of the same layout.

    Attributes:
        name: Name of its folder.
        suite: Name of its suite, a key of `suites.SUITES`.
        group: "natural", "specialized" or "structured" in VTAB-1K and offline; elsewhere the suite.
        num_classes: Number of classes; labels run from 0 to one less.
        sizes: Published number of images per split. Few-shot training lists are not in it: `size` knows them.
        aliases: Other spellings of the folder's name. Case, hyphens, underscores and spaces never matter.
    """

    name: str
    suite: str
    group: str
    num_classes: int
    sizes: Mapping[str, int] = field(hash=False)
    aliases: tuple[str, ...] = ()

    def size(self, split: str, shots: int | None = None) -> int | None:
        """The published number of images of a split, or of a training list with so many `shots`; None if unknown."""
        if split == "train" and shots is not None:
            return shots * self.num_classes
        return self.sizes.get(split)

    def is_called(self, name: str) -> bool:
        return _plain(name) in map(_plain, (self.name, *self.aliases))


def find_task(name: str, suite: str) -> Task:
    """The task of a name or an alias.

    Raises:
        ValueError: There is no such suite, or no such task in it; the message suggests similar names.
    """
    rows = [task for task in TASKS if task.suite == suite]
    if not rows:
        raise ValueError(
            f"unknown suite {suite!r}; there are {', '.join(dict.fromkeys(task.suite for task in TASKS))}"
        )
    for task in rows:
        if task.is_called(name):
            return task
    names = {_plain(known): task.name for task in rows for known in (task.name, *task.aliases)}
    close = dict.fromkeys(names[known] for known in difflib.get_close_matches(_plain(name), names, n=3))
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(task.name for task in rows)}"
    raise ValueError(f"unknown task {name!r} in the suite {suite!r}: {hint}")


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _vtab(group: str, name: str, num_classes: int, test: int, *aliases: str) -> Task:
    sizes = {"train800": 800, "val200": 200, "train800val200": 1000, "test": test}
    return Task(name, "vtab", group, num_classes, sizes, aliases)


def _few_shot(name: str, num_classes: int, val: int, test: int, *aliases: str) -> Task:
    return Task(name, "fewshot", "fewshot", num_classes, {"val": val, "test": test}, aliases)


def _fgvc(name: str, num_classes: int, train: int, val: int, test: int, *aliases: str) -> Task:
    return Task(name, "fgvc", "fgvc", num_classes, {"train": train, "val": val, "test": test}, aliases)


def _offline(group: str, name: str, num_classes: int, test: int = 2_000) -> Task:
    return Task(name, OFFLINE, group, num_classes, {"train": 1_000, "val": 200, "test": test})


TASKS = (
    _vtab("natural", "cifar", 100, 10_000, "cifar100"),
    _vtab("natural", "caltech101", 102, 6_084, "caltech102"),
    _vtab("natural", "dtd", 47, 1_880, "dtd47"),
    _vtab("natural", "oxford_flowers102", 102, 6_149, "flowers102", "flowers", "oxford_flowers"),
    _vtab("natural", "oxford_iiit_pet", 37, 3_669, "oxford_pet", "oxford_pets", "oxford_iiit_pets", "pet", "pets"),
    _vtab("natural", "svhn", 10, 26_032, "svhn_cropped"),
    _vtab("natural", "sun397", 397, 21_750),
    _vtab("specialized", "patch_camelyon", 2, 32_768, "camelyon", "pcam"),
    _vtab("specialized", "eurosat", 10, 5_400),
    _vtab("specialized", "resisc45", 45, 6_300, "resisc"),
    _vtab("specialized", "diabetic_retinopathy", 5, 42_670, "retinopathy"),
    _vtab("structured", "clevr_count", 8, 15_000, "clevr_count_all"),
    _vtab("structured", "clevr_dist", 6, 15_000, "clevr_distance", "clevr_closest_object_distance"),
    _vtab("structured", "dmlab", 6, 22_735),
    _vtab("structured", "kitti", 4, 711, "kitti_distance", "kitti_dist"),
    _vtab("structured", "dsprites_loc", 16, 73_728, "dsprites_location", "dsprites_position"),
    _vtab("structured", "dsprites_ori", 16, 73_728, "dsprites_orientation"),
    _vtab("structured", "smallnorb_azi", 18, 12_150, "smallnorb_azimuth"),
    _vtab("structured", "smallnorb_ele", 9, 12_150, "smallnorb_elevation"),
    _few_shot("fgvc-aircraft", 100, 3_333, 3_333, "aircraft"),
    _few_shot("food101", 101, 20_200, 30_300, "food"),
    _few_shot("oxford-flowers102", 102, 1_633, 2_463, "oxford_flowers", "flowers102", "flowers"),
    _few_shot("oxford-pets", 37, 736, 3_669, "pets"),
    _few_shot("stanford-cars", 196, 1_635, 8_041, "standford-cars", "cars"),
    _fgvc("CUB_200_2011", 200, 5_394, 600, 5_794, "cub", "cub200"),
    _fgvc("nabirds", 555, 21_536, 2_393, 24_633, "nabirds555"),
    _fgvc("OxfordFlower", 102, 1_020, 1_020, 6_149, "oxford_flowers", "oxford_flowers102", "flowers", "flowers102"),
    _fgvc("stanford_dogs", 120, 10_800, 1_200, 8_580, "dogs", "dogs120"),
    _fgvc("stanford_cars", 196, 7_329, 815, 8_041, "cars", "cars196"),
    _offline("natural", "digits", 10, 597),  # as many as there are
    _offline("natural", "textures", 10),
    _offline("structured", "count", 8),
    _offline("structured", "location", 8),
    _offline("structured", "orientation", 8),
    _offline("structured", "distance", 6),
)
