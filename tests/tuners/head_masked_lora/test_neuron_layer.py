"""Neuron masks of an adapter, with LoRA in the masked layer or without: everything that an adapter goes through."""

import copy
import io
import json
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from peft_heads import (
    HeadMaskedLoraConfig,
    get_head_masks,
    get_neuron_masks,
    pack_adapter,
    set_head_masks,
    set_neuron_masks,
)
from peft_heads.heads import neuron_layers
from peft_heads.tuners.head_masked_lora.neuron_layer import NeuronMaskedLinear


# LoRA in all layers of the blocks, in q and v alone, with heads masked as well, with DoRA, with LoRA's own bias
KINDS = {
    "all layers": {"ne": 0},
    "mask alone": {"ne": 0, "target_modules": tiny.now(["q_proj", "v_proj"])},
    "heads as well": {"ne": 2},
    "dora": {"ne": 0, "use_dora": True},
    "bias": {"ne": 0, "lora_bias": True},
}
QUICK = ("all layers", "mask alone")
kinds = pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
OFF = [1, 5, 6, 31]


def create(kind="all layers", base=None, name="default", **options):
    """A tiny ViT with a trained-looking adapter whose neurons are all on."""
    base = tiny.make("vit") if base is None else base
    config = HeadMaskedLoraConfig(**{"neuron_ratio": 0.125, "r": 4} | KINDS[kind] | options)
    model = get_peft_model(base, config, adapter_name=name)
    tiny.randomize_lora(model)
    with torch.no_grad():
        for key, param in model.named_parameters():
            if "lora_B" in key and key.endswith("bias"):
                param.normal_()
    return model.eval()


def switch_off(model, off=OFF, name="default"):
    masks = get_neuron_masks(model, name)
    for mask in masks.values():
        mask[list(off)] = False
    set_neuron_masks(model, masks, name)
    return model


@torch.no_grad()
def logits(model, **kwargs):
    return model.eval()(tiny.images(), **kwargs).logits


def first_layers(model):
    return [m for m in model.modules() if isinstance(m, NeuronMaskedLinear)]


def zeroed(model, name="default"):
    """The outputs of the model where the neurons' outputs are set to zero by hooks, with masks that are all on."""
    masks = get_neuron_masks(model, name)
    set_neuron_masks(model, {key: torch.ones_like(mask) for key, mask in masks.items()}, name)
    handles = [
        layer.register_forward_hook(lambda layer, args, output, mask=mask: output * mask)
        for layer, mask in zip(neuron_layers(model, name).values(), masks.values(), strict=True)
    ]
    result = logits(model)
    for handle in handles:
        handle.remove()
    set_neuron_masks(model, masks, name)
    return result


@kinds
def test_nothing_is_changed_while_all_neurons_are_on(kind):
    """Outputs, gradients and weights are those of the same LoRA, bit for bit."""
    torch.manual_seed(1)
    model = create(kind)
    targets = {name for name, m in model.base_model.model.named_modules() if getattr(m, "lora_A", None)}
    options = {key: value for key, value in KINDS[kind].items() if key not in ("ne", "target_modules")}
    torch.manual_seed(1)
    stock = get_peft_model(
        tiny.make("vit"), LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"], **options)
    )
    stock.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(logits(model), logits(stock))
    for each in (model, stock):
        each.train()(**tiny.batch()).loss.backward()
    found, expected = tiny.gradients(model), tiny.gradients(stock)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_that_are_off_give_nothing(kind):
    """Invariant 2: in the forward pass, in the update, in merged weights, whatever the optimizer does."""
    model = switch_off(create(kind))
    expected = zeroed(model)
    assert torch.equal(logits(model), expected) and not torch.equal(expected, logits(create(kind)))
    tiny.train(model)
    outputs = []
    for layer in first_layers(model):
        layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    after = logits(model)
    assert outputs and all(not output[..., OFF].any() and output[..., 0].any() for output in outputs)
    assert all(not layer.get_delta_weight("default")[OFF].any() for layer in first_layers(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), after, atol=1e-5, rtol=1e-4)


@kinds
@pytest.mark.parametrize("safe", [False, True])
def test_merging_can_be_undone(kind, safe):
    """Invariant 5: rows and biases that a merge has overwritten come back bit for bit."""
    model = switch_off(create(kind))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    model.merge_adapter(safe_merge=safe)
    for layer in first_layers(model):
        assert not layer.base_layer.weight[OFF].any() and not layer.base_layer.bias[OFF].any()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="is merged"):
        set_neuron_masks(model, {k: ~m for k, m in get_neuron_masks(model).items()})
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    masked = tuple(f"{name}.base_layer." for name in get_neuron_masks(model))
    for key, value in before.items():
        if any(name in key for name in masked):
            rows = slice(None) if kind == "mask alone" else OFF
            assert torch.equal(after[key][rows], value[rows]), key
        torch.testing.assert_close(after[key], value, atol=1e-6, rtol=1e-5)


