import dataclasses

import pytest

from peft_heads.data.suites import SUITES, find_suite
from peft_heads.data.tasks import TASKS


# (trained on, evaluated on): for the choice, and for the report
PROTOCOL = {
    "vtab": (("train800", "val200"), ("train800val200", "test")),
    "fewshot": (("train", "val"), ("train", "test")),
    "fgvc": (("train", "val"), ("train", "test")),
    "folder": (("train", "val"), ("train", "test")),
    "offline": (("train", "val"), ("train", "test")),
}


def test_the_protocol_of_every_suite():
    assert {name: (suite.chosen_by, suite.reported) for name, suite in SUITES.items()} == PROTOCOL
    for suite in SUITES.values():
        assert {*suite.chosen_by, *suite.reported} == set(suite.splits)
        assert "test" not in suite.chosen_by


def test_every_task_belongs_to_the_suite_that_it_names():
    assert sorted(task.name for suite in SUITES.values() for task in suite.tasks) == sorted(t.name for t in TASKS)
    for name, suite in SUITES.items():
        assert suite.name == name and {task.suite for task in suite.tasks} <= {name}
    assert {name: len(suite.tasks) for name, suite in SUITES.items()} == {
        "vtab": 19,
        "fewshot": 5,
        "fgvc": 5,
        "folder": 0,
        "offline": 6,
    }


def test_lists():
    vtab, few_shot = SUITES["vtab"].lists(), SUITES["fewshot"].lists()
    assert vtab == [(split, None, None) for split in ("train800", "val200", "train800val200", "test")]
    assert few_shot[:2] == [("train", 1, 0), ("train", 1, 1)] and few_shot[14] == ("train", 16, 2)
    assert few_shot[15:] == [("val", None, None), ("test", None, None)]


def test_a_suite_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SUITES["vtab"].splits = ()
    assert find_suite("fgvc") is SUITES["fgvc"]
    with pytest.raises(ValueError, match="unknown suite 'vtab1k'; there are vtab, fewshot, fgvc, folder, offline"):
        find_suite("vtab1k")
