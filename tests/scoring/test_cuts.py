import pytest

from peft_heads.scoring.cuts import plan_cuts, share_after, units_after


@pytest.mark.parametrize(
    ("first", "last", "cuts", "steps"),
    [
        (10, 50, 1, [10]),
        (10, 5, 1, [10]),  # a single cut has no last step
        (10, 50, 2, [10, 50]),
        (3, 10, 3, [3, 6, 10]),
        (2, 5, 4, [2, 3, 4, 5]),
    ],
)
def test_cuts_are_evenly_spaced(first, last, cuts, steps):
    assert plan_cuts(first, last, cuts) == steps


@pytest.mark.parametrize(("first", "last", "there"), [(2, 4, 3), (5, 4, 0), (9, 2, 0)])
def test_more_cuts_than_steps(first, last, there):
    with pytest.raises(ValueError, match=f"4 cuts from step {first} to step {last} are more than the {there} steps"):
        plan_cuts(first, last, 4)


def test_the_schedule_is_cubic_and_ends_with_all_units():
    for cuts in range(1, 30):
        shares = [share_after(cut, cuts) for cut in range(cuts + 1)]
        assert shares == pytest.approx([1 - (1 - cut / cuts) ** 3 for cut in range(cuts + 1)])
        for units in (0, 1, 5, 1536, 3071):
            off = [units_after(units, cut, cuts) for cut in range(1, cuts + 1)]
            assert off == sorted(off) and off[-1] == units
            assert all(
                number <= units * share < number + 1 + 1e-9 for number, share in zip(off, shares[1:], strict=True)
            )