@kinds
def test_saved_and_loaded(kind, tmp_path):
    """Invariant 3: one home, in the adapter's own file, True = active there."""
    model = switch_off(create(kind))
    if kind == "heads as well":
        set_head_masks(model, tiny.masks_off(model, 0, 4))
    masks, expected = get_neuron_masks(model), logits(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, mask in masks.items():
        key = f"base_model.model.{name}.lora_neuron_mask.mask"
        assert torch.equal(stored[key], mask)
        has_lora = f"base_model.model.{name}.lora_B.weight" in stored
        assert has_lora == (kind != "mask alone")
        assert not has_lora or not stored[f"base_model.model.{name}.lora_B.weight"][OFF].any()
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path, **options)
        name = options.get("adapter_name", "default")
        torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=1e-5)
        found = get_neuron_masks(loaded, name)
        assert found.keys() == masks.keys() and all(torch.equal(found[key], masks[key]) for key in masks)
        heads = get_head_masks(loaded, name)
        assert all(torch.equal(mask, heads[key]) for key, mask in get_head_masks(model).items())
    base = tiny.make("vit")
    base.load_adapter(str(tmp_path))  # transformers' own
    torch.testing.assert_close(logits(base), expected, atol=1e-6, rtol=1e-5)


@kinds
def test_disabled_switched_and_deleted(kind):
    model = switch_off(create(kind))
    with model.disable_adapter():
        disabled = logits(model)
    assert torch.equal(disabled, logits(tiny.make("vit")))
    others = {"other": {"neuron_ratio": 0.5, "ne": 0, "target_modules": tiny.now(["v_proj"])}}
    others["plain"] = {"ne": 0, "target_modules": tiny.now(["fc1", "q_proj"])}
    for name, options in others.items():
        model.add_adapter(name, HeadMaskedLoraConfig(r=2, **options))
    tiny.randomize_lora(model, seed=3)
    switch_off(model, [0, 2], "other")
    layers = first_layers(model)
    by_name, off = {}, {"default": OFF, "other": [0, 2], "plain": []}
    for name, rows in off.items():
        model.set_adapter(name)
        by_name[name] = logits(model)
        assert [layer(torch.randn(9, 24)).eq(0).all(dim=0).nonzero().flatten().tolist() for layer in layers] == [
            rows
        ] * 2
    if kind != "dora":  # of which PEFT makes no mixed batch
        mixed = logits(model, adapter_names=["other", "default", "plain", "other"])
        for row, name in enumerate(("other", "default", "plain", "other")):
            torch.testing.assert_close(mixed[row], by_name[name][row], atol=1e-5, rtol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), by_name["default"])
    with pytest.raises(ValueError, match=r"has a mask of adapter 'other' \(adapters with neuron masks: default\)"):
        get_neuron_masks(model, "other")
    base = model.unload()
    assert torch.equal(logits(base), disabled) and not first_layers(base)


def test_two_active_adapters_act_in_turn():
    """As LoRA's own: what a later adapter adds to a neuron that an earlier one has switched off is there."""
    model = switch_off(create("mask alone"))
    model.add_adapter("plain", HeadMaskedLoraConfig(ne=0, r=2, target_modules=tiny.now(["fc1"])))
    tiny.randomize_lora(model)
    layer = first_layers(model)[0]
    x = torch.randn(2, 3, layer.in_features)
    base, update = layer.base_layer(x), layer.lora_B["plain"](layer.lora_A["plain"](x)) * layer.scaling["plain"]
    base[..., OFF] = 0
    layer.set_adapter(["default", "plain"])
    expected = base + update
    assert torch.equal(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    layer.unmerge()
    layer.set_adapter(["plain", "default"])
    expected[..., OFF] = 0
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    assert not layer(x)[..., OFF].any()


@pytest.mark.parametrize("kind", ["all layers", "mask alone"])
def test_copies_state_dicts_and_injection(kind):
    model = switch_off(create(kind))
    expected, masks = logits(model), get_neuron_masks(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = create(kind)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(fresh), expected)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(mask, masks[name]) for name, mask in get_neuron_masks(model, "copy").items())
    # after a state dict PEFT gives LoRA to the layers of its keys: a mask is no LoRA
    keys = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    config = HeadMaskedLoraConfig(**{"neuron_ratio": 0.125, "r": 4, "modules_to_save": []} | KINDS[kind])
    keys = {key: value for key, value in keys.items() if "lora_" in key}
    injected = inject_adapter_in_model(config, tiny.make("vit"), state_dict=keys)
    assert [bool(layer.lora_A) for layer in first_layers(injected)] == [kind == "all layers"] * 2
    assert get_neuron_masks(injected).keys() == masks.keys()


