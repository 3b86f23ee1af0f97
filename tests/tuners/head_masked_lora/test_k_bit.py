"""k-bit adapters: their initialisation, how often they are quantised, and that nothing else is affected."""

import copy
import gc
import weakref

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_heads import HeadMaskedLoraConfig, HeadScorer, set_head_masks
from peft_heads.convert.lora import export_lora
from peft_heads.functional.quantization import BITS, quantize_by_autograd
from peft_heads.heads.protocol import head_layers
from peft_heads.tuners.common import quantizer
from peft_heads.tuners.common.classifiers import QuantizedLinear


def make(bits=1, backbone="vit", **options):
    return get_peft_model(tiny.make(backbone), HeadMaskedLoraConfig(adapter_bits=bits, r=4, **options))


def layers(model):
    return list(head_layers(model).values())


def logits(model):
    with torch.no_grad():
        return model(tiny.images()).logits


@pytest.fixture
def decisions(monkeypatch):
    """List the shapes of the stacks that are quantised."""
    shapes = []
    decide = quantizer.decide
    monkeypatch.setattr(quantizer, "decide", lambda w, *args: shapes.append(tuple(w.shape)) or decide(w, *args))
    return shapes


def test_initialisation():
    """`lora_A` equals LoRA's from the same seed; `lora_B` is normal with deviation 0.001, cut off at ±0.002."""
    targets = {"target_modules": tiny.now(["q_proj", "v_proj"]), "modules_to_save": ["classifier"]}
    torch.manual_seed(1)
    stock = get_peft_model(tiny.make("vit"), LoraConfig(r=4, **targets))
    torch.manual_seed(1)
    ours = make()
    first, expected = layers(ours)[0], stock.get_base_model().get_submodule(next(iter(head_layers(ours))))
    assert torch.equal(first.lora_A["default"].weight, expected.lora_A["default"].weight)
    up = torch.cat([layer.lora_B["default"].weight.flatten() for layer in layers(ours)])
    assert up.abs().max() <= 0.002 and up.unique().numel() > 300
    assert up.std().item() == pytest.approx(0.00088, rel=0.15)  # of a normal cut off at two deviations
    for layer in layers(ours):
        for weight in (layer.quantized_down("default"), layer.quantized_up("default")):
            assert len(weight.unique()) == 2


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_plain_expression(bits):
    """A whole model is compared with stock LoRA whose weights are the expression that autograd differentiates."""
    ours = make(bits, ne=1).double().eval()
    tiny.randomize_lora(ours, std=0.1)
    set_head_masks(ours, tiny.masks_off(ours, 2))
    batch = {key: value.double() if value.is_floating_point() else value for key, value in tiny.batch().items()}
    ours(**batch).loss.backward()
    plain = get_peft_model(
        tiny.make("vit"),
        LoraConfig(r=4, target_modules=tiny.now(["q_proj", "v_proj"]), modules_to_save=["classifier"]),
    ).double()
    plain.load_state_dict(ours.state_dict(), strict=False)
    latents = {}
    for name, layer in head_layers(ours).items():
        stock = plain.eval().get_base_model().get_submodule(name)
        for factor, rows in (("lora_A", None), ("lora_B", layer.active_rows("default"))):
            linear = getattr(stock, factor)["default"]
            latent = linear.weight.detach().clone().requires_grad_()
            del linear.weight
            linear.weight = quantize_by_autograd(latent, bits, rows)
            latents[getattr(layer, factor)["default"].weight] = latent
    loss = plain(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(ours(**batch).loss.item(), rel=1e-12)
    for param, latent in latents.items():
        assert param.grad.count_nonzero() > 0
        torch.testing.assert_close(param.grad, latent.grad, rtol=1e-9, atol=1e-15)


def test_once_per_step_and_shape(decisions):
    model = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    expected = [(4, 4, 24), (4, 24, 4)]
    for step in range(3):
        decisions.clear()
        for _ in range(3):  # micro-batches
            model(**tiny.batch()).loss.backward()
        if step:  # the first pass meets the layers one by one
            assert sorted(decisions) == expected
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for _ in range(3):  # without gradients: for every pass
        decisions.clear()
        logits(model)
        assert sorted(decisions) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda model: tiny.train(model, steps=1),
        lambda model: model.load_state_dict(
            {k: v * 1.5 if "lora_B" in k else v for k, v in model.state_dict().items()}
        ),
        lambda model: [layer.lora_A["default"].weight.data.mul_(-1) for layer in layers(model)] and model.train(),
        lambda model: [setattr(p, "data", -p.data) for n, p in model.named_parameters() if "lora_B" in n],
        lambda model: set_head_masks(model, tiny.masks_off(model, 2)),
        lambda model: model.to(torch.float64) and model.to(torch.float32) and tiny.train(model, steps=1),
    ],
    ids=["step", "load_state_dict", "data and mode", "another tensor", "masks", "cast"],
)
def test_changes_are_seen(change):
    model = make()
    tiny.randomize_lora(model)
    before = logits(model.eval())
    change(model)
    after = logits(model.eval())
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(copy.deepcopy(model)))  # which has nothing kept


