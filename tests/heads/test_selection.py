import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_heads.heads.layout import HeadLayout
from peft_heads.heads.selection import (
    HeadGroup,
    check_head_count,
    degenerate_groups,
    floor_ratio,
    groups_kept_whole,
    plan_groups,
    select_heads,
    select_units,
)


def swin_b():
    """q and v of Swin-B: 2, 2, 18, 2 layers with 4, 8, 16, 32 heads."""
    return {
        f"stages.{stage}.blocks.{block}.attention.{part}": HeadLayout(role, heads, 32)
        for stage, (depth, heads) in enumerate([(2, 4), (2, 8), (18, 16), (2, 32)])
        for block in range(depth)
        for part, role in (("q_proj", "query"), ("v_proj", "value"))
    }


def off(mask):
    return set((~mask).nonzero().flatten().tolist())


def test_swin_b_ratio():
    groups = plan_groups(swin_b(), ratio=0.25)
    assert [(g.num_heads, g.num_deactivated, len(g.modules)) for g in groups] == [
        (4, 1, 4),
        (8, 2, 4),
        (16, 4, 36),
        (32, 8, 4),
    ]


@settings(deadline=None)
@given(
    heads=st.lists(st.integers(2, 6), min_size=1, max_size=4),
    ne=st.integers(0, 7),
    granularity=st.sampled_from(["global", "layer"]),
    joint=st.booleans(),
    data=st.data(),
)
def test_against_the_reference(heads, ne, granularity, joint, data):
    """Scores have few distinct values, so that ties are common."""
    layouts, scores, plain = {}, {}, {}
    for layer, num_heads in enumerate(heads):
        for part in ("query", "value"):
            name = f"layers.{layer}.{part}"
            values = data.draw(st.lists(st.integers(0, 3), min_size=num_heads, max_size=num_heads))
            layouts[name] = HeadLayout(part, num_heads, 2)
            scores[name] = torch.tensor(values, dtype=torch.float64)
            plain[layer, part] = [float(v) for v in values]
    if ne and all(ne >= h for h in heads):
        with pytest.raises(ValueError, match=f"ne={ne} applies to no group"):
            plan_groups(layouts, ne=ne, granularity=granularity, joint=joint)
        return
    masks = select_heads(scores, plan_groups(layouts, ne=ne, granularity=granularity, joint=joint))
    expected = reference.deactivated(plain, ne=ne, granularity=granularity, joint=joint)
    assert {(int(n.split(".")[1]), n.split(".")[2]): off(m) for n, m in masks.items()} == expected


def test_ties_go_to_the_lower_index():
    layouts = {"a.q": HeadLayout("query", 5, 1)}
    masks = select_heads({"a.q": torch.tensor([1.0, 0.5, 0.5, 0.5, 1.0])}, plan_groups(layouts, ne=2))
    assert off(masks["a.q"]) == {1, 2}


def test_joint_and_separate():
    layouts = {"a.q": HeadLayout("query", 3, 1), "a.v": HeadLayout("value", 3, 1)}
    scores = {"a.q": torch.tensor([0.0, 1.0, 5.0]), "a.v": torch.tensor([9.0, 1.0, 0.0])}
    together = select_heads(scores, plan_groups(layouts, ne=1))
    assert off(together["a.q"]) == off(together["a.v"]) == {1}
    apart = select_heads(scores, plan_groups(layouts, ne=1, joint=False))
    assert (off(apart["a.q"]), off(apart["a.v"])) == ({0}, {2})


def test_joint_needs_equal_heads():
    layouts = {"a.q": HeadLayout("query", 4, 1), "a.v": HeadLayout("value", 2, 2)}
    with pytest.raises(ValueError, match=r"a\.q has 4 heads and a\.v has 2; pass joint=False"):
        plan_groups(layouts, ne=1)
    assert len(plan_groups(layouts, ne=1, joint=False)) == 2


def test_small_groups_keep_their_heads():
    layouts = {"a.q": HeadLayout("query", 2, 1), "b.q": HeadLayout("query", 4, 1)}
    groups = plan_groups(layouts, ne=2)
    assert [g.num_deactivated for g in groups] == [0, 2]
    assert "ne=2" in groups_kept_whole(groups, 2) and "2 heads (a.q" in groups_kept_whole(groups, 2)
    assert groups_kept_whole(plan_groups(layouts, ne=1), 1) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ne": -1}, "at least 0; got -1"),
        ({"ne": 1.5}, "integer of at least 0; got 1.5"),
        ({"ne": True}, "got True"),
        ({"ne": 1, "ratio": 0.5}, "not both; got ne=1 and ratio=0.5"),
        ({}, "give ne"),
        ({"ratio": 1.0}, r"in \[0, 1\); got 1.0"),
        ({"ratio": -0.1}, r"in \[0, 1\); got -0.1"),
        ({"ne": 12}, "ne=12 applies to no group of heads: the groups have 2, 4 heads"),
        ({"ratio": 0.2}, "ratio=0.2 applies to no group"),
        ({"ne": 1, "granularity": "stage"}, "'global' or 'layer'; got 'stage'"),
    ],
)
def test_errors(arguments, message):
    layouts = {"a.q": HeadLayout("query", 2, 1), "b.q": HeadLayout("query", 4, 1)}
    with pytest.raises(ValueError, match=message):
        plan_groups(layouts, **arguments)


