"""The table of criteria, and what may be added to it."""

import pytest
import torch

from peft_heads.heads.criterion_registry import BUILT_IN, CRITERIA, register_criterion
from peft_heads.heads.scores import head_scores


def test_the_table_of_criteria(forget_criteria):
    function = torch.zeros_like
    register_criterion("mine-2.0", function, needs_gradients=False, is_taylor=True)
    register_criterion("mine-2.0", function, needs_gradients=False, is_taylor=True)  # harmless
    assert list(CRITERIA)[-1] == "mine-2.0" and len(CRITERIA) == len(BUILT_IN) + 1
    assert (CRITERIA["mine-2.0"].needs_gradients, CRITERIA["mine-2.0"].is_taylor) == (False, True)
    assert {name for name in BUILT_IN if CRITERIA[name].is_taylor} == {
        "absolute",
        "positive",
        "negative",
        "most_responsive",
    }
    assert {name for name in BUILT_IN if CRITERIA[name].needs_gates} == {"gate", "gate_signed", "gate_squared"}
    with pytest.raises(
        ValueError, match="one of absolute, .*, most_responsive, mine-2.0; got 'yours'.*--plugin MODULE"
    ):
        head_scores("yours", {})
    register_criterion("gated", function, needs_gates=True)
    assert CRITERIA["gated"].needs_gates and CRITERIA["gated"].needs_gradients
    with pytest.raises(TypeError):
        CRITERIA["theirs"] = CRITERIA["absolute"]


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("absolute", lambda heads: heads.absolute, "there is a criterion 'absolute' already"),
        ("two words", lambda heads: heads.absolute, "letters, digits.*got 'two words'"),
        ("", lambda heads: heads.absolute, "got ''"),
        (1, lambda heads: heads.absolute, "got 1"),
        ("mine", "absolute", "criterion 'mine' needs a function of HeadStatistics; got 'absolute'"),
    ],
)
def test_what_cannot_be_registered(name, function, message):
    before = dict(CRITERIA)
    with pytest.raises(ValueError, match=message):
        register_criterion(name, function)
    assert dict(CRITERIA) == before
