import dataclasses
import pickle

import pytest

from peft_heads.data.suites import SUITES
from peft_heads.data.tasks import TASKS, find_task


# as published, written down once more: (classes, test images)
VTAB = {
    "natural": "cifar 100 10000, caltech101 102 6084, dtd 47 1880, oxford_flowers102 102 6149, "
    "oxford_iiit_pet 37 3669, svhn 10 26032, sun397 397 21750",
    "specialized": "patch_camelyon 2 32768, eurosat 10 5400, resisc45 45 6300, diabetic_retinopathy 5 42670",
    "structured": "clevr_count 8 15000, clevr_dist 6 15000, dmlab 6 22735, kitti 4 711, dsprites_loc 16 73728, "
    "dsprites_ori 16 73728, smallnorb_azi 18 12150, smallnorb_ele 9 12150",
}
FEW_SHOT = {
    "fgvc-aircraft": (100, 3333, 3333),
    "food101": (101, 20200, 30300),
    "oxford-flowers102": (102, 1633, 2463),
    "oxford-pets": (37, 736, 3669),
    "stanford-cars": (196, 1635, 8041),
}
FGVC = {
    "CUB_200_2011": (200, 5394, 600, 5794),
    "nabirds": (555, 21536, 2393, 24633),
    "OxfordFlower": (102, 1020, 1020, 6149),
    "stanford_dogs": (120, 10800, 1200, 8580),
    "stanford_cars": (196, 7329, 815, 8041),
}


def suite(name):
    return [task for task in TASKS if task.suite == name]


def test_vtab_is_as_published():
    rows = {
        group: ", ".join(f"{t.name} {t.num_classes} {t.size('test')}" for t in suite("vtab") if t.group == group)
        for group in VTAB
    }
    assert rows == VTAB
    assert sum(task.size("test") for task in suite("vtab")) == 387_904
    for task in suite("vtab"):
        assert [task.size(split) for split in ("train800", "val200", "train800val200")] == [800, 200, 1000]


def test_few_shot_is_as_published():
    assert {t.name: (t.num_classes, t.size("val"), t.size("test")) for t in suite("fewshot")} == FEW_SHOT
    assert find_task("oxford-pets", "fewshot").size("train", shots=16) == 16 * 37
    assert find_task("oxford-pets", "fewshot").size("train") is None


def test_fgvc_is_as_published():
    rows = {t.name: (t.num_classes, t.size("train"), t.size("val"), t.size("test")) for t in suite("fgvc")}
    assert rows == FGVC


@pytest.mark.parametrize(
    ("name", "suite_name", "expected"),
    [
        ("cifar100", "vtab", "cifar"),
        ("CIFAR-100", "vtab", "cifar"),
        ("oxford_pet", "vtab", "oxford_iiit_pet"),
        ("pet", "vtab", "oxford_iiit_pet"),
        ("flowers102", "vtab", "oxford_flowers102"),
        ("camelyon", "vtab", "patch_camelyon"),
        ("retinopathy", "vtab", "diabetic_retinopathy"),
        ("clevr_distance", "vtab", "clevr_dist"),
        ("dsprites_position", "vtab", "dsprites_loc"),
        ("dsprites_orientation", "vtab", "dsprites_ori"),
        ("smallnorb_azimuth", "vtab", "smallnorb_azi"),
        ("smallnorb_elevation", "vtab", "smallnorb_ele"),
        ("standford-cars", "fewshot", "stanford-cars"),
        ("Food-101", "fewshot", "food101"),
        ("oxford_flowers102", "fewshot", "oxford-flowers102"),
        ("CUB-200-2011", "fgvc", "CUB_200_2011"),
        ("stanford_cars", "fgvc", "stanford_cars"),
    ],
)
def test_aliases(name, suite_name, expected):
    assert find_task(name, suite_name).name == expected
    assert find_task(name, suite_name).suite == suite_name


def test_no_name_means_two_tasks():
    for name in SUITES:
        spellings = [spelling for task in suite(name) for spelling in (task.name, *task.aliases)]
        for spelling in spellings:
            assert sum(task.is_called(spelling) for task in suite(name)) == 1, spelling


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown task 'smallnorb_az' in the suite 'vtab': did you mean smallnorb_az"):
        find_task("smallnorb_az", "vtab")
    with pytest.raises(ValueError, match="unknown task 'qq' in the suite 'fgvc': there are CUB_200_2011, nabirds"):
        find_task("qq", "fgvc")
    with pytest.raises(ValueError, match="unknown suite 'vtab1k'; there are vtab, fewshot, fgvc"):
        find_task("cifar", "vtab1k")


def test_rows_are_values():
    task = find_task("cifar", "vtab")
    assert pickle.loads(pickle.dumps(task)) == task and hash(task) == hash(find_task("cifar100", "vtab"))
    assert dataclasses.replace(task, sizes={"test": 3}).size("test") == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.num_classes = 1
