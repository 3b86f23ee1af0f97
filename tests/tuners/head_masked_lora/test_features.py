"""LoRA's features beyond the contract (tests/tuners/test_contract.py), tested for every row of head-masked LoRA."""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import tiny
import torch
from method_cases import (
    HeadMaskedLora,
    assert_close,
    assert_same,
    base_of,
    behaviour,
    create,
    deactivate,
    deactivated,
    heads_off,
    logits,
    projections,
    rows_of,
    rows_of_method,
)
from peft import (
    ArrowConfig,
    KasaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.tuners.lora import BdLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_heads import HeadMaskedLoraConfig, get_head_masks, set_head_masks


LORA = rows_of_method(HeadMaskedLora)


@behaviour(LORA)
def test_plain_lora_file(case):
    """Stock PEFT reads the saved file, and computes the same."""
    model = create(case)
    file = {key: value for key, value in get_peft_model_state_dict(model).items() if value.dtype != torch.bool}
    other = create(case, seed=3)  # other values
    other.peft_config["default"] = model.peft_config["default"]
    stock = case.method.stock(case, other)
    assert not set_peft_model_state_dict(stock, file).unexpected_keys
    assert not torch.allclose(logits(stock), logits(other), atol=1e-4)
    assert_same(case, logits(stock), logits(model))


@behaviour(LORA)
def test_half_precision(case):
    dtype = torch.bfloat16
    model = create(case).to(dtype)
    stock = case.method.reference(case, model).to(dtype)  # of the weights as they are now
    with torch.no_grad():
        actual, expected = (each(tiny.images().to(dtype)).logits for each in (model, stock))
    assert actual.dtype == dtype
    assert all(mask.dtype == torch.bool for mask in get_head_masks(model).values())
    if case.exact:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.images().to(dtype)).logits, expected, rtol=0.1, atol=0.1)


@behaviour(LORA)
def test_scale(case):
    """`set_scale`, `scale_layer` and `unscale_layer` act as in stock LoRA."""
    model = create(case)
    stock = case.method.reference(case, model)
    expected = logits(stock)

    def each_layer(call):
        for layer in (*model.modules(), *stock.modules()):
            if isinstance(layer, BaseTunerLayer):
                call(layer)

    each_layer(lambda layer: layer.set_scale("default", 3.0))
    assert not torch.allclose(logits(stock), expected, atol=1e-4)
    assert_same(case, logits(model), logits(stock))
    each_layer(lambda layer: layer.unscale_layer())
    assert_same(case, logits(model), expected)
    each_layer(lambda layer: layer.scale_layer(0.25))
    assert_same(case, logits(model), logits(stock))
    assert_close(case, logits(copy.deepcopy(model).merge_and_unload()), logits(stock))
    each_layer(lambda layer: layer.unscale_layer(0.25))
    assert_same(case, logits(model), expected)


@pytest.mark.slow
@behaviour(LORA)
def test_compile(case):
    model = create(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(case, logits(compiled), case.method.logits(case, model))
    with torch._dynamo.config.patch(error_on_recompile=True):  # masks are data
        deactivate(case, model, seed=1)
        assert_close(case, logits(compiled), case.method.logits(case, model))
    torch._dynamo.reset()


@behaviour(LORA)
def test_hotswap(case, tmp_path):
    # without a classifier: PEFT's hot-swap knows LoRA's own keys alone, and fails on stock adapters with one as well
    case = case.varied(modules_to_save=[])
    model = create(case)
    other = create(dataclasses.replace(case, prepare=lambda model: None), seed=1)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert heads_off(case, model) == heads_off(case, other) == deactivated(case, 1)
    assert torch.equal(logits(model), logits(other))


@behaviour(LORA)
def test_save_as_lora(case, tmp_path):
    """PEFT computes a new LoRA from the delta weight."""
    model = create(case)
    save_as_lora(tmp_path, model, rank=24 if case.backbone == "vit" else 12)
    stock = PeftModel.from_pretrained(tiny.make(case.backbone), tmp_path)
    assert type(stock.peft_config["default"]) is LoraConfig
    assert_close(case, logits(stock), case.method.logits(case, model))


@behaviour(LORA)
@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat"])
def test_add_weighted_adapter(case, combination_type):
    """A head is active in the sum if it is active in any summand."""
    case = case.varied(modules_to_save=[])  # which PEFT does not sum
    model = create(case, "default", "other")
    stock = case.method.reference(case, model)
    before = logits(model)
    for each in (model, stock):
        each.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=combination_type)
        each.set_adapter("sum")
        each.eval()
    for layer in stock.modules():  # PEFT computes lora_A and lora_B for a scaling of 1, and leaves biases out
        if isinstance(layer, BaseTunerLayer):
            layer.scaling["sum"] = 1
            if case.options.get("lora_bias"):
                a, b = (layer.scaling[name] * layer.lora_B[name].bias.data for name in ("default", "other"))
                layer.lora_B["sum"].bias.data = 0.7 * a + 0.4 * b
    assert_close(case, logits(model), logits(stock))
    off = {adapter: heads_off(case, model, adapter) for adapter in ("default", "other", "sum")}
    for name in projections(case):
        assert set(off["sum"][name]) == set(off["default"][name]) & set(off["other"][name])
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), before)  # the summands are as they were


