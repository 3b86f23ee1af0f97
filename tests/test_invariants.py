"""The seven invariants of the design, each against stock PEFT or an explicitly edited model."""

import contextlib
import copy
import subprocess
import sys
import warnings

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from peft_heads import HeadMaskedLoraConfig, HeadScorer, get_head_masks, set_head_masks
from peft_heads.heads import resolve_heads


VARIANTS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "gaussian": {"init_lora_weights": "gaussian"},
}
K_BIT = {"1 bit": {"adapter_bits": 1}, "4 bit": {"adapter_bits": 4, "lora_bias": True}}


def pair(backbone, head_masked=None, dtype=torch.float32, **lora):
    """The same backbone with our adapter and with stock LoRA, from the same seed."""
    base = tiny.make(backbone).to(dtype)
    models = []
    for config in (
        HeadMaskedLoraConfig(**(head_masked or {"ne": 1}), **lora),
        LoraConfig(target_modules=tiny.now(["q_proj", "v_proj"]), modules_to_save=["classifier"], **lora),
    ):
        torch.manual_seed(7)
        models.append(get_peft_model(copy.deepcopy(base), config))
    return models


def masked(backbone, *heads, head_masked=None, **lora):
    """Return an adapter with values in lora_B and the given heads deactivated, and the same without a mask."""
    ours, stock = pair(backbone, head_masked, **lora)
    tiny.randomize_lora(ours)
    tiny.randomize_lora(stock)
    set_head_masks(ours, tiny.masks_off(ours, *heads))
    return ours.eval(), stock.eval()


def zero_rows(stock, *heads):
    """Edit stock LoRA: the rows of lora_B that belong to the heads are zero."""
    for name, layer in lora_layers(stock):
        head_dim = tiny_head_dim(stock, name)
        for head in heads:
            rows = slice(head * head_dim, (head + 1) * head_dim)
            layer.lora_B["default"].weight.data[rows] = 0
            if layer.lora_B["default"].bias is not None:
                layer.lora_B["default"].bias.data[rows] = 0


