import json
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora.layer import Conv2d, Linear
from safetensors.torch import load_file, save_file
from torch import nn

from peft_heads import HeadMaskedLoraConfig, get_head_masks, set_head_masks
from peft_heads.tuners import HeadMaskedLinear


def layers(model, kind):
    return [name for name, module in model.get_base_model().named_modules() if type(module) is kind]


def test_needs_nothing_else(backbone):
    model = get_peft_model(tiny.make(backbone), HeadMaskedLoraConfig(ne=1))
    config = model.peft_config["default"]
    assert config.target_modules == tiny.now({"q_proj", "v_proj"})
    assert config.modules_to_save == ["classifier"]
    assert all(name.endswith(tiny.now((".q_proj", ".v_proj"))) for name in layers(model, HeadMaskedLinear))
    assert len(layers(model, HeadMaskedLinear)) == (4 if backbone == "vit" else 8)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("classifier" in n for n in trained)
    assert all("lora_" in n or "classifier" in n for n in trained)


def test_opt_out_of_the_classifier():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, modules_to_save=[]))
    assert not any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_second_adapter_finds_the_classifier_again():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    model.add_adapter("other", HeadMaskedLoraConfig(ne=2))
    assert model.peft_config["other"].modules_to_save == ["classifier"]
    assert model.peft_config["other"].target_modules == tiny.now({"q_proj", "v_proj"})


def test_targets_without_heads_get_stock_lora_and_are_named_once():
    base = tiny.make("vit")
    targets = tiny.now(["q_proj", "v_proj", "o_proj", "fc1", "projection"])
    with pytest.warns(UserWarning, match="no attention heads") as caught:
        model = get_peft_model(base, HeadMaskedLoraConfig(ne=1, target_modules=targets))
    assert len([w for w in caught if w.category is UserWarning]) == 1
    for pattern in (
        "vit.embeddings.patch_embeddings.projection",
        tiny.now("vit.layers.*.attention.o_proj"),
        tiny.now("vit.layers.*.mlp.fc1"),
    ):
        assert pattern in next(str(w.message) for w in caught if w.category is UserWarning)
    assert (
        len(layers(model, Linear)) == 4
        and len(layers(model, Conv2d)) == 1
        and len(layers(model, HeadMaskedLinear)) == 4
    )
    assert len(get_head_masks(model)) == 4


def test_all_linear():
    with pytest.warns(UserWarning, match=tiny.now(r"no attention heads.*mlp\.fc1")):
        model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, target_modules="all-linear"))
    stock = get_peft_model(tiny.make("vit"), LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]))
    assert len(layers(model, HeadMaskedLinear)) == 6  # q, k, v of two layers
    assert set(layers(model, HeadMaskedLinear) + layers(model, Linear)) == set(layers(stock, Linear))


def test_injected_after_a_state_dict():
    """PEFT then follows the keys, not the configuration's targets; the projection still gets its mask."""
    source = get_peft_model(
        tiny.make("vit"), HeadMaskedLoraConfig(ne=1, target_modules=tiny.now(["k_proj"]), modules_to_save=[])
    )
    keys = {name.removeprefix("base_model.model."): p for name, p in get_peft_model_state_dict(source).items()}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(
            HeadMaskedLoraConfig(ne=1, target_modules=tiny.now(["q_proj"]), modules_to_save=[]),
            tiny.make("vit"),
            state_dict=keys,
        )
    assert list(get_head_masks(model)) == tiny.now([f"vit.layers.{i}.attention.k_proj" for i in range(2)])


def test_explicit_num_heads_that_does_not_divide():
    with pytest.warns(UserWarning, match=tiny.now(r"no attention heads.*vit\.layers\.\*\.attention\.v_proj")):
        model = get_peft_model(
            tiny.make("vit"), HeadMaskedLoraConfig(ne=1, num_heads=tiny.now({"q_proj": 3, "v_proj": 5}))
        )
    assert {len(m) for m in get_head_masks(model).values()} == {3}
    assert len(layers(model, Linear)) == 2 and all(name.endswith(tiny.now("v_proj")) for name in layers(model, Linear))


def test_num_heads_pattern_that_matches_nothing():
    with pytest.warns(UserWarning, match="num_heads keys did not match any target and were ignored: nope"):
        get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, num_heads={"nope": 3}))


def test_ne_0_names_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0, target_modules=tiny.now(["fc1"])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": tiny.now(["fc1", "o_proj"])}, tiny.now(r"nothing to deactivate\. Targets: .*o_proj.*Projections with heads in "
         r"this model: vit\.layers\.\*\.attention\.q_proj.*num_heads=.*ne=0")),
        ({"ne": 6}, "ne=6 applies to no group of heads: the groups have 6 heads"),
        ({"ratio": 0.1}, r"ratio=0\.1 applies to no group"),
        ({"num_heads": tiny.now({"q_proj": 3})}, tiny.now("q_proj has 3 heads and .*v_proj has 6; pass joint=False")),
    ],
)  # fmt: skip
def test_errors_leave_the_model_untouched(arguments, message):
    model = tiny.make("vit")
    before = str(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, HeadMaskedLoraConfig(**arguments))
    assert str(model) == before