@behaviour(LORA)
def test_add_weighted_adapter_of_one(case):
    """Deactivated in every summand, a head stays deactivated."""
    model = create(case)
    if case.options.get("mask_scope") == "head":
        return  # refused: test_add_weighted_adapter
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    assert heads_off(case, model, "sum") == heads_off(case, model)
    model.set_adapter("sum")
    for name, heads in heads_off(case, model, "sum").items():
        delta = base_of(model).get_submodule(name).get_delta_weight("sum")
        assert delta[rows_of(case, heads)].count_nonzero() == 0
        assert delta.count_nonzero() > 0


@behaviour(LORA)
def test_stock_adapter_joins(case, tmp_path):
    """By `from_lora` a stock adapter of the same options can be switched to, and used in mixed batches."""
    ours = create(case, seed=1)
    stock = case.method.stock(case, create(case))
    stock.save_pretrained(tmp_path)
    expected = {"default": logits(ours), "stock": logits(stock)}
    ours.add_adapter("stock", HeadMaskedLoraConfig.from_lora(tmp_path))
    assert not ours.load_adapter(tmp_path, "stock").missing_keys
    for adapter in ("stock", "default"):
        ours.set_adapter(adapter)
        assert torch.equal(logits(ours.eval()), expected[adapter])
    assert load_peft_weights(tmp_path).keys() == get_peft_model_state_dict(ours, adapter_name="stock").keys()
    with pytest.raises(ValueError, match="created with ne=0"):
        deactivate(case, ours, "stock")


# Every option of LoRA is a row, is refused, or does not matter here


ROWS = {option for case in LORA.values() for option in case.options} & {f.name for f in dataclasses.fields(LoraConfig)}
REFUSED = {
    "use_bdlora": (BdLoraConfig(), "use_bdlora cannot be combined with head masks"),
    "layer_replication": ([(0, 2)], "the copies of a layer would carry no masks"),
    "arrow_config": (ArrowConfig(), "arrow_config cannot be combined with head masks"),
    "kasa_config": (KasaConfig(), "kasa_config cannot be combined with head masks"),
    # it adds to the layer's output in place
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens cannot be combined with head masks"),
    # the frozen projection's bias is trained, also where a head is deactivated
    "bias": ("lora_only", "bias='lora_only' cannot be combined with head masks"),
    # PEFT's wrapper of a single parameter carries no mask
    "target_parameters": (tiny.now(["v_proj.weight"]), tiny.now(r"target_parameters.*v_proj.*head masks")),
}
NO_PART = {
    "lora_alpha r": "rows set them",
    "corda_config lora_ga_config loftq_config": "read with an initialisation that is refused",
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode": "PeftConfig's own",
    "modules_to_save": "the classifier, in every row",
    "layers_pattern": "goes with layers_to_transform",
    "trainable_token_indices ensure_weight_tying": "of token embeddings",
    "megatron_config megatron_core": "of Megatron's parallel layers, which are not found to have heads",
    "use_qalora qalora_group_size": "of GPTQ layers, which are refused",
    "runtime_config": "where the computation takes place; needs a GPU",
}


def test_every_option_of_lora_is_accounted_for():
    options = {f.name for f in dataclasses.fields(LoraConfig)}
    assert options == ROWS | REFUSED.keys() | {option for names in NO_PART for option in names.split()}, (
        "PEFT has a new option: give it a row, a refusal, or a reason why it has no part in this"
    )


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM task")
@pytest.mark.parametrize("option", REFUSED)
def test_refused(option):
    value, message = REFUSED[option]
    model = tiny.make("vit")
    before = str(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, HeadMaskedLoraConfig(ne=1, target_modules=tiny.now(["q_proj"]), **{option: value}))
    assert str(model) == before


