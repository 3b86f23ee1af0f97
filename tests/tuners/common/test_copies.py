import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, get_head_masks, set_head_masks


LABELS = {0: "ant", 1: "bee", 2: "cod"}
LORA = {
    "plain": {},
    "alpha": {"lora_alpha": 3, "r": 4},
    "rslora": {"use_rslora": True, "r": 4},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "rslora, dora": {"use_rslora": True, "use_dora": True, "r": 3},
    "patterns": {"rank_pattern": tiny.now({"q_proj": 2}), "alpha_pattern": tiny.now({"v_proj": 5})},
    "one layer": {"layers_to_transform": [1]},
    "no masks": {"ne": 0, "use_rslora": True},
    "head scope": {"mask_scope": "head"},
}
RLRR = {"rlrr": {"ne": 1}, "rlrr, no residual": {"residual": False, "r": 2}, "rlrr, no masks": {}}
COPIES = {name: HeadMaskedLoraConfig(**{"ne": 1, **options}) for name, options in LORA.items()}
COPIES |= {name: RLRRConfig(**options) for name, options in RLRR.items()}


def randomize(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if any(part in name for part in ("lora_", "rlrr_", "modules_to_save")):
            param.data += torch.randn(param.shape, generator=generator) * 0.3
    return model.eval()


def create(config, *others, adapter_name="one"):
    vit = tiny.make("vit")
    vit.config.id2label = dict(LABELS)
    model = get_peft_model(vit, copy.deepcopy(config), adapter_name=adapter_name)
    for number, other in enumerate(others):
        model.add_adapter(f"two{number}", copy.deepcopy(other))
    return randomize(model)


def logits(model):
    with torch.no_grad():
        return model(pixel_values=tiny.images()).logits


def base_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n or "original_module" in n}


def deltas(model, adapter):
    """Return `{module: (update of the weight, of the bias)}`."""
    found = {}
    for name, layer in model.named_modules():
        if adapter in getattr(layer, "lora_A", ()):
            bias = layer.lora_B[adapter].bias
            bias = torch.zeros(()) if bias is None else layer.mask_rows(adapter, bias * layer.scaling[adapter])
            found[name] = layer.get_delta_weight(adapter).detach(), bias.detach()
    return found


@pytest.mark.parametrize("name", COPIES)
def test_one_adapter_with_weight_1_is_copied(name, tmp_path):
    model = create(COPIES[name])
    if COPIES[name].masks_heads:
        masks = {key: torch.arange(6) != 2 for key in get_head_masks(model, "one")}
        set_head_masks(model, masks, "one")
    expected, base = logits(model), base_weights(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["one"], [1.0], "on")  # a name that others contain
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(weight, base[n]) for n, weight in base_weights(model).items())
    old, new = (model.peft_config[adapter].to_dict() for adapter in ("one", "on"))
    assert old == new
    with torch.no_grad():  # nothing is shared
        for n, param in model.named_parameters():
            if n.endswith(".one") or ".one." in n:
                param.zero_()
    model.set_adapter("on")
    assert torch.equal(logits(model.eval()), expected)
    if COPIES[name].masks_heads:
        assert all(torch.equal(mask, masks[key]) for key, mask in get_head_masks(model, "on").items())
    model.save_pretrained(tmp_path, selected_adapters=["on"])
    again = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "on")
    assert torch.equal(logits(again.eval()), expected)
    assert again.get_base_model().config.id2label == LABELS


@pytest.mark.parametrize("combination_type", ["cat", "ties", "dare_linear", "magnitude_prune_svd"])
def test_a_copy_is_one_whatever_the_type(combination_type):
    model = create(COPIES["rslora"])
    expected = logits(model)
    model.add_weighted_adapter(
        ["one"], torch.ones(1), "sum", combination_type=combination_type, svd_rank=1, density=0.5
    )
    model.set_adapter("sum")
    assert torch.equal(logits(model.eval()), expected)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_copy_leaves_the_base_weight_alone_where_the_initialisation_has_changed_it():
    model = create(HeadMaskedLoraConfig(ne=0, init_lora_weights="pissa"))
    expected, base = logits(model), base_weights(model)
    model.add_weighted_adapter(["one"], [1.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model.eval()), expected)
    assert all(torch.equal(weight, base[n]) for n, weight in base_weights(model).items())
    assert model.peft_config["sum"].init_lora_weights == "pissa"


def test_a_copy_of_the_scaling_in_force():
    model = create(COPIES["plain"])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("one", 0.3)
    expected = logits(model)
    model.add_weighted_adapter(["one"], [1.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model.eval()), expected)


SUMS = {
    "rslora": [{"use_rslora": True, "r": 4}] * 2,
    "lora_bias": [{"lora_bias": True, "lora_alpha": 3}] * 2,
    "bias of the second alone": [{}, {"lora_bias": True}],
    "rslora of the second alone": [{"lora_alpha": 2}, {"use_rslora": True, "r": 3, "lora_alpha": 5}],
    "patterns": [LORA["patterns"], {"rank_pattern": tiny.now({"v_proj": 3}), "r": 2, "ne": 0}],
    "other layers": [{"layers_to_transform": [0]}, {"layers_to_transform": [1], "use_rslora": True}],
    "excluded": [{"exclude_modules": tiny.now(["layers.0.attention.q_proj"])}, {"lora_bias": True}],
}