def test_zero_is_allowed():
    layouts = {"a.q": HeadLayout("query", 2, 1)}
    for arguments in ({"ne": 0}, {"ratio": 0}, {"ratio": 0.0}):
        check_head_count(**{"ne": None, "ratio": None, **arguments})
        assert plan_groups(layouts, **arguments)[0].num_deactivated == 0


def test_floor_ratio():
    assert floor_ratio(0.29, 100) == 29  # 0.29 * 100 == 28.999999999999996
    assert [floor_ratio(0.25, heads) for heads in (3, 4, 8, 16, 32)] == [0, 1, 2, 4, 8]


def test_scores_that_are_not_finite_order_nothing():
    layouts = {"a.q": HeadLayout("query", 3, 1), "a.v": HeadLayout("value", 3, 1)}
    scores = {"a.q": torch.tensor([1.0, 2.0, 3.0]), "a.v": torch.tensor([0.0, float("nan"), 0.0])}
    with pytest.raises(ValueError, match=r"heads of a\.q, a\.v are not finite: \[1\.0, nan, 3\.0\]"):
        select_heads(scores, plan_groups(layouts, ne=1))
    assert off(select_heads(scores, plan_groups(layouts, ne=0))["a.v"]) == set()
    # the sum of finite scores
    scores = dict.fromkeys(scores, torch.full((3,), 1.5e308, dtype=torch.float64))
    with pytest.raises(ValueError, match="not finite"):
        select_heads(scores, plan_groups(layouts, ne=1))


def test_degenerate_groups():
    layouts = {"a.q": HeadLayout("query", 3, 1), "b.q": HeadLayout("query", 2, 1), "c.q": HeadLayout("query", 4, 1)}
    scores = {"a.q": torch.full((3,), 0.25), "b.q": torch.zeros(2), "c.q": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    groups = plan_groups(layouts, ne=2)
    assert [group.modules for group in degenerate_groups(scores, groups)] == [("a.q",)]  # b keeps all its heads
    assert off(select_heads(scores, groups)["a.q"]) == {0, 1}
    assert degenerate_groups(scores, plan_groups(layouts, ne=0)) == []


def off_units(*args):
    return (~select_units(*args)).nonzero().flatten().tolist()


def test_units_of_a_layer():
    scores = torch.tensor([2.0, 1.0, 3.0, 1.0, 0.5, 1.0])
    assert [off_units(scores, n) for n in range(6)] == [[], [4], [1, 4], [1, 3, 4], [1, 3, 4, 5], [0, 1, 3, 4, 5]]
    assert select_units(scores.float().bfloat16(), 1).dtype == torch.bool


def test_units_that_are_off_stay_off_and_count():
    scores = torch.tensor([torch.nan, 1.0, 3.0, 0.0])  # of a unit that is off, nobody asks for a score
    already = torch.tensor([True, False, True, False])
    assert [off_units(scores, n, already) for n in (0, 1, 2, 3)] == [[0, 2], [0, 2], [0, 2], [0, 2, 3]]
    assert already.tolist() == [True, False, True, False]


def test_cuts_one_after_the_other_are_those_of_one():
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    active = select_units(scores, 7)
    assert torch.equal(select_units(scores, 20, ~active), select_units(scores, 20))


@pytest.mark.parametrize(
    ("num_off", "already", "message"),
    [
        (3, None, "a layer of 3 gives up, an integer from 0 to 2; got 3"),
        (-1, None, "got -1"),
        (1.0, None, "got 1.0"),
        (1, torch.tensor([True]), r"a bool tensor of shape \(3,\), one entry per score; got torch.bool \(1,\)"),
        (1, torch.zeros(3), "got torch.float32"),
        (1, torch.tensor([True, False, False]), "the scores of a layer's 3 units are not all finite"),
    ],
)
def test_units_that_cannot_be_selected(num_off, already, message):
    with pytest.raises(ValueError, match=message):
        select_units(torch.tensor([0.0, torch.inf, 1.0]), num_off, already)


def test_heads_that_are_off_already_stay_off_and_count():
    scores = {"a.q": torch.tensor([0.0, 5.0, 1.0, 9.0, 2.0]), "a.v": torch.tensor([0.0, 0.0, 0.0, torch.nan, 0.0])}
    group = HeadGroup(("a.q", "a.v"), num_heads=5, num_deactivated=3, already_off=(3,))
    assert select_heads(scores, [group])["a.v"].tolist() == [False, True, False, False, True]
    fewer = HeadGroup(("a.q", "a.v"), num_heads=5, num_deactivated=1, already_off=(3, 4))
    assert select_heads(scores, [fewer])["a.q"].tolist() == [True, True, True, False, False]
    with pytest.raises(ValueError, match="are not finite"):
        select_heads(scores, [HeadGroup(("a.q", "a.v"), num_heads=5, num_deactivated=3, already_off=(1,))])


def test_the_scores_of_remaining_heads_alone_say_whether_order_decides():
    scores = {"q": torch.tensor([7.0, 0.0, 0.0])}
    group = HeadGroup(("q",), num_heads=3, num_deactivated=2, already_off=(0,))
    assert degenerate_groups(scores, [group]) == [group]
    assert degenerate_groups(scores, [HeadGroup(("q",), num_heads=3, num_deactivated=2)]) == []
    assert degenerate_groups(scores, [HeadGroup(("q",), num_heads=3, num_deactivated=1, already_off=(0,))]) == []
