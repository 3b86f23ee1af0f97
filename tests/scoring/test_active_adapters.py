import pytest
import tiny
from peft import get_peft_model, inject_adapter_in_model

from peft_heads import HeadMaskedLoraConfig
from peft_heads.scoring.active_adapters import active_adapters, adapter_to_score


@pytest.fixture
def model():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, modules_to_save=[]), adapter_name="first")
    model.add_adapter("second", HeadMaskedLoraConfig(ne=1, modules_to_save=[]))
    return model


def test_the_first_active_adapter_is_scored_unless_one_is_named(model):
    assert active_adapters(model) == ["first"] and adapter_to_score(model, None) == "first"
    model.base_model.set_adapter(["second", "first"])
    assert active_adapters(model) == ["second", "first"] and adapter_to_score(model, None) == "second"
    assert adapter_to_score(model, "first") == "first"


def test_adapters_that_cannot_be_scored(model):
    with pytest.raises(ValueError, match="no adapter 'third'; it has: first, second"):
        adapter_to_score(model, "third")
    with pytest.raises(
        ValueError, match=r"'second' is not active.*\(active: first\); call model.set_adapter\('second'\)"
    ):
        adapter_to_score(model, "second")


def test_a_model_without_a_peft_model_around_it():
    plain = tiny.make("vit")
    assert not isinstance(getattr(plain, "active_adapters", None), list)
    assert active_adapters(plain) == [] and adapter_to_score(plain, None) == "default"
    model = inject_adapter_in_model(HeadMaskedLoraConfig(ne=1), plain, adapter_name="mine")
    assert active_adapters(model) == ["mine"] and adapter_to_score(model, None) == "mine"