@pytest.mark.parametrize("value", ["pissa", "olora", "lora_ga", "corda", "loftq", "mica"])
@pytest.mark.parametrize("option", ["init_lora_weights", "init_weights"])
def test_refused_when_set_later(option, value):
    config = HeadMaskedLoraConfig(ne=1)
    setattr(config, option, value)
    with pytest.raises(ValueError, match=f"init_lora_weights='{value}' cannot be combined with head masks"):
        get_peft_model(tiny.make("vit"), config)


@pytest.mark.parametrize("option", ["bias", "target_parameters", "fan_in_fan_out"])
def test_plain_lora_takes_what_masks_refuse(option):
    value = True if option == "fan_in_fan_out" else REFUSED[option][0]
    models = []
    for config in (
        HeadMaskedLoraConfig(ne=0, target_modules=tiny.now(["q_proj"]), modules_to_save=[], **{option: value}),
        LoraConfig(target_modules=tiny.now(["q_proj"]), **{option: value}),
    ):
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match=option) if option == "fan_in_fan_out" else nullcontext():
            models.append(get_peft_model(tiny.make("vit"), config).eval())
        LORA["plain"].method.randomize(models[-1])
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert torch.equal(logits(models[0].merge_and_unload()), logits(models[1].merge_and_unload()))


def test_conversion_from_an_initialisation_is_refused(tmp_path):
    """PEFT then writes only `lora_A` and `lora_B`, of twice the rank."""
    model = create(LORA["orthogonal"].varied(modules_to_save=[]))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion .* no masks"):
        model.save_pretrained(tmp_path / "saved", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_hotswap_of_an_adapter_with_fewer_targets(tmp_path):
    """PEFT fills missing tensors with zeros: no update and no head off, as `mask_scope="head"` shows."""
    for name in ("plain", "head scope"):
        case = LORA[name].varied(modules_to_save=[])
        model = create(case)
        other = create(
            dataclasses.replace(case.varied(target_modules=tiny.now(["v_proj"])), masked=tiny.now("v_proj"))
        )
        other.save_pretrained(tmp_path / name)
        hotswap_adapter(model, tmp_path / name, adapter_name="default")
        assert torch.equal(logits(model), logits(other))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes needs CUDA")
@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes_is_refused(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.make("vit")
    query = tiny.now("vit.layers.0.attention.q_proj")
    for name, old in list(model.named_modules()):
        if name.endswith(tiny.now(("q_proj", "v_proj"))):
            quantised = getattr(bnb.nn, kind)(old.in_features, old.out_features)
            quantised.load_state_dict(old.state_dict())
            model.set_submodule(name, quantised)
    model = model.cuda()
    plain = get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=0))  # PEFT's own layer
    assert plain(tiny.images().cuda()).logits.isfinite().all()
    with pytest.raises(ValueError, match=f"{query} is a {kind}.*for which head masks are not implemented"):
        get_peft_model(model, HeadMaskedLoraConfig(ne=1))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert isinstance(model.get_submodule(query), nn.Linear)


def test_adapters_with_other_heads_are_not_combined():
    model = create(LORA["plain"].varied(modules_to_save=[]))
    model.add_adapter("other", HeadMaskedLoraConfig(ne=1, num_heads=3, modules_to_save=[]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=tiny.now(r"other heads \(num_heads\).* cannot be combined; in model.vit.layers.0")
    ):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_hotswap_of_another_number_of_heads(tmp_path):
    case = LORA["plain"].varied(modules_to_save=[])
    model, other = create(case), create(case.varied(ne=2), seed=1)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits(model), logits(other))


def test_add_weighted_adapter_under_a_name_that_exists():
    """PEFT does not change the adapter, so its heads stay as they are."""
    model = create(LORA["plain"])
    model.add_adapter("sum", HeadMaskedLoraConfig(ne=1))
    set_head_masks(model, tiny.masks_off(model, 3), "sum")
    model.add_weighted_adapter(["default"], [1.0], "sum")
    assert {tuple(mask.tolist()).index(False) for mask in get_head_masks(model, "sum").values()} == {3}
