"""Merging adapters other than the active one: projections, trained classifiers and labels belong together."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, set_head_masks


CONFIGS = {
    "head-masked": lambda **options: HeadMaskedLoraConfig(ne=1, **options),
    "k bit": lambda **options: HeadMaskedLoraConfig(ne=1, adapter_bits=2, classifier_bits=4, **options),
    "dora": lambda **options: HeadMaskedLoraConfig(ne=1, use_dora=True, **options),
    "rlrr": lambda **options: RLRRConfig(ne=1, **options),
}
NAMES = {"one": {0: "a0", 1: "a1", 2: "a2"}, "two": {0: "b0", 1: "b1", 2: "b2", 3: "b3", 4: "b4"}}
BASE = {i: f"LABEL_{i}" for i in range(3)}


def logits(model):
    with torch.no_grad():
        return model(pixel_values=tiny.images()).logits


def labels(model):
    config = getattr(model, "get_base_model", lambda: model)().config
    assert config.num_labels == len(config.id2label)
    return config.id2label


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """Return a model with adapters one (3 classes, active) and two (5), and the logits of each."""
    make, expected = CONFIGS[request.param], {}
    for seed, (name, id2label) in enumerate(NAMES.items()):
        vit = tiny.make("vit", num_labels=len(id2label))
        vit.config.id2label = dict(id2label)
        one = get_peft_model(vit, make()).eval()
        generator = torch.Generator().manual_seed(seed)
        for key, param in one.named_parameters():
            if any(part in key for part in ("lora_", "rlrr_", "modules_to_save")):
                param.data += torch.randn(param.shape, generator=generator) * 0.3
        set_head_masks(one, tiny.masks_off(one, seed))
        one.save_pretrained(tmp_path / name)
        expected[name] = logits(one)
    model = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two")
    expected["base"] = logits(tiny.make("vit"))
    return model.eval(), expected


def check(merged, expected, id2label):
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert labels(merged) == id2label
    assert type(merged.classifier) is torch.nn.Linear


def test_another_than_the_active_adapter_is_merged(pair):
    model, expected = pair
    check(model.merge_and_unload(adapter_names=["two"]), expected["two"], NAMES["two"])


def test_adapters_are_merged_while_disabled(pair):
    model, expected = pair
    model.set_adapter("two")
    with model.disable_adapter():
        assert labels(model) == BASE
        merged = model.merge_and_unload()
    check(merged, expected["two"], NAMES["two"])


def test_the_active_one_is_merged_while_disabled_for_good(pair):
    model, expected = pair
    model.base_model.disable_adapter_layers()
    check(model.merge_and_unload(), expected["one"], NAMES["one"])


def test_another_one_is_merged_while_disabled(pair):
    model, expected = pair
    model.base_model.disable_adapter_layers()
    check(model.merge_and_unload(adapter_names=["two"]), expected["two"], NAMES["two"])


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
def test_the_merged_adapter_goes_with_its_own_head(pair):
    model, expected = pair
    model.set_adapter("two")
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected["two"], rtol=1e-4, atol=1e-5)
    check(model.merge_and_unload(), expected["two"], NAMES["two"])


def test_unloaded_while_disabled_it_is_the_base_model(pair):
    model, expected = pair
    model.merge_adapter()
    with model.disable_adapter():
        base = model.unload()
    check(base, expected["base"], BASE)


def test_unloaded_it_keeps_the_active_head_and_its_labels(pair):
    model, _ = pair
    model.set_adapter("two")
    head = model.get_base_model().classifier.modules_to_save["two"]
    base = model.unload()
    assert base.classifier is head and labels(base) == NAMES["two"]
    assert logits(base).shape == (4, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.merge_and_unload(adapter_names=["one", "two"]), "adapters one, two have each trained classifier"),
        (
            lambda m: m.merge_and_unload(adapter_names=["typo"]),
            "there is no adapter 'typo' to merge; the model has one, two",
        ),
        (
            lambda m: m.merge_adapter(adapter_names=["two"]),
            "with the classifier of adapter 'one' .expected that of adapter 'two'.; call set",
        ),
        (lambda m: m.merge_adapter(adapter_names=["typo"]), "there is no adapter 'typo' to merge"),
    ],
)
def test_refused_before_anything_changes(pair, call, message):
    model, expected = pair
    with pytest.raises(ValueError, match=message):
        call(model)
    with pytest.raises(TypeError, match="should be a list of strings"):
        model.merge_and_unload(adapter_names="two")
    for name in ("one", "two"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name]) and labels(model) == NAMES[name]


def test_a_merge_that_fails_leaves_heads_and_labels(pair):
    model, _ = pair
    broken = next(param for name, param in model.named_parameters() if name.endswith((".two.weight", "left.two")))
    broken.data.fill_(float("nan"))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    with pytest.raises(ValueError):
        model.merge_and_unload(safe_merge=True, adapter_names=["two"])
    assert labels(model) == NAMES["one"]
    assert {name for name, param in model.named_parameters() if param.requires_grad} == trained
    assert model.get_base_model().classifier.active_adapters == ["one"]


@pytest.mark.parametrize("kind", ["head-masked", "rlrr"])
def test_without_heads_adapters_are_merged_as_peft_merges_them(kind):
    model = get_peft_model(tiny.make("vit"), CONFIGS[kind](modules_to_save=[]), adapter_name="one").eval()
    model.add_adapter("two", CONFIGS[kind](modules_to_save=[]))
    for name, param in model.named_parameters():
        if ".two" in name and ("lora_B" in name or "rlrr_left" in name):
            param.data.fill_(0.1)
    model.set_adapter("two")
    expected = logits(model)
    model.set_adapter("one")
    model.merge_adapter(adapter_names=["two"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["two"])), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["head-masked", "rlrr"])
def test_labels_are_those_of_the_head_among_several_active_adapters(kind):
    model = get_peft_model(tiny.make("vit"), CONFIGS[kind](modules_to_save=[]), adapter_name="one")
    model.add_adapter("two", CONFIGS[kind]())
    model.base_model.adapter_labels["two"] = dict(NAMES["one"])
    model.base_model.set_adapter(["one", "two"])
    assert labels(model) == NAMES["one"]
    assert labels(model.merge_and_unload()) == NAMES["one"]
