"""The types of the values in a configuration's file."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from peft import LoraConfig

from peft_heads import HeadMaskedLoraConfig
from peft_heads.tuners.common.setting_types import check_choice, check_types, fits, refusal


@dataclass
class Part:
    number: int = 0


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        ("1", float, False),
        (1, bool, False),
        (None, int | None, True),
        ("a", int | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ("ab", list[str], False),
        (["a"], set[str], True),
        ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False),
        ([1], dict[str, int], False),
        ({"number": 1}, Part, True),
        (1, Part, False),
        (object(), Any, True),
    ],
)
def test_fits(value, hint, expected):
    assert fits(value, hint) == expected


def test_numbers_with_a_fraction_pass_where_they_may():
    assert fits(0.5, int | None, is_number=True) and fits({"q": 0.5}, dict[str, int], is_number=True)
    assert not fits("0.5", int, is_number=True) and not fits(True, int, is_number=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8},
        {"lora_alpha": 0.5},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "Gaussian"},
        {"no": 1},
    ],
    ids=str,
)
def test_what_peft_accepts(settings):
    check_types(LoraConfig, settings)
    check_types(HeadMaskedLoraConfig, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": "8"}, "r is '8' of type str: a wrong type"),
        ({"r": 8.5}, "r is '8.5' of type float"),
        ({"use_dora": 1}, "use_dora is '1' of type int"),
        ({"target_modules": [1]}, r"target_modules is '\[1\]' of type list"),
        ({"init_lora_weights": "pissa_niter_16x"}, "init_lora_weights is 'pissa_niter_16x'"),
        ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights is 'pissa_niter_'"),
    ],
    ids=str,
)
def test_a_wrong_type_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        check_types(LoraConfig, settings)


def test_a_type_that_does_not_exist_at_run_time_is_not_checked():
    @dataclass
    class Config:
        value: "Nowhere" = field(default=1)  # noqa: F821

    check_types(Config, {"value": "anything"})


def test_check_choice():
    check_choice(Part(1), "number", (1, 2))
    with pytest.raises(ValueError, match="number must be one of a, b; got 3"):
        check_choice(Part(3), "number", ("a", "b"))


def test_refusal_names_the_folder_once():
    assert str(refusal("a/b", ValueError("a/b/c.json is damaged"))) == "a/b/c.json is damaged"
    assert str(refusal("a/b", ValueError("it is\ndamaged"))) == "a/b: it is damaged"
    tripped = str(refusal("a/b", KeyError("r")))
    assert tripped == "a/b: its settings and weights cannot be used (KeyError: 'r')"