def test_sums_and_conversions_are_refused():
    model = create("mask alone", mask_scope="adapter")
    with pytest.raises(ValueError, match="'default' prunes neurons and cannot be combined"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    assert list(model.peft_config) == ["default"] and not model.supports_lora_conversion()


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    model = switch_off(create(mask_scope="adapter"))  # of heads: there are none
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    mask_key = next(key for key in stored if key.endswith("lora_neuron_mask.mask"))
    up_key = mask_key.replace("lora_neuron_mask.mask", "lora_B.weight")

    def refused(changes, message, left_out=()):
        save_file({k: v for k, v in (stored | changes).items() if k not in left_out}, path)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny.make("vit"), tmp_path)

    refused(
        {up_key: stored[up_key] + 1}, r"deactivates neurons \[1, 5, 6, 31\] of .*rows of lora_B.weight must be zero"
    )
    refused({mask_key: stored[mask_key][:5].clone()}, r"the neuron mask of .* must be a bool tensor of shape \(32,\)")
    refused({mask_key: stored[mask_key].int()}, "the neuron mask of .* must be a bool tensor")
    # neurons whose rows are zero have been switched off by a mask that is gone
    refused({}, r"no neuron mask for .*zero for neurons \[1, 5, 6, 31\].*it was edited", left_out=[mask_key])
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"neuron_ratio": None}))
    refused({}, "the adapter file deactivates neurons .*neuron_ratio=None")


def test_a_file_without_masks_has_all_neurons_on(tmp_path):
    model = create("mask alone", neuron_ratio=0.0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "neuron_mask" not in k}, path)
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    assert all(mask.all() for mask in get_neuron_masks(loaded).values())
    assert torch.equal(logits(loaded), logits(model))


def test_saving_says_when_all_neurons_are_on(tmp_path):
    with pytest.warns(UserWarning, match=r"switch neurons off \(neuron_ratio=0.125\), but all are on"):
        create().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter saved to")
        create(neuron_ratio=0.0).save_pretrained(tmp_path / "none")
        switch_off(create()).save_pretrained(tmp_path / "off")
    card = (tmp_path / "off" / "README.md").read_text()
    assert (
        f"4 of 32 neurons in {tiny.now('vit.layers.*.mlp.fc1')} (2 layers)" in card
        and "| `neuron_ratio` | 0.125 |" in card
    )
    get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0)).save_pretrained(tmp_path / "plain")
    assert "neuron" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["all layers", "mask alone", "heads as well"])
def test_k_bit_adapters(kind, tmp_path):
    """Their quantiser leaves the rows of neurons that are off out, packed or not."""
    model = switch_off(create(kind, adapter_bits=2))
    if kind == "heads as well":
        set_head_masks(model, tiny.masks_off(model, 0, 4))
    assert not first_layers(model)[0](torch.randn(9, 24))[:, OFF].any()
    expected = logits(model)
    model.save_pretrained(tmp_path / "full")
    pack_adapter(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "packed")
    for folder in ("full", "packed"):
        loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=1e-5)
        assert loaded.peft_config["default"].packed == (folder == "packed")
        assert all(int((~mask).sum()) == 4 for mask in get_neuron_masks(loaded).values())


@pytest.mark.parametrize("kind", QUICK)
def test_hot_swapped(kind, tmp_path):
    own = {"modules_to_save": []}  # PEFT swaps no modules that are trained in full
    model, other = switch_off(create(kind, **own)), switch_off(create(kind, neuron_ratio=0.5, **own), [0, 2])
    tiny.randomize_lora(other, seed=5)
    other.save_pretrained(tmp_path / "other")
    create(kind, neuron_ratio=None, mask_scope="head", **own).save_pretrained(tmp_path / "none")
    hotswap_adapter(model, str(tmp_path / "other"), "default")
    assert torch.equal(logits(model), logits(other))
    assert all((~mask).nonzero().flatten().tolist() == [0, 2] for mask in get_neuron_masks(model).values())
    with pytest.raises(ValueError, match="needs two adapters that prune neurons, or two that do not"):
        hotswap_adapter(model, str(tmp_path / "none"), "default")


def test_trained_and_compiled():
    model = switch_off(create("mask alone"))
    layer = first_layers(model)[0]
    x = torch.randn(2, 3, layer.in_features)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    assert not [name for name, param in layer.named_parameters() if "base_layer" not in name or param.requires_grad]
    half = create("mask alone", base=tiny.make("vit").to(torch.bfloat16))
    assert switch_off(half)(tiny.images().bfloat16()).logits.isfinite().all()
    assert first_layers(half)[0](x.bfloat16()).dtype == torch.bfloat16


def test_a_second_adapter_waits_until_it_is_active():
    """Also where it brings the first masks."""
    model = create("mask alone", neuron_ratio=None)
    expected = logits(model)
    model.add_adapter("second", HeadMaskedLoraConfig(neuron_ratio=0.5, **KINDS["mask alone"]))
    switch_off(model, name="second")
    assert torch.equal(logits(model), expected)
    model.set_adapter("second")
    assert not first_layers(model)[0](torch.randn(9, 24))[:, OFF].any()