class WritesThroughData(torch.optim.Optimizer):
    """An optimizer that, like many, changes no version counter."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.data.neg_()


def test_an_optimizer_that_writes_through_data():
    model = make(modules_to_save=[])
    tiny.randomize_lora(model)
    before = logits(model)
    params = [p for n, p in model.named_parameters() if "lora_B" in n]
    versions = [p._version for p in params]
    WritesThroughData(params).step()
    assert versions == [p._version for p in params]
    assert not torch.equal(logits(model), before)


def test_hotswap_is_seen(tmp_path):
    """PEFT writes the new weights through `.data`."""
    models = [make(1, modules_to_save=[]) for _ in range(3)]
    for seed, model in enumerate(models):
        tiny.randomize_lora(model, seed=seed)
        set_head_masks(model, tiny.masks_off(model, seed))
        model.eval().save_pretrained(tmp_path / str(seed))
    expected = [logits(model) for model in models]
    for swapped in (models[0], copy.deepcopy(models[0])):
        for seed in (1, 2, 0):
            hotswap_adapter(swapped, tmp_path / str(seed), adapter_name="default")
            assert torch.equal(logits(swapped), expected[seed])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the compiler, at the break of its graph
def test_scorer_hears_a_compiled_model():
    scores = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make(1)
        tiny.randomize_lora(model, std=0.1)
        scorer = HeadScorer(model)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            run(**tiny.batch()).loss.backward()
        scorer.update()
        scores.append(scorer.scores("absolute"))
        scorer.close()
        run(**tiny.batch()).loss.backward()
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


def test_kept_decisions_serve_any_mode():
    """Made without gradients, in inference mode or under autocast, they serve a training pass."""
    model = make()
    expected = copy.deepcopy(model)
    expected(**tiny.batch()).loss.backward()
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        other = copy.deepcopy(model)
        with context:
            other(tiny.images())
        other(**tiny.batch()).loss.backward()
        for p, q in zip(other.parameters(), expected.parameters(), strict=True):
            assert p.grad is None or torch.equal(p.grad, q.grad)


def test_layers_are_let_go():
    model = make()
    logits(model)
    layer = weakref.ref(layers(model)[0].lora_B["default"])
    kept = layers(model)[0].lora_quantizer["default"]
    model.unload()
    del model
    gc.collect()
    assert layer() is None and not len(kept._entries)


def test_raw_rows_of_deactivated_heads_do_not_matter():
    model = make(2)
    tiny.randomize_lora(model)
    set_head_masks(model, tiny.masks_off(model, 1, 3))
    expected = logits(model.eval())
    for value in (0.0, 1e8, float("nan")):
        for layer in layers(model):
            with torch.no_grad():
                layer.lora_B["default"].weight[~layer.active_rows("default")] = value
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("bits", [1, 8])
def test_autocast(bits):
    """Weights are quantised in float32, and only then cast."""
    model = make(bits)
    tiny.randomize_lora(model)
    stock = get_peft_model(
        tiny.make("vit"),
        LoraConfig(r=4, target_modules=tiny.now(["q_proj", "v_proj"]), modules_to_save=["classifier"]),
    )
    stock.load_state_dict(model.state_dict(), strict=False)
    for name, layer in head_layers(model).items():
        other = stock.get_base_model().get_submodule(name)
        other.lora_A["default"].weight.data = layer.quantized_down("default").detach()
        other.lora_B["default"].weight.data = layer.quantized_up("default").detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model.eval()), logits(stock.eval()))
        model(**tiny.batch()).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.isfinite().all() for layer in layers(model))


def test_bottleneck_dropout_is_between_the_factors():
    model = make(32, bottleneck_dropout=0.5, lora_dropout=0.0)
    tiny.randomize_lora(model)
    layer = layers(model)[0]
    x = torch.randn(7, 24)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(3)
    actual = layer(x)
    torch.manual_seed(3)
    hidden = nn.functional.dropout(x @ down.T, 0.5)
    torch.testing.assert_close(actual, layer.base_layer(x) + hidden @ up.T * layer.scaling["default"])
    assert (hidden == 0).any()
    model.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ down.T @ up.T * layer.scaling["default"])


def test_export_to_stock_lora(tmp_path):
    model = make(1, classifier_bits=2)
    tiny.train(model)
    set_head_masks(model, tiny.masks_off(model, 1))
    tiny.make("vit").save_pretrained(tmp_path / "base")
    model.eval().save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora", base_model=tmp_path / "base")
    stock = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "lora").eval()
    assert type(stock.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-6)


# The classifier


def test_classifier_bits(tmp_path):
    model = make(1, ne=0, classifier_bits=1)
    head = model.get_base_model().classifier.modules_to_save["default"]
    tiny.train(model)
    assert len(head.quantized_weight().unique()) == 2 and head.weight.unique().numel() > 2
    x = torch.randn(5, 24)
    assert torch.equal(head(x), nn.functional.linear(x, head.quantized_weight(), head.bias))
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    assert torch.equal(logits(loaded.eval()), expected)
    again = loaded.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(again.weight, head.weight)  # training can go on
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    for merged in (copy.deepcopy(model).merge_and_unload(), model.unload()):
        assert type(merged.classifier) is nn.Linear and len(merged.classifier.weight.unique()) == 2
        assert not any(isinstance(module, QuantizedLinear) for module in merged.modules())


def test_classifier_bits_alone_with_other_sizes(tmp_path):
    """A full-precision adapter with `ne=0` is loaded beside one with more classes."""
    model = get_peft_model(tiny.make("vit", num_labels=5), HeadMaskedLoraConfig(ne=0, classifier_bits=2))
    tiny.train(model)
    model.save_pretrained(tmp_path)
    other = make(1)
    other.load_adapter(tmp_path, "other")
    other.set_adapter("other")
    assert torch.equal(logits(other.eval()), logits(model.eval()))
    other.set_adapter("default")
    assert logits(other).shape == (4, 3)


def test_classifier_bits_of_a_head_of_zeros():
    vit = tiny.make("vit")
    nn.init.zeros_(vit.classifier.weight)
    model = get_peft_model(vit, HeadMaskedLoraConfig(classifier_bits=1))
    head = model.get_base_model().classifier
    assert head.modules_to_save["default"].weight.std() > 0 and head.original_module.weight.count_nonzero() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": []}, "trains no classifier; name it in modules_to_save"),
        (
            {"modules_to_save": ["layernorm"]},
            "needs a classifier that is a torch.nn.Linear, but vit.layernorm is a LayerNorm",
        ),
    ],
)
def test_heads_that_cannot_be_quantised(options, message):
    vit = tiny.make("vit")
    before = str(vit)
    with pytest.raises(ValueError, match=message):
        get_peft_model(vit, HeadMaskedLoraConfig(classifier_bits=1, **options))
    assert str(vit) == before


def test_classifier_bits_are_not_converted(tmp_path):
    from peft import save_as_lora

    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        save_as_lora(tmp_path, make(32, classifier_bits=1), rank=8)


# Refusals


def test_modules_that_cannot_be_quantised():
    with pytest.raises(ValueError, match="projection is a Conv2d, for which adapter_bits=1 .* exclude the module"):
        make(1, ne=0, target_modules=tiny.now(["q_proj", "projection"]))


def test_after_a_plain_layer():
    mlp = tiny.now("vit.layers.0.mlp.fc1")
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0, target_modules=[mlp], modules_to_save=[]))
    with pytest.raises(ValueError, match=f"{mlp} was given a plain LoRA layer by an earlier adapter"):
        model.add_adapter("k", HeadMaskedLoraConfig(adapter_bits=1, ne=0, target_modules=[mlp], modules_to_save=[]))


def test_a_part_of_a_weight_is_refused():
    """ZeRO 3 and FSDP1 leave only a part of a weight."""
    model = make()
    layers(model)[0].lora_B["default"].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"whole matrix \(24, 4\), but this process holds a part of the shape \(0,\)"):
        logits(model)


def test_scorer_hears_each_backward_pass_once():
    model = make(1)
    tiny.randomize_lora(model, std=0.1)
    scorer = HeadScorer(model)
    heard = []
    accumulate = scorer._gradients._accumulate
    scorer._gradients._accumulate = lambda *args: heard.append(args[1]) or accumulate(*args)
    for _ in range(2):
        model(**tiny.batch()).loss.backward()
    assert len(heard) == 2 * len(layers(model))
    scorer.close()
    model(**tiny.batch()).loss.backward()
    assert len(heard) == 2 * len(layers(model))
    assert not layers(model)[0].lora_quantizer["default"]._heard
