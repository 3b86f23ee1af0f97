import math

import pytest

from peft_heads.benchmark.report.averages import averages, averages_over_seeds, group_means, mean_and_std


GROUPS = {"a": "one", "b": "one", "c": "one", "d": "two"}


def test_mean_and_unbiased_deviation():
    assert mean_and_std([1, 2, 6]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)))
    assert mean_and_std([0.5]) == (0.5, None)
    assert mean_and_std([]) == (None, None)


def test_both_averages():
    values = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 60.0}
    assert averages(values, GROUPS) == {
        "one": 20.0,
        "two": 60.0,
        "mean of group means": 40.0,
        "mean of tasks": 30.0,
    }
    assert averages({"a": 1.0, "b": 2.0}, {"a": "all", "b": "all"}) == {"mean of tasks": 1.5}


def test_a_missing_task_makes_its_averages_absent():
    assert group_means({"a": 1.0, "c": 1.0, "d": 7.0}, GROUPS) == {"one": None, "two": 7.0}
    assert averages({"a": 1.0, "b": None, "c": 1.0, "d": 7.0}, GROUPS) == {
        "one": None,
        "two": 7.0,
        "mean of group means": None,
        "mean of tasks": None,
    }


def test_deviation_of_averages_is_that_of_the_averages_per_seed():
    samples = {"a": {(0,): 10.0, (1,): 20.0}, "b": {(1,): 50.0, (0,): 30.0}, "c": {(0,): 20.0, (1,): 20.0}}
    groups = {"a": "one", "b": "one", "c": "two"}
    # per seed: one 20, 35; two 20, 20; mean of groups 20, 27.5; mean of tasks 20, 30
    assert averages_over_seeds(samples, groups) == {
        "one": (27.5, pytest.approx(15 / math.sqrt(2))),
        "two": (20.0, 0.0),
        "mean of group means": (23.75, pytest.approx(7.5 / math.sqrt(2))),
        "mean of tasks": (25.0, pytest.approx(10 / math.sqrt(2))),
    }
    samples["c"] = {(0,): 20.0, (2,): 20.0}
    assert averages_over_seeds(samples, groups)["mean of tasks"] == (25.0, None)
    del samples["c"]
    assert averages_over_seeds(samples, groups)["mean of tasks"] == (None, None)
