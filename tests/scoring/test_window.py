import pytest

from peft_heads.scoring.window import plan_window, plan_windows


@pytest.mark.parametrize(
    ("select_at", "warmup_epochs", "window", "first", "last"),
    [
        (0.1, None, "last_epoch", 1, 10),
        (0.28, None, "last_epoch", 9, 28),  # 0.28 * 100 == 28.000000000000004
        (50, None, "last_epoch", 31, 50),
        (50, None, "all", 1, 50),
        (50, None, "last_step", 50, 50),
        (1, None, "all", 1, 1),
        (None, 2, "last_epoch", 21, 40),
        (None, 0.01, "last_epoch", 1, 1),
        (None, 0.5, "all", 1, 10),
    ],
)
def test_windows(select_at, warmup_epochs, window, first, last):
    """There are 100 steps, 20 in an epoch."""
    planned = plan_window(
        select_at=select_at, warmup_epochs=warmup_epochs, window=window, max_steps=100, steps_per_epoch=20
    )
    assert (planned.first, planned.last) == (first, last)


@pytest.mark.parametrize(
    ("select_at", "warmup_epochs", "steps_per_epoch", "message"),
    [
        (101, None, 20, "select_at=101 selects heads at step 101, after the end of training at step 100"),
        (None, 6, 20, "warmup_epochs=6 of 20 steps selects heads at step 120, after the end"),
        (5, None, None, "window='last_epoch' needs the length of an epoch"),
        (None, 1, None, "warmup_epochs needs the length of an epoch"),
    ],
)
def test_windows_that_do_not_exist(select_at, warmup_epochs, steps_per_epoch, message):
    with pytest.raises(ValueError, match=message):
        plan_window(
            select_at=select_at,
            warmup_epochs=warmup_epochs,
            window="last_epoch",
            max_steps=100,
            steps_per_epoch=steps_per_epoch,
        )


@pytest.mark.parametrize(
    ("select_at", "window", "cuts", "last_cut", "windows"),
    [
        (10, "all", 1, None, [(1, 10)]),
        (10, "all", 3, 0.3, [(1, 10), (11, 20), (21, 30)]),
        (10, "all", 3, None, [(1, 10), (11, 30), (31, 50)]),  # half of training
        (10, "last_epoch", 3, None, [(1, 10), (11, 30), (31, 50)]),
        (30, "last_epoch", 2, 90, [(11, 30), (71, 90)]),
        (30, "last_epoch", 2, 40, [(11, 30), (31, 40)]),  # no step counts for two cuts
        (30, "last_step", 2, 40, [(30, 30), (40, 40)]),
        (98, "last_step", 3, 100, [(98, 98), (99, 99), (100, 100)]),
    ],
)
def test_windows_of_several_cuts(select_at, window, cuts, last_cut, windows):
    """There are 100 steps, 20 in an epoch."""
    length = {"max_steps": 100, "steps_per_epoch": 20, "warmup_epochs": None}
    planned = plan_windows(select_at=select_at, window=window, cuts=cuts, last_cut=last_cut, **length)
    assert [(each.first, each.last) for each in planned] == windows


@pytest.mark.parametrize(
    ("select_at", "cuts", "last_cut", "message"),
    [
        (60, 2, None, "2 cuts from step 60 to step 50 are more than the 0 steps there"),
        (10, 5, 13, "5 cuts from step 10 to step 13 are more than the 4 steps there"),
        (10, 2, 101, "last_cut=101 is after the end of training at step 100"),
    ],
)
def test_cuts_that_do_not_fit(select_at, cuts, last_cut, message):
    length = {"max_steps": 100, "steps_per_epoch": 20, "warmup_epochs": None, "window": "all"}
    with pytest.raises(ValueError, match=message):
        plan_windows(select_at=select_at, cuts=cuts, last_cut=last_cut, **length)
