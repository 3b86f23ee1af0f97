import pytest

from peft_heads.benchmark.report.groups import suite_groups
from peft_heads.benchmark.report.published import AVERAGING, disagreements, published_rows


SUITES = {suite: suite_groups(suite) for suite in ("vtab", "fgvc")}
GROUPS = SUITES["vtab"]
ROWS = [row for suite in SUITES for row in published_rows(suite)]


def find(paper, table, method, checkpoint="ImageNet-21k"):
    (row,) = (
        row for row in ROWS if (row.paper, row.table, row.method, row.checkpoint) == (paper, table, method, checkpoint)
    )
    return row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.source}-{row.checkpoint}-{row.method}")
def test_rows_are_whole_and_their_averages_follow_from_them(row):
    groups = SUITES[row.suite]
    assert set(row.tasks) in (set(), set(groups)) and (row.tasks or set(row.groups) == set(groups.values()))
    assert all(0 < value < 100 for value in row.tasks.values())
    found = {
        (item.name, item.printed): item.recomputed for item in disagreements(row.suite, groups) if item.row == row
    }
    expected = {
        (name, printed): recomputed for where, name, printed, recomputed in DISAGREEMENTS if find(*where) == row
    }
    assert found == {key: pytest.approx(value, abs=0.006) for key, value in expected.items()}


# All printed values that do not follow from the papers' figures, computed by hand.
DISAGREEMENTS = [
    (("RLRR", "3", "RLRR"), "mean of tasks", 90.4, 90.5),
    (("RLRR", "7", "MLP-4"), "structured", 31.2, 35.03),
    (("RLRR", "7", "VPT-Shallow"), "mean of tasks", 62.9, 62.71),
    (("RLRR", "7", "VPT-Deep"), "mean of tasks", 67.7, 68.59),
    (("RLRR", "8", "VPT-Shallow", "MAE"), "natural", 40.0, 40.47),
    (("RLRR", "9", "RLRR", "MoCo v3"), "structured", 62.1, 60.78),
    (("RLRR", "9", "RLRR", "MoCo v3"), "mean of tasks", 73.1, 71.96),
    # a mean of tasks in a table that says it prints means of group means
    (("SynQT", "3", "Head2Toe", "ImageNet-1k"), "mean of group means", 63.3, 66.83),
]


def test_the_two_averages_of_full_fine_tuning():
    averages = find("HEAT", "1", "Full").recomputed(GROUPS)
    assert averages["mean of group means"] == pytest.approx(68.97, abs=0.005)
    assert averages["mean of tasks"] == pytest.approx(65.57, abs=0.005)
    assert find("RLRR", "2", "Full").average == 65.6


def test_rows_of_group_means():
    row = find("HEAT", "4", "HEAT negative, ne = 1")
    assert row.tasks == {} and row.average == 76.77 and row.note == "fixed setting"
    # (81.59 + 85.68 + 63.04) / 3 and (7 · 81.59 + 4 · 85.68 + 8 · 63.04) / 19
    averages = row.recomputed(GROUPS)
    assert averages["mean of group means"] == pytest.approx(76.77) and averages["natural"] == pytest.approx(81.59)
    assert averages["mean of tasks"] == pytest.approx(74.64, abs=0.005)


def test_the_headline_is_labelled():
    row = find("HEAT", "1", "HEAT")
    assert row.average == 77.2 and row.note == "best of all variants per task, chosen on test"
    bi_lora = find("HEAT", "1", "Bi-LoRA")
    assert all(row.tasks[task] >= bi_lora.tasks[task] for task in GROUPS)
    assert row.size_mb == 0.14 and find("RLRR", "2", "RLRR").parameters_m == 0.33
    assert {row.averaging for row in ROWS} == set(AVERAGING)
