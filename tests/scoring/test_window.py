import pytest

from peft_heads.scoring.window import plan_window


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
