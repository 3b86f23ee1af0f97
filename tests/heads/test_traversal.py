import pytest
import tiny
from peft import get_peft_model

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.heads import detect, traversal
from peft_heads.heads.traversal import named_targets, own_modules


CONFIGS = {
    "head-masked": lambda: HeadMaskedLoraConfig(ne=1),
    "1 bit": lambda: HeadMaskedLoraConfig(ne=1, adapter_bits=1, classifier_bits=1),
    "rlrr": lambda: RLRRConfig(ne=1),
}


def test_a_model_without_adapters_is_all_its_own():
    model = tiny.make("swin")
    assert dict(own_modules(model)) == dict(model.named_modules())
    assert [name for name, _ in own_modules(model)] == [name for name, _ in model.named_modules()]
    assert dict(named_targets(model)) == {name: m for name, m in model.named_modules() if name}


def test_wrapped_modules_are_looked_through():
    plain = [name for name, _ in tiny.make("vit").named_modules()]
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1)).get_base_model()
    query = tiny.now("vit.layers.0.attention.q_proj")
    names = [name for name, _ in own_modules(model)]
    assert set(names) - set(plain) == {
        *(name for name in (name + ".base_layer" for name in plain) if name in names),
        "classifier.original_module",
    }
    assert f"{query}.base_layer" in names and set(plain) <= set(names)
    assert f"{query}.base_layer" not in dict(named_targets(model)) and query in dict(named_targets(model))


def test_a_layer_of_the_model_that_is_called_base_layer():
    """timm's DLA has such a layer, beside others."""
    model = tiny.make("vit")
    model.vit.base_layer = tiny.make("vit").classifier
    names = [name for name, _ in model.named_modules() if name]
    assert [name for name, _ in named_targets(model)] == names


@pytest.mark.filterwarnings("ignore:the adapter saved to")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_effort_does_not_grow_with_the_adapters(kind, monkeypatch, tmp_path):
    """To add, load, choose and delete an adapter we visit as many modules with five adapters as with one."""
    visited = []
    walk = traversal._walk

    def counting(model):
        for entry in walk(model):
            visited.append(entry[0])
            yield entry

    monkeypatch.setattr(traversal, "_walk", counting)
    attention = detect._attention_layouts
    monkeypatch.setattr(detect, "_attention_layouts", lambda module: visited.append("") or attention(module))
    get_peft_model(tiny.make("vit"), CONFIGS[kind]()).save_pretrained(tmp_path)
    model = get_peft_model(tiny.make("vit"), CONFIGS[kind](), adapter_name="first")

    def effort(adapter):
        counts = []
        for act in (
            lambda: model.add_adapter(adapter, CONFIGS[kind]()),
            lambda: model.set_adapter(adapter),
            lambda: model.set_adapter("first"),
            lambda: model.delete_adapter(adapter),
            lambda: model.load_adapter(tmp_path, adapter),
        ):
            visited.clear()
            act()
            counts.append(len(visited))
        return counts

    with_one = effort("second")
    assert with_one[0] > 100 and with_one[-1] > 100
    for number in range(3):
        model.add_adapter(f"more{number}", CONFIGS[kind]())
    assert effort("fifth") == with_one