def test_groups_that_are_too_small_warn_once():
    with pytest.warns(UserWarning, match=r"ne=2: 1 group.*2 heads") as caught:
        model = get_peft_model(tiny.make("swin"), HeadMaskedLoraConfig(ne=2))
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert {len(m) for m in get_head_masks(model).values()} == {2, 4}


class QuantisedLinear(nn.Linear):
    """A subclass of nn.Linear, like bitsandbytes' layers."""


def test_quantised_projections_are_refused_never_left_unmasked():
    model = tiny.make("vit")
    model.get_submodule(tiny.now("vit.layers.0.attention.q_proj")).__class__ = QuantisedLinear
    with pytest.raises(ValueError, match=tiny.now(r"layers\.0\.attention\.q_proj is a QuantisedLinear")):
        get_peft_model(model, HeadMaskedLoraConfig(ne=1))
    model = tiny.make("vit")
    model.get_submodule(tiny.now("vit.layers.0.attention.q_proj")).__class__ = QuantisedLinear
    get_peft_model(model, HeadMaskedLoraConfig(ne=0))  # plain LoRA is left to PEFT


def test_stock_lora_layer_in_the_way():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0, num_heads=tiny.now({"v_proj": 5})))
    with pytest.raises(ValueError, match="add the head-masked adapter first"):
        model.add_adapter("other", HeadMaskedLoraConfig(ne=1))


def test_ne_0_takes_the_stock_path():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0))
    for name in layers(model, HeadMaskedLinear):
        layer = model.get_base_model().get_submodule(name)
        assert not layer.lora_variant and not layer.lora_head_mask


@pytest.mark.parametrize("mask_scope", ["adapter", "head"])
def test_an_adapter_without_heads_on_a_masked_layer(mask_scope):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    with pytest.warns(UserWarning, match="no attention heads"):
        config = HeadMaskedLoraConfig(
            ne=1, num_heads=tiny.now({"v_proj": 5}), modules_to_save=[], mask_scope=mask_scope
        )
        model.add_adapter("other", config)
    tiny.randomize_lora(model)
    assert len(get_head_masks(model, "other")) == 2
    model.set_adapter("other")
    stock = get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj", "v_proj"])))
    for (_, ours), (_, theirs) in zip(lora_tensors(model, "other"), lora_tensors(stock, "default"), strict=True):
        theirs.data.copy_(ours.data)
    assert torch.equal(model.eval()(tiny.images()).logits, stock.eval()(tiny.images()).logits)


def lora_tensors(model, adapter_name):
    return [(n, p) for n, p in model.named_parameters() if "lora_" in n and f".{adapter_name}." in n]


# Files that contradict themselves


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    tiny.randomize_lora(model)
    set_head_masks(model, tiny.masks_off(model, 1))
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = tiny.now("base_model.model.vit.layers.1.attention.v_proj.")


def test_mask_and_weights_disagree(saved):
    edit(saved, lambda tensors: tensors[KEY + "lora_head_mask.mask"].logical_not_())
    with pytest.raises(
        ValueError,
        match=tiny.now(
            r"layers\.1\.attention\.v_proj the mask deactivates heads \[0, 2, 3, 4, 5\] of .* rows of lora_B.weight must be"
        ),
    ):
        PeftModel.from_pretrained(tiny.make("vit"), saved)


def test_masks_are_not_dropped_by_an_adapter_without(saved):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0))
    with pytest.raises(ValueError, match=r"deactivates heads .*carries no mask there: it was created with ne=0"):
        model.load_adapter(saved, "default")


def test_a_missing_mask_means_that_all_are_active(saved):
    edit(saved, lambda tensors: tensors.pop(KEY + "lora_head_mask.mask"))
    model = PeftModel.from_pretrained(tiny.make("vit"), saved)
    name = KEY.removeprefix("base_model.model.")[:-1]
    assert {name for name, mask in get_head_masks(model).items() if mask.all()} == {name}
    # also where others were deactivated before
    set_head_masks(model, tiny.masks_off(model, 3))
    model.load_adapter(saved, "default")
    assert get_head_masks(model)[name].all()


@pytest.mark.parametrize("options", [{"mask_scope": "head"}, {"adapter_bits": 2}])
def test_a_missing_mask_that_matters(options, tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, **options))
    tiny.randomize_lora(model)
    set_head_masks(model, tiny.masks_off(model, 2))
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(KEY + "lora_head_mask.mask"))
    with pytest.raises(
        ValueError, match=tiny.now(r"no head mask for .*1\.attention\.v_proj, but .* zero for heads \[2\]")
    ):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)


def test_unknown_config_key_of_a_later_version_warns(saved):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        PeftModel.from_pretrained(tiny.make("vit"), saved)