def lora_layers(model):
    return [(n, m) for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")]


def tiny_head_dim(model, name):
    return resolve_heads(model.get_base_model())[name].parts[0].head_dim


def assert_equal_gradients(ours, stock):
    expected = tiny.gradients(stock)
    assert tiny.gradients(ours).keys() == expected.keys()
    for name, grad in tiny.gradients(ours).items():
        assert torch.equal(grad, expected[name]), name


# 1. Before selection, and with ne=0: stock LoRA, bit for bit


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "head_masked", [{"ne": 0}, {"ne": 1}, {"ratio": 0.5}, {"ne": 1, "mask_scope": "head"}], ids=str
)
def test_1_bit_equal_to_stock_lora(backbone, variant, head_masked, tmp_path):
    ours, stock = pair(backbone, head_masked, **VARIANTS[variant])
    for model in (ours, stock):
        tiny.train(model, steps=3)
        torch.manual_seed(11)
        model(**tiny.batch(seed=5)).loss.backward()

    def trained(model):
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    assert trained(ours).keys() == trained(stock).keys()
    for (name, ours_p), (_, stock_p) in zip(trained(ours).items(), trained(stock).items(), strict=True):
        assert torch.equal(ours_p, stock_p), name
        assert torch.equal(ours_p.grad, stock_p.grad), name
    with torch.no_grad():
        assert torch.equal(ours.eval()(tiny.images()).logits, stock.eval()(tiny.images()).logits)

    stock.save_pretrained(tmp_path / "stock")
    with contextlib.nullcontext() if head_masked == {"ne": 0} else pytest.warns(match="none has been selected"):
        ours.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "stock" / "adapter_model.safetensors").items():
        assert torch.equal(saved.pop(name), tensor), name
    assert all("lora_head_mask" in name for name in saved)
    assert bool(saved) == (head_masked != {"ne": 0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_1_bit_equal_in_half_precision(backbone, dtype):
    ours, stock = pair(backbone, dtype=dtype)
    for model in (ours, stock):
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.data = param.data.to(dtype)
    tiny.randomize_lora(ours)
    tiny.randomize_lora(stock)
    ours.eval(), stock.eval()  # Swin drops paths at random in training
    x = tiny.images().to(dtype)
    assert torch.equal(ours(x).logits, stock(x).logits)
    for model in (ours, stock):
        model(x).logits.float().square().sum().backward()
    assert_equal_gradients(ours, stock)


def test_1_bit_equal_under_autocast(backbone):
    ours, stock = pair(backbone)
    tiny.randomize_lora(ours)
    tiny.randomize_lora(stock)
    for model in (ours.eval(), stock.eval()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**tiny.batch()).loss.backward()
    assert_equal_gradients(ours, stock)


# 2. From selection on, a deactivated head's part of the delta is exactly zero


def test_2_forward_with_dora_leaves_the_base_output(backbone):
    """DoRA rescales every row, so zeroed rows are not enough: a deactivated row is the frozen projection's output."""
    ours, stock = masked(backbone, 1, use_dora=True)
    for (name, layer), (_, stock_layer) in zip(lora_layers(ours), lora_layers(stock), strict=True):
        layer.lora_magnitude_vector["default"].weight.data.mul_(1.5)
        stock_layer.lora_magnitude_vector["default"].weight.data.mul_(1.5)
        x = torch.randn(5, layer.in_features)
        rows = layer.active_rows("default")
        assert 0 < (~rows).sum() == tiny_head_dim(ours, name)
        assert torch.equal(layer(x)[:, ~rows], layer.base_layer(x)[:, ~rows])
        assert torch.equal(layer(x)[:, rows], stock_layer(x)[:, rows])
        assert not torch.allclose(layer(x)[:, rows], layer.base_layer(x)[:, rows])


def test_2_head_scope_gives_zero_attention_output():
    ours, _ = masked("vit", 1, head_masked={"ne": 1, "mask_scope": "head"})
    output = ours.get_base_model().get_submodule(tiny.now("vit.layers.0.attention.o_proj"))
    seen = []
    output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ours(tiny.images())
    head_dim = output.in_features // 6
    assert seen[0][..., head_dim : 2 * head_dim].count_nonzero() == 0
    assert seen[0][..., :head_dim].count_nonzero() > 0


@pytest.mark.parametrize("variant", ["plain", "bias", "dora"])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("scope", ["adapter", "head"])
def test_2_merge_and_unmerge(backbone, variant, safe_merge, scope):
    ours, _ = masked(backbone, 1, head_masked={"ne": 1, "mask_scope": scope}, **VARIANTS[variant])
    base = {
        name: (layer.base_layer.weight.clone(), layer.base_layer.bias.clone()) for name, layer in lora_layers(ours)
    }
    expected = ours(tiny.images()).logits

    ours.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(ours(tiny.images()).logits, expected, rtol=1e-4, atol=1e-5)
    for name, layer in lora_layers(ours):
        off = ~layer.active_rows("default")
        weight, bias = base[name]
        kept = scope == "adapter"
        assert torch.equal(layer.base_layer.weight[off], weight[off] if kept else torch.zeros_like(weight[off]))
        assert torch.equal(layer.base_layer.bias[off], bias[off] if kept else torch.zeros_like(bias[off]))
        assert not torch.equal(layer.base_layer.weight[~off], weight[~off])

    ours.unmerge_adapter()
    for name, layer in lora_layers(ours):
        off = ~layer.active_rows("default")
        weight, bias = base[name]
        assert torch.equal(layer.base_layer.weight[off], weight[off])  # bit for bit
        assert torch.equal(layer.base_layer.bias[off], bias[off])
        torch.testing.assert_close(layer.base_layer.weight, weight)
    torch.testing.assert_close(ours(tiny.images()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["adapter", "head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_2_unmerge_after_a_cast(scope, dtype):
    """The rows that a merge has overwritten are restored even if the model was cast in between."""
    ours, _ = masked("vit", 1, head_masked={"ne": 1, "mask_scope": scope})
    base = {name: layer.base_layer.weight.clone() for name, layer in lora_layers(ours)}
    ours.merge_adapter()
    ours.to(dtype)
    ours.unmerge_adapter()
    for name, layer in lora_layers(ours):
        off = ~layer.active_rows("default")
        assert torch.equal(layer.base_layer.weight[off], base[name][off].to(dtype))
        assert not layer._overwritten_rows


def test_2_two_adapters_with_different_masks_merge_and_unmerge():
    ours, _ = masked("vit", 1)
    ours.add_adapter("other", HeadMaskedLoraConfig(ne=1, mask_scope="head", modules_to_save=[]))
    tiny.randomize_lora(ours, seed=3)
    set_head_masks(ours, tiny.masks_off(ours, 4), "other")
    base = {name: layer.base_layer.weight.clone() for name, layer in lora_layers(ours)}
    ours.merge_adapter(["default", "other"])
    ours.unmerge_adapter()
    for name, layer in lora_layers(ours):
        torch.testing.assert_close(layer.base_layer.weight, base[name])
        head = slice(4 * tiny_head_dim(ours, name), 5 * tiny_head_dim(ours, name))
        assert layer.base_layer.weight[head].count_nonzero() > 0


@pytest.mark.parametrize("variant", ["plain", "bias"])
def test_2_file_holds_zero_rows(backbone, variant):
    ours, _ = masked(backbone, 1, **VARIANTS[variant])
    saved = get_peft_model_state_dict(ours)
    seen = 0
    for name, layer in lora_layers(ours):
        off = ~layer.active_rows("default")
        for suffix, raw in (("weight", layer.lora_B["default"].weight), ("bias", layer.lora_B["default"].bias)):
            if raw is None:
                continue
            rows = saved[f"base_model.model.{name}.lora_B.{suffix}"]
            assert rows[off].count_nonzero() == 0
            assert torch.equal(rows[~off], raw[~off])
            assert raw[off].count_nonzero() > 0  # saving does not change what is in memory
            seen += 1
    assert seen == (2 if variant == "bias" else 1) * len(lora_layers(ours))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("variant", ["plain", "bias", "dora"])
def test_2_stays_zero_whatever_the_optimizer_does(optimizer_class, variant):
    ours, _ = pair("vit", **VARIANTS[variant])
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    trainable = [p for p in ours.parameters() if p.requires_grad]
    optimizer = optimizer_class(trainable, lr=1e-2, weight_decay=0.1, **options)
    scorer = HeadScorer(ours)
    tiny.train(ours, steps=4, optimizer=optimizer, after_backward=scorer.update)
    scorer.apply(optimizer)
    tiny.train(ours, steps=5, optimizer=optimizer, seed=50)
    for _, layer in lora_layers(ours):
        off = ~layer.active_rows("default")
        assert off.any()
        for param in layer.head_parameters("default"):
            assert param[off].count_nonzero() == 0
            assert param[~off].count_nonzero() > 0
        assert layer.get_delta_weight("default")[off].count_nonzero() == 0


def test_2_drift_of_raw_rows_does_not_show():
    """An unknown optimizer moves the raw rows by its momentum; forward, merge and file are unaffected."""
    ours, _ = pair("vit")
    optimizer = tiny.train(ours, steps=4)
    set_head_masks(ours, tiny.masks_off(ours, 2))
    before = [layer.lora_B["default"].weight[~layer.active_rows("default")].clone() for _, layer in lora_layers(ours)]
    tiny.train(ours, steps=5, optimizer=optimizer)
    drifted = False
    for (name, layer), rows in zip(lora_layers(ours), before, strict=True):
        off = ~layer.active_rows("default")
        drifted |= not torch.equal(layer.lora_B["default"].weight[off], rows)
        assert layer.get_delta_weight("default")[off].count_nonzero() == 0
        assert get_peft_model_state_dict(ours)[f"base_model.model.{name}.lora_B.weight"][off].count_nonzero() == 0
        x = torch.randn(2, layer.in_features)
        torch.testing.assert_close(layer(x)[:, off], layer.base_layer(x)[:, off], rtol=0, atol=0)
    assert drifted


@pytest.mark.parametrize("variant", K_BIT)
def test_2_k_bit(variant, backbone):
    """The part is exactly zero in forward, delta, merged weight and file; raw rows change no active head."""
    ours = get_peft_model(tiny.make(backbone), HeadMaskedLoraConfig(**K_BIT[variant]))
    optimizer = tiny.train(ours, steps=4)
    set_head_masks(ours, tiny.masks_off(ours, 1))
    tiny.train(ours, steps=5, optimizer=optimizer)  # momentum moves the raw rows
    ours.eval()
    expected = ours(tiny.images()).logits
    saved = get_peft_model_state_dict(ours)
    base = {name: layer.base_layer.weight.clone() for name, layer in lora_layers(ours)}
    for name, layer in lora_layers(ours):
        off = ~layer.active_rows("default")
        assert off.any()
        assert layer.get_delta_weight("default")[off].count_nonzero() == 0
        assert layer.quantized_up("default")[off].count_nonzero() == 0
        assert saved[f"base_model.model.{name}.lora_B.weight"][off].count_nonzero() == 0
        assert layer.lora_B["default"].weight[off].count_nonzero() > 0
        x = torch.randn(2, layer.in_features)
        assert torch.equal(layer(x)[:, off], layer.base_layer(x)[:, off])
    loaded = get_peft_model(tiny.make(backbone), HeadMaskedLoraConfig(**K_BIT[variant]))
    set_peft_model_state_dict(loaded, saved)  # which has zeros there
    assert torch.equal(loaded.eval()(tiny.images()).logits, expected)
    ours.merge_adapter()
    torch.testing.assert_close(ours(tiny.images()).logits, expected, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    for name, layer in lora_layers(ours):
        off = ~layer.active_rows("default")
        assert torch.equal(layer.base_layer.weight[off], base[name][off])


# 3. The mask has one home: a persistent bool buffer, saved in the adapter's safetensors


def test_3_mask_is_a_persistent_buffer_and_in_the_file(backbone, tmp_path):
    ours, _ = masked(backbone, 1)
    buffers = {n: b for n, b in ours.named_buffers() if "lora_head_mask" in n}
    assert buffers.keys() == {n for n in ours.state_dict() if "lora_head_mask" in n}
    assert all(b.dtype == torch.bool for b in buffers.values())
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, mask in get_head_masks(ours).items():
        assert torch.equal(saved[f"base_model.model.{name}.lora_head_mask.mask"], mask)

    loaded = PeftModel.from_pretrained(tiny.make(backbone), tmp_path)
    assert torch.equal(loaded(tiny.images()).logits, ours(tiny.images()).logits)
    assert str(get_head_masks(loaded)) == str(get_head_masks(ours))

    whole = copy.deepcopy(ours)
    set_head_masks(whole, {n: torch.ones_like(m) for n, m in get_head_masks(ours).items()})
    whole.load_state_dict(ours.state_dict())
    assert str(get_head_masks(whole)) == str(get_head_masks(ours))


@pytest.mark.parametrize("other", [{"ne": 0}, {"ne": 1, "mask_scope": "head"}])
def test_3_hotswap_of_another_kind_is_refused(other, tmp_path):
    first, _ = masked("vit", 1)
    second, _ = pair("vit", other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="Configs are incompatible: for mask_scope|two adapters that carry head masks, or two"
    ):
        hotswap_adapter(first, tmp_path, adapter_name="default")


# 4. What we save under mask_scope="adapter" is a valid plain LoRA


@pytest.mark.slow
def test_4_saved_file_is_a_plain_lora(backbone, tmp_path):
    """Stock PEFT can use it without this package, once the type is changed and the mask left out."""
    ours, _ = masked(backbone, 1)
    ours.save_pretrained(tmp_path)
    base = tiny.make(backbone)
    base.save_pretrained(tmp_path / "base")
    torch.save(ours(tiny.images()).logits, tmp_path / "logits.pt")
    script = f"""
import json, sys, torch, warnings
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForImageClassification
folder = Path({str(tmp_path)!r})
config = json.loads((folder / "adapter_config.json").read_text())
config["peft_type"] = "LORA"
(folder / "adapter_config.json").write_text(json.dumps(config))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(folder / "base"), folder)
x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
assert torch.equal(model(x).logits, torch.load(folder / "logits.pt"))
assert "peft_heads" not in sys.modules
print("same logits")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert "same logits" in done.stdout, done.stderr


# 5. The base weights change only by an explicit merge


def test_5_base_weights_are_untouched(backbone):
    ours, _ = pair(backbone, {"ne": 1, "mask_scope": "head"})
    frozen = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    scorer = HeadScorer(ours)
    optimizer = tiny.train(ours, after_backward=scorer.update)
    scorer.apply(optimizer)
    tiny.train(ours, optimizer=optimizer)
    assert frozen
    for name, param in ours.named_parameters():
        if name in frozen:
            assert torch.equal(param, frozen[name]), name


# 6. Selection is a function of the reduced scores alone: tests/test_distributed.py for processes


def test_6_selection_depends_on_nothing_but_the_scores():
    ours, _ = pair("vit")
    scorer = HeadScorer(ours)
    tiny.train(ours, after_backward=scorer.update)
    for criterion in ("absolute", "random", "front", "weight_norm"):
        first = scorer.select(criterion=criterion)
        torch.manual_seed(99)
        torch.randn(5)
        assert str(scorer.select(criterion=criterion)) == str(first)


# 7. Scores do not depend on clipping, loss scale, or how the global batch was split


def scores_of(update, seed=0):
    ours, _ = pair("vit")
    tiny.randomize_lora(ours, std=0.1)
    scorer = HeadScorer(ours)
    update(ours, scorer)
    return scorer


def whole_batch(model, scorer, size=8):
    model(**tiny.batch(size)).loss.backward()
    scorer.update()


@pytest.mark.parametrize("criterion", ["absolute", "positive", "negative", "grad_norm"])
def test_7_clipping_scale_and_accumulation(criterion):
    def clipped(model, scorer):
        model(**tiny.batch(8)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scorer.update()

    def scaled(model, scorer):
        (model(**tiny.batch(8)).loss * 1024).backward()
        scorer.update(loss_scale=1024)

    def accumulated(model, scorer):
        everything = tiny.batch(8)
        for i in range(8):
            one = {key: value[i : i + 1] for key, value in everything.items()}
            (model(**one).loss / 8).backward()
        scorer.update()

    expected = scores_of(whole_batch).scores(criterion)
    for update, exact in ((clipped, True), (scaled, True), (accumulated, False)):
        actual = scores_of(update).scores(criterion)
        for name, score in expected.items():
            torch.testing.assert_close(
                actual[name],
                score,
                rtol=0 if exact else 1e-5,
                atol=0 if exact else 1e-9,
                msg=f"{update.__name__} {name}",
            )
