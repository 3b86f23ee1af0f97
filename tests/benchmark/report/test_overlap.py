import itertools

import pytest

from peft_heads.benchmark.report.overlap import Overlap, expected_jaccard, group_p_value, mask_overlap, overlaps


def masks(*off, num_heads=12, projections=("q", "v")):
    return {name: [head not in off for head in range(num_heads)] for name in projections}


@pytest.mark.parametrize(("num_heads", "first", "second"), [(4, 1, 1), (5, 2, 3), (6, 3, 3), (4, 0, 2), (4, 4, 2)])
def test_expected_jaccard_is_the_mean_over_all_choices(num_heads, first, second):
    sets = [
        (set(a), set(b))
        for a in itertools.combinations(range(num_heads), first)
        for b in itertools.combinations(range(num_heads), second)
    ]
    mean = sum(len(a & b) / len(a | b) for a, b in sets) / len(sets)
    assert expected_jaccard(num_heads, first, second) == pytest.approx(mean, abs=1e-12)


def test_overlap_of_two_runs():
    assert mask_overlap(masks(0, 1, 2), masks(1, 2, 3)) == (0.5, pytest.approx(expected_jaccard(12, 3, 3)))
    # q: {0} and {0}; v: {0} and {}; k: neither, which does not count
    first = masks(0) | masks(projections=("k",))
    second = masks(0, projections=("q",)) | masks(projections=("v", "k"))
    assert mask_overlap(first, second) == (0.5, pytest.approx((1 / 12 + 0) / 2))
    assert mask_overlap(masks(), masks()) is None


def test_within_and_between_groups():
    runs = {"a": [masks(0, 1), masks(0, 1)], "b": [masks(0, 2)], "c": [masks(5, 6)]}
    random = pytest.approx(expected_jaccard(12, 2, 2))
    assert overlaps(runs, {"a": "one", "b": "one", "c": "two"}) == [
        Overlap("same task, other seed", 1, 1.0, random),
        Overlap("same group", 2, pytest.approx(1 / 3), random),
        Overlap("different groups", 3, 0.0, random),
    ]
    assert overlaps({"a": [masks()], "b": [masks()]}, {"a": "one", "b": "one"}) == []


def test_p_value():
    groups = {f"t{i}": "one" if i < 4 else "two" for i in range(8)}
    alike = {task: [masks(0 if group == "one" else 7)] for task, group in groups.items()}
    # of the 70 ways to split eight tasks into two named groups of four, two separate them as the real one does
    assert group_p_value(alike, groups) == pytest.approx(2 / 70, abs=0.015)
    same = {task: [masks(3)] for task in groups}
    assert group_p_value(same, groups) == 1.0
    assert group_p_value(alike, dict.fromkeys(groups, "one")) is None
    assert group_p_value(alike, groups) == group_p_value(alike, groups)
