"""The registry of methods: a registered method is known everywhere, and nothing is registered twice."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from peft import LoHaConfig, LoHaModel, LoraConfig, get_peft_model
from throwaway import ThrowawayConfig, ThrowawayModel, registered, throwaway
from transformers import AutoModelForImageClassification

import peft_heads
from peft_heads import Method, RLRRConfig, register_method
from peft_heads._compat.peft import is_own
from peft_heads._compat.transformers_loading import no_faults
from peft_heads.convert.inspect import inspect_adapter
from peft_heads.tuners.common import method_registry
from peft_heads.tuners.common.method_registry import (
    adapter_types,
    card_tags,
    get_method,
    is_own_type,
    method_of,
    own_prefixes,
    parameter_prefixes,
    registered_methods,
)
from peft_heads.tuners.common.saved_keys import is_adapter_key, module_of
from peft_heads.tuners.common.saved_settings import is_settings_key


KEY = "base_model.model.vit.q.throw_gain"


def test_the_methods_of_the_package():
    names = [method.name for method in registered_methods()]
    assert names == ["head-masked-lora", "rlrr", "lora", "linear", "full", "peft"]
    assert adapter_types() == ("LORA", "HEAD_MASKED_LORA", "RLRR") and adapter_types(LoraConfig) == adapter_types()[:2]
    assert parameter_prefixes() == ("lora_", "rlrr_") and own_prefixes() == ("rlrr_",)
    assert card_tags() == ("head-masked-lora", "rlrr", "peft_heads")
    assert [is_own_type(name) for name in ("RLRR", "LORA", "LOHA", None)] == [True, False, False, False]
    assert method_of("LORA").name == method_of(LoraConfig()).name == "lora" and method_of("LOHA") is None
    # heads: by default, if asked for, never
    assert [method.deactivates_by_default for method in registered_methods()[:3]] == [True, False, False]
    assert [method.scores_heads for method in registered_methods()[:3]] == [True, True, False]


def test_what_is_registered_is_known_and_gone_with_the_test():
    def seen():
        return (
            method_of("THROW_AWAY") is not None,
            "THROW_AWAY" in adapter_types(LoraConfig),
            is_own_type("THROW_AWAY"),
            is_adapter_key(KEY) and module_of(KEY) == "vit.q",
            is_settings_key("base_model.model.throw_settings"),
            "throw_" in own_prefixes(),
            "throw-away" in card_tags(),
            "throw_" in no_faults()["unexpected_keys"],
            registered_methods()[-1].name == "throw-away",
        )

    assert not any(seen())
    with registered(throwaway()) as method:
        assert all(seen()), seen()
        assert is_own(ThrowawayConfig()) and method_of(ThrowawayConfig()) is get_method("throw-away") is method
        assert method.peft_type == "THROW_AWAY" and method.prefix == "throw_" and not method.scores_heads
        assert "lora" not in card_tags()  # a tag of PEFT's cards, too
        assert module_of("base_model.model.vit.q.lora_A.weight") == "vit.q"
    assert not any(seen())
    with pytest.raises(ValueError, match="there is no method 'throw-away' .known: head-masked-lora, rlrr, "):
        get_method("throw-away")


def test_the_same_again_is_harmless():
    with registered(throwaway()):
        register_method(throwaway())
        assert [method.name for method in registered_methods()].count("throw-away") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "rlrr"}, r"a method 'rlrr' already \(peft_heads.*RLRRModel\): method 'rlrr' \(throwaway.Throwaway"),
        ({"name": "RLRR"}, "a method 'rlrr' already .*: method 'RLRR'"),
        ({"name": "linear"}, "a method 'linear' already"),
        ({"name": "loha"}, r"LOHA is a type of PEFT's own \(peft.*LoHaConfig\): method 'loha' \(throwaway.Throwaway"),
        ({"name": "prefix-tuning", "model": None}, "PREFIX_TUNING is a type of PEFT's own"),
        ({"name": "loha", "config": LoHaConfig, "model": LoHaModel, "options": ()}, "LOHA is a type of PEFT's own"),
    ],
)
def test_names_that_are_taken(changes, message):
    before = registered_methods()
    with pytest.raises(ValueError, match=message), registered(throwaway(**changes)):
        pass
    assert registered_methods() == before


def test_a_method_of_peft_may_have_its_own_name():
    """The record adds options for the commands; PEFT has the tuner."""
    with registered(Method(name="loha", help="LoHa", config=LoHaConfig, options=("r", "alpha"))) as method:
        assert method.prefix == "hada_" and method.peft_type == "LOHA" and not is_own_type("LOHA")
        assert {name: option.default for name, option in method.option_table.items()} == {"r": 8, "alpha": 8}


def test_options_that_are_no_fields():
    with pytest.raises(ValueError, match="'throw-away' has the option 'gian', .* its configuration .ThrowawayConfig"):
        throwaway(options=("gain", "gian"))
    with pytest.raises(ValueError, match="option 'gain', which is no field of its configuration .no configuration"):
        Method(name="none", help="", options=("gain",))


def test_nothing_else_names_a_method():
    """A method costs its folder and its registration: no other code tests for one of our methods."""
    root, found = Path(peft_heads.__file__).parent, []
    names = ("RLRR", "rlrr", "HEAD_MASKED_LORA", "head-masked-lora", "THROW_AWAY")
    files = [path for path in root.rglob("*.py") if path.parent.name not in ("rlrr", "head_masked_lora")]
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else getattr(node, "elts", [])
            constants = [part.value for part in parts if isinstance(part, ast.Constant)]
            if any(value in names for value in constants):
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == []


def test_a_method_that_says_nothing_of_norms(tmp_path, monkeypatch):
    """`inspect` states that there are no norms, instead of showing nothing."""
    tiny.make("vit").save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, RLRRConfig()).save_pretrained(tmp_path / "adapter")
    known = get_method("rlrr")
    assert inspect_adapter(tmp_path / "adapter").no_norms == known.no_norms != ""
    monkeypatch.setitem(method_registry._METHODS, "rlrr", replace(known, no_norms=""))
    assert inspect_adapter(tmp_path / "adapter").no_norms == "the update of RLRR is not computed from its file"


def test_the_tuner_is_peft_s():
    with registered(throwaway()):
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        assert PEFT_TYPE_TO_TUNER_MAPPING["THROW_AWAY"] is ThrowawayModel


def test_a_grid_of_no_options_is_refused():
    with pytest.raises(ValueError, match=r"the grid of method 'zz' has 'nope', which is none of its options \(none\)"):
        register_method(Method(name="zz", help="", apply=lambda model: model, grid={"nope": [1]}))
