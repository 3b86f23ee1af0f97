"""The data of all suites through one function: published trees, the user's own folders, and generated images."""

from dataclasses import replace

import pytest
import trees

from peft_heads.data.loading import check_tasks, find_tasks, load_task
from peft_heads.data.suites import SUITES
from peft_heads.data.tasks import find_task


CIFAR = trees.small("cifar", "vtab")


def write_folders(root, name="insects", counts=(("train", 3), ("val", 2), ("test", 1))):
    for split, count in counts:
        for label, folder in enumerate(["ant", "bee"]):
            (root / name / split / folder).mkdir(parents=True)
            for index in range(count):
                trees.picture(label, 2, index).save(root / name / split / folder / f"{index}.png")
    return root


def test_the_tasks_of_a_suite(tmp_path):
    assert find_tasks("nowhere", "vtab") == SUITES["vtab"].tasks  # no folder is needed
    assert find_tasks("nowhere", "vtab", ["CIFAR-100"]) == (find_task("cifar", "vtab"),)
    write_folders(write_folders(tmp_path), "weeds")
    assert [task.name for task in find_tasks(tmp_path, "folder")] == ["insects", "weeds"]
    assert [task.name for task in find_tasks(tmp_path, "folder", ["weeds"])] == ["weeds"]
    for suite, message in (("vtab1k", "unknown suite 'vtab1k'"), ("vtab", "unknown task 'weeds'")):
        with pytest.raises(ValueError, match=message):
            find_tasks(tmp_path, suite, ["weeds"])


def test_a_published_tree(tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "vtab", replace(SUITES["vtab"], tasks=(CIFAR,)))
    trees.write_vtab(tmp_path, CIFAR)
    split = load_task(tmp_path, "vtab", "cifar", "val200", check_sizes=False)
    assert (split.layout, len(split.dataset), split.task.name) == ("text lists", 4, "cifar")
    with pytest.raises(ValueError, match="val200.txt lists 4 images, 200 expected"):
        load_task(tmp_path, "vtab", "cifar", "val200")
    (report,) = check_tasks(tmp_path, "vtab")
    assert report.task == CIFAR and not report.faults


def test_one_s_own_folders(tmp_path):
    split = load_task(write_folders(tmp_path), "folder", "insects", "train")
    assert (split.layout, split.dataset["label"]) == ("image folder", [0, 0, 0, 1, 1, 1])
    (report,) = check_tasks(tmp_path, "folder", ["insects"])
    assert report.images == {"train": 6, "val": 4, "test": 2} and not report.faults


def test_generated_images_are_counted(tmp_path):
    write_folders(tmp_path, "digits")
    with pytest.raises(
        ValueError, match=r"digits/test holds 2 images \(expected 597\); delete the folder of the task"
    ):
        load_task(tmp_path, "offline", "digits", "test")
