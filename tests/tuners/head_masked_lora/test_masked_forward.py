"""Which variant an adapter has, and what each variant does."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from peft_heads import HeadMaskedLoraConfig
from peft_heads.tuners.head_masked_lora.masked_forward import KBitVariant, VanillaVariant


OFF = torch.arange(24) < 4  # the rows of head 0


def layer_of(model):
    return next(module for module in model.modules() if hasattr(module, "lora_variant"))


def make(**options):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(**options))
    tiny.randomize_lora(model)
    return model.eval()


def names(variant):
    inner = getattr(variant, "inner", None)
    return [] if variant is None else [type(variant).__name__, *names(inner)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ne": 0}, []),
        ({"ne": 0, "use_dora": True}, ["DoraLinearVariant"]),
        ({"ne": 0, "adapter_bits": 2}, ["KBitVariant"]),
        ({"ne": 0, "bottleneck_dropout": 0.1}, ["KBitVariant"]),
        ({"ne": 1}, ["HeadMaskVariant", "VanillaVariant"]),
        ({"ne": 1, "use_dora": True}, ["HeadMaskVariant", "DoraLinearVariant"]),
        ({"ne": 1, "adapter_bits": 2}, ["HeadMaskVariant", "KBitVariant"]),
        ({"ne": 1, "bottleneck_dropout": 0.1}, ["HeadMaskVariant", "KBitVariant"]),
    ],
    ids=str,
)
def test_which_variant(options, expected):
    assert names(layer_of(make(**options)).lora_variant.get("default")) == expected


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"lora_alpha": 3}, {"use_rslora": True}], ids=str)
def test_the_vanilla_variant_is_peft_s_own_path(options):
    """Forward, merge and unmerge are the same bit for bit."""
    torch.manual_seed(0)
    stock = get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"]), **options)).eval()
    tiny.randomize_lora(stock)
    layer, x = layer_of(stock), torch.randn(2, 5, 24)
    assert not layer.lora_variant
    frozen = layer.base_layer.weight.clone()

    def results(safe_merge):
        outputs = [layer(x)]
        layer.merge(safe_merge=safe_merge)
        outputs.append(layer.base_layer.weight.clone())
        layer.unmerge()
        outputs.append(layer.base_layer.weight.clone())
        layer.base_layer.weight.data.copy_(frozen)
        return outputs

    for safe_merge in (False, True):
        layer.lora_variant.clear()
        expected = results(safe_merge)
        layer.lora_variant["default"] = VanillaVariant()
        assert all(torch.equal(a, b) for a, b in zip(results(safe_merge), expected, strict=True))
        assert not torch.equal(expected[0], layer.base_layer(x))


@pytest.mark.parametrize("variant", [VanillaVariant, KBitVariant])
@pytest.mark.parametrize("options", [{}, {"adapter_bits": 4}, {"lora_bias": True}], ids=str)
def test_rows_that_are_left_out(variant, options):
    """Their values do not matter; the other rows are as without a mask."""
    layer, x = layer_of(make(ne=0, **options)), torch.randn(2, 5, 24)
    result = layer.base_layer(x)
    whole = variant().forward(layer, "default", x, result)
    lora_B = layer.lora_B["default"]
    output = variant().forward(layer, "default", x, result, off=OFF)
    assert torch.equal(output[..., ~OFF], whole[..., ~OFF]) and not torch.equal(output, whole)
    assert torch.equal(output[..., OFF], result[..., OFF])
    if not options.get("adapter_bits"):
        for param in lora_B.parameters():
            param.data[OFF] = float("nan")
        assert torch.equal(variant().forward(layer, "default", x, result, off=OFF), output)


@pytest.mark.parametrize("bits", [1, 8])
def test_the_k_bit_variant_is_lora_with_the_quantised_factors(bits):
    layer, x = layer_of(make(ne=0, adapter_bits=bits, lora_bias=True)), torch.randn(2, 5, 24)
    result = layer.base_layer(x)
    output = KBitVariant().forward(layer, "default", x, result)
    assert not torch.equal(output, VanillaVariant().forward(layer, "default", x, result))
    for factor, value in (
        (layer.lora_A, layer.quantized_down("default")),
        (layer.lora_B, layer.quantized_up("default")),
    ):
        factor["default"].weight.data = value.detach()
    assert torch.equal(output, VanillaVariant().forward(layer, "default", x, result))


def test_the_dropout_is_between_the_factors():
    layer, x = layer_of(make(ne=0, r=64, bottleneck_dropout=0.5).train()), torch.randn(24)
    hidden = KBitVariant().down(layer, "default", x)
    kept, whole = hidden != 0, VanillaVariant().down(layer, "default", x)
    assert 10 < kept.sum() < 54
    torch.testing.assert_close(hidden[kept], 2 * whole[kept])
