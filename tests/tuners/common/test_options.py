"""Options have the types, choices and help of the configurations' fields."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from peft import LoraConfig, PeftConfig
from throwaway import throwaway

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.tuners.common.method_registry import get_method
from peft_heads.tuners.common.options import HEAD_SETTINGS, LORA_OPTIONS, Option, complete, head_options


NAMES = ["one", "two"]


@dataclass
class Fields(PeftConfig):
    number: int | None = field(default=None, metadata={"help": "A number."})
    share: float = 0.5
    word: str = "w"
    kind: Literal["a", "b"] = "a"
    bits: Literal[1, 2] = 1
    named: str = field(default="one", metadata={"choices": NAMES})
    several: int | dict[str, int] = 1
    many: list[str] | None = None


@pytest.mark.parametrize(
    ("name", "kind", "choices", "default"),
    [
        ("number", int, None, None),
        ("share", float, None, 0.5),
        ("word", str, None, "w"),
        ("kind", Literal["a", "b"], ("a", "b"), "a"),
        ("bits", int, None, 1),  # the configuration has the choices
        ("named", Literal["one", "two"], ("one", "two"), "one"),
    ],
)
def test_type_and_choices_are_the_field_s(name, kind, choices, default):
    option = complete(Option(name), Fields)
    assert (option.type, option.choices, option.default) == (kind, choices, default)
    assert option.help == ("A number." if name == "number" else "")
    assert complete(Option(name, help="Other."), Fields).help == "Other."


def test_names_that_are_added_later_are_choices(monkeypatch):
    monkeypatch.setattr(f"{__name__}.NAMES", NAMES)
    NAMES.append("three")
    try:
        assert complete(Option("named"), Fields).choices == ("one", "two", "three")
    finally:
        NAMES.remove("three")


@pytest.mark.parametrize("name", ["several", "many"])
def test_what_is_no_single_value_is_left_to_peft_config(name):
    assert complete(Option(name), Fields) is None
    assert "steps" not in throwaway().option_table and "gain" in throwaway().option_table


def test_scale_is_alpha_by_rank():
    method = get_method("lora")
    assert method.config_of({"scale": 0.5, "r": 4}) == (LoraConfig, {"lora_alpha": 2.0, "r": 4})
    assert method.config_of({"scale": 2}) == (LoraConfig, {"lora_alpha": 16})  # with the rank that it has by default
    (scale,) = (option for option in LORA_OPTIONS if option.name == "scale")
    assert scale.read(LoraConfig(r=4, lora_alpha=6)) == 1.5


def test_head_options_are_the_fields_that_there_are():
    assert tuple(option.name for option in head_options(HeadMaskedLoraConfig)) == HEAD_SETTINGS
    assert {option.name for option in head_options(RLRRConfig)} == set(HEAD_SETTINGS) - {"mask_scope"}