@pytest.mark.filterwarnings("ignore:the adapter saved to")  # heads that one of two adapters has are active
@pytest.mark.parametrize("combination_type", ["cat", "svd"])
@pytest.mark.parametrize("name", SUMS)
def test_sums_are_exact(name, combination_type, tmp_path):
    configs = [HeadMaskedLoraConfig(**{"ne": 1, "modules_to_save": [], **options}) for options in SUMS[name]]
    model = create(*configs)
    for adapter, config, off in zip(("one", "two0"), configs, ([2], [2, 4]), strict=True):
        if config.masks_heads:
            mask = torch.tensor([head not in off for head in range(6)])
            set_head_masks(model, dict.fromkeys(get_head_masks(model, adapter), mask), adapter)
    weights = {"one": 0.7, "two0": -1.5}
    before = {adapter: deltas(model, adapter) for adapter in weights}
    options = {"svd_rank": 24} if combination_type == "svd" else {}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type, **options)
    summed = deltas(model, "sum")
    assert summed.keys() == before["one"].keys() | before["two0"].keys()
    for module, tensors in summed.items():
        for part, tensor in enumerate(tensors):
            each = [w * before[adapter][module][part] for adapter, w in weights.items() if module in before[adapter]]
            torch.testing.assert_close(tensor.expand(24, *tensor.shape[1:]), sum(each).expand(24, *tensor.shape[1:]))
    model.set_adapter("sum")
    expected = logits(model.eval())
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "sum").eval()), expected)


def test_the_linear_sum_has_the_products_of_the_factors():
    """As in stock LoRA without rsLoRA, adapters of the same scaling have the same sum."""
    options = {"r": 4, "modules_to_save": [], "ne": 0}
    sums = []
    for config in (
        HeadMaskedLoraConfig(lora_alpha=16, **options),
        HeadMaskedLoraConfig(lora_alpha=8, use_rslora=True, **options),
    ):
        model = create(config, config)
        model.add_weighted_adapter(["one", "two0"], [0.7, 0.4], "sum", combination_type="linear")
        model.set_adapter("sum")
        sums.append(logits(model.eval()))
    assert torch.equal(*sums)


@pytest.mark.filterwarnings("ignore:the adapter saved to")
def test_a_linear_sum_with_ranks_by_pattern_can_be_loaded(tmp_path):
    """Its layers have the rank that its configuration states."""
    model = create(*[HeadMaskedLoraConfig(ne=1, modules_to_save=[], **LORA["patterns"])] * 2)
    model.add_weighted_adapter(["one", "two0"], [0.5, 2.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "sum")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_a_multiple_of_one_adapter():
    model = create(HeadMaskedLoraConfig(ne=1, use_rslora=True, lora_bias=True))
    head = model.get_base_model().classifier.modules_to_save
    model.add_weighted_adapter(["one"], [-0.5], "multiple")
    for module, (weight, bias) in deltas(model, "multiple").items():
        torch.testing.assert_close(weight, -0.5 * deltas(model, "one")[module][0])
        torch.testing.assert_close(bias, -0.5 * deltas(model, "one")[module][1])
    assert torch.equal(head["multiple"].weight, head["one"].weight)


HEADLESS = {"modules_to_save": []}
REFUSED = {
    "dora": ([{"use_dora": True, **HEADLESS}] * 2, [1.0, 1.0], {}, "adapter 'one' has use_dora=True: DoRA normalises"),
    "dora of the second": ([HEADLESS, {"use_dora": True, **HEADLESS}], [1.0, 1.0], {}, "adapter 'two0' has use_dora"),
    "half of dora": ([{"use_dora": True}], [0.5], {}, "adapter 'one' has use_dora=True"),
    "bias": (
        [{"lora_bias": True, **HEADLESS}] * 2,
        [1.0, 1.0],
        {"combination_type": "ties", "density": 0.5},
        "lora_bias=True, for which combination_type='ties' is not defined",
    ),
    "two heads": ([{}, {}], [1.0, 1.0], {}, "same module with modules_to_save"),
    "one weight": ([HEADLESS] * 2, [1.0], {}, "one weight per adapter is needed; got 2 adapters, 1 weights"),
    "infinite": ([HEADLESS] * 2, [1.0, float("inf")], {}, "weights must be finite"),
    "rank": ([HEADLESS] * 2, [1.0, 1.0], {"svd_rank": 25}, "q_proj has 24 singular values|query has 24 singular"),
    "ranks": (
        [{"rank_pattern": tiny.now({name: 2}), **HEADLESS} for name in ("q_proj", "v_proj")],
        [1.0, 1.0],
        {"combination_type": "linear"},
        "needs adapters of the same rank, but in .* they have {'one': ., 'two0': .}",
    ),
    "k bit": ([{"adapter_bits": 4}], [1.0], {}, "k-bit adapters cannot be combined"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, weights, arguments, message = REFUSED[name]
    model = create(*(HeadMaskedLoraConfig(ne=1, **each) for each in options))
    before, state = logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["one", "two0"][: len(options)], weights, "sum", **arguments)
    assert "sum" not in model.peft_config and model.active_adapters == ["one"]
    assert state.keys() == model.state_dict().keys() and torch.equal(logits(model), before)


def test_what_fails_later_is_undone():
    """PEFT lets only one adapter train biases of the base model, and refuses another while it is created."""
    model = create(HeadMaskedLoraConfig(ne=0, bias="all"))
    before, keys = logits(model), model.state_dict().keys()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_weighted_adapter(["one"], [1.0], "sum")
    assert list(model.peft_config) == model.active_adapters == ["one"]
    assert model.state_dict().keys() == keys and torch.equal(logits(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
