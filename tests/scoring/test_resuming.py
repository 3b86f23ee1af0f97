"""What a run resumes from a checkpoint, without a Trainer: decisions from entries of `TrainerState.stateful_callbacks`."""

import pytest
from transformers import TrainerState

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.scoring.resuming import check_settings, saved_progress, saved_scores


SCORES = {"num_steps": 3, "num_skipped": 0, "sums": {"q": [[1.0], [2.0], [3.0]]}}


def entry(adapter="default", **progress):
    return {"attributes": {"progress": {"first_step": 5, "select_step": 8, "adapter": adapter, **progress}}}


def state(*entries):
    return TrainerState(stateful_callbacks={"Scorer": list(entries)})


def test_the_last_entry_of_the_adapter_counts():
    entries = [entry(scores=1), entry("other", scores=2), entry(scores=3), {"attributes": {}}]
    assert saved_progress(state(*entries), "Scorer", "default")["scores"] == 3
    assert saved_progress(state(*entries), "Scorer", "other")["scores"] == 2
    single = TrainerState(stateful_callbacks={"Scorer": entry(scores=4)})  # as Trainer saves one callback
    assert saved_progress(single, "Scorer", "default")["scores"] == 4


def test_an_entry_without_the_adapter_s_name_is_an_older_one():
    old = entry(scores=1)
    del old["attributes"]["progress"]["adapter"]
    assert saved_progress(state(old), "Scorer", "whatever")["scores"] == 1


def test_without_an_entry():
    assert saved_progress(state(), "Scorer", "default") == saved_progress(state(entry()), "Another", "default") == {}


def test_entries_of_other_adapters_are_refused():
    message = "scored the heads of adapter 'a', 'b', but this run scores 'default'; activate"
    with pytest.raises(ValueError, match=message):
        saved_progress(state(entry("a"), entry("b"), entry("a")), "Scorer", "default")


@pytest.mark.parametrize("config", [HeadMaskedLoraConfig, RLRRConfig])
def test_settings_may_change_until_the_selection(config):
    saved = {"settings": config(ne=1).selection_settings, "selected_at": None}
    now = config(ne=2, criterion="positive").selection_settings
    check_settings(saved, now)
    check_settings({**saved, "selected_at": 8}, saved["settings"])
    with pytest.raises(ValueError, match=r"selected at step 8 .* has ne=2 \(was 1\), criterion='positive' \(was 'abs"):
        check_settings({**saved, "selected_at": 8}, now)


def test_scores_continue_in_the_same_window_alone():
    saved = entry(scores=SCORES)["attributes"]["progress"]
    assert saved_scores(saved, 5, 8) is SCORES
    with pytest.raises(ValueError, match="window of steps 5 to 8, but this run's window is 5 to 9; .* select_at=8"):
        saved_scores(saved, 5, 9)
    skipped = {**SCORES, "num_steps": 0, "num_skipped": 1}
    assert saved_scores({**saved, "scores": skipped}, 5, 8) is skipped
    nothing = {**SCORES, "num_steps": 0}
    for scores in (None, nothing):
        assert saved_scores({**saved, "scores": scores}, 1, 2) is None  # any window will do
    assert saved_scores({}, 1, 2) is None
