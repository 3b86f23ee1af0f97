"""PEFT's features with head masks: one table of cases, and every behaviour asked of each of them.

A new option is one more row of `CASES`. A new tuner is one more `Method` (how its adapters get values, and what a
masked one must equal) and one more row per option. The reference never touches our masks: it is built from stock PEFT
with the rows of deactivated heads edited by explicit indices.
"""

import copy
import dataclasses
import functools
import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import reference as reference_values
import tiny
import torch
from peft import (
    ArrowConfig,
    EvaConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftConfig,
    PeftModel,
    VeloraConfig,
    get_eva_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.tuners.lora import BdLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_heads import HeadMaskedLoraConfig, HeadScorer, get_head_masks, set_head_masks


HEAD_DIM = {"vit": 4, "swin": 6}


# The methods


class HeadMaskedLora:
    """Head-masked LoRA against stock LoRA whose rows of deactivated heads are zero."""

    config = HeadMaskedLoraConfig
    own_options = frozenset(f.name for f in dataclasses.fields(HeadMaskedLoraConfig)) - frozenset(
        f.name for f in dataclasses.fields(LoraConfig)
    )

    @staticmethod
    def randomize(model, seed=0):
        """Give every adapter on the model values with which it does something."""
        generator = torch.Generator().manual_seed(seed)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.data.normal_(std=0.5, generator=generator)
            if "lora_magnitude_vector" in name:
                param.data.mul_(1 + torch.rand(param.shape, generator=generator))

    @classmethod
    def stock(cls, case, model):
        """The same adapters as stock PEFT's, with the same values and no masks at all."""
        reference = None
        for adapter, ours in model.peft_config.items():
            options = {"target_modules": tiny.now(["q_proj", "v_proj"]), "modules_to_save": ["classifier"]}
            options |= {key: value for key, value in case.options.items() if key not in cls.own_options}
            # EVA writes these
            config = LoraConfig(**options | {"rank_pattern": ours.rank_pattern, "alpha_pattern": ours.alpha_pattern})
            if reference is None:
                reference = get_peft_model(tiny.make(case.backbone), config, adapter_name=adapter)
            else:
                reference.add_adapter(adapter, config)
        result = reference.load_state_dict(model.state_dict(), strict=False)
        assert not result.missing_keys
        assert all(model.state_dict()[key].dtype == torch.bool for key in result.unexpected_keys)
        return reference.eval()

    @classmethod
    def edit(cls, case, stock, adapter, name, rows, *, base=False):
        """Deactivate: rows of one projection contribute nothing to the adapter; base=True, to the model."""
        layer = stock.get_base_model().get_submodule(name)
        for tensor in cls.row_tensors(layer, adapter):
            tensor.data[rows] = 0
        if adapter in layer.lora_magnitude_vector:  # the magnitude that the frozen row has by itself
            norm = torch.linalg.norm(layer.base_layer.weight[rows], dim=1)
            layer.lora_magnitude_vector[adapter].weight.data[rows] = norm
        if base and case.options.get("mask_scope") == "head":
            layer.base_layer.weight.data[rows] = 0
            layer.base_layer.bias.data[rows] = 0

    @staticmethod
    def row_tensors(layer, adapter):
        """The parameters of a stock layer whose leading dimension is the projection's rows."""
        lora_B = layer.lora_B[adapter]
        return [tensor for tensor in (lora_B.weight, lora_B.bias) if tensor is not None]


class KBitLora(HeadMaskedLora):
    """Against stock LoRA whose weights are the quantised ones, written out by the plain reference."""

    @classmethod
    def stock(cls, case, model):
        stock = super().stock(case, model)
        for adapter, config in model.peft_config.items():
            if getattr(config, "adapter_bits", 32) == 32:
                continue
            for name, layer in stock.get_base_model().named_modules():
                if adapter in getattr(layer, "lora_A", {}):
                    layer.lora_A[adapter].weight.data = cls.quantized(layer.lora_A[adapter].weight, config)
                    heads = heads_off(model, adapter).get(name, [])
                    rows = torch.ones(layer.out_features, dtype=torch.bool)
                    rows[rows_of(case, heads)] = False
                    quantized = cls.quantized(layer.lora_B[adapter].weight, config, rows)
                    layer.lora_B[adapter].weight.data[rows] = quantized[rows]
        return stock

    @staticmethod
    def quantized(weight, config, rows=None):
        values = reference_values.quantized(
            weight.tolist(), config.adapter_bits, None if rows is None else rows.tolist()
        )
        return torch.tensor(values, dtype=weight.dtype)


# The table


def eva(model):
    batches = [{"pixel_values": tiny.images(16, seed=seed)} for seed in range(3)]
    functions = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    directions = get_eva_state_dict(model, batches, show_progress_bar=False, **functions)
    # the tiny layers see much the same; let ranks differ, as they do in larger models
    directions = {
        name: rows[:2] if name.endswith(tiny.now("1.attention.v_proj")) else rows for name, rows in directions.items()
    }
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    assert model.peft_config["default"].rank_pattern == tiny.now({"vit.layers.1.attention.v_proj": 2})


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a configuration, and where it departs from what all others do."""

    options: dict
    method: type = HeadMaskedLora
    backbone: str = "vit"
    masked: str = tiny.now(r"(q_proj|v_proj)")
    """Which projections carry a mask (end of the name)."""
    differ: str = ""
    """Where masks may differ by configuration, and hence do in these tests: "layer", "part", both or neither."""
    exact: bool = True
    """Whether the reference computes the same numbers in the same order, so that results agree bit for bit."""
    refuses: dict = dataclasses.field(default_factory=dict)
    """{behaviour: text of the error that says why not}"""
    never: frozenset = frozenset()
    """Behaviours that make no sense here."""
    warns: tuple = ()
    """Texts of warnings that PEFT or we give on creating such an adapter."""
    prepare: Callable = lambda model: None
    """Called on a new model before anything else."""

    def config(self):
        return self.method.config(**{"ne": None if "ratio" in self.options else 1} | self.options)

    def varied(self, **options):
        """The same row with some options set."""
        return dataclasses.replace(self, options=self.options | options)


HOTSWAP = frozenset({"hotswap"})  # with stock LoRA, PEFT 0.21's hot-swap goes wrong there as well
NO_MIXED_SWIN = {"mixed_batch": "Length of `adapter_names` should be the same as the number of inputs"}
REFUSED_BY_HEAD_SCOPE = {
    "save_as_lora": "do not support LoRA conversion",
    "add_weighted_adapter": "mask_scope='head' cannot be combined",
}
HEADLESS = ("these targets have no attention heads",)


def k_bit(bits, *, refuses=None, **options):
    """A row with adapter_bits."""
    if options.get("mask_scope") == "head":  # as without bits
        refuses = REFUSED_BY_HEAD_SCOPE
    else:
        refuses = {
            "add_weighted_adapter": "k-bit adapters cannot be combined",
            "add_weighted_adapter_of_one": "k-bit adapters cannot be combined",
            **(refuses or {}),
        }
    own = {name: options.pop(name) for name in ("backbone", "differ", "masked", "warns") if name in options}
    return Case(
        {"adapter_bits": bits, "r": 4, **options},
        method=KBitLora,
        exact=False,  # the reference's sums are in another order
        refuses=refuses,
        # tests/tuners/head_masked_lora/test_k_bit.py has the gradients; the file holds the weights behind the bits
        never=frozenset({"gradients", "plain_lora_file"}),
        **own,
    )


SLOW = ("8 bit, swin",)
CASES = {
    "plain": Case({}),
    "swin": Case({}, backbone="swin", refuses=NO_MIXED_SWIN),
    "two heads": Case({"ne": 2}),
    "ratio": Case({"ratio": 0.5}, backbone="swin", refuses=NO_MIXED_SWIN),
    "per layer": Case({"granularity": "layer"}, differ="layer"),
    "separate q and v": Case({"joint": False}, differ="part"),
    "per layer, separate, swin": Case(
        {"granularity": "layer", "joint": False}, backbone="swin", differ="layer part", refuses=NO_MIXED_SWIN
    ),
    "head scope": Case(
        {"mask_scope": "head"},
        refuses=REFUSED_BY_HEAD_SCOPE,
        never=frozenset({"plain_lora_file"}),
    ),
    "dora": Case(
        {"use_dora": True},
        never=HOTSWAP,
        exact=False,
        refuses={
            "mixed_batch": "Cannot pass `adapter_names` when DoRA is enabled",
            "add_weighted_adapter": "DoRA normalises the sum",
            "save_as_lora": "do not support LoRA conversion",  # of the delta weight alone, without the magnitude
        },
    ),
    "rslora": Case({"use_rslora": True, "r": 3, "lora_alpha": 5}),
    "lora_bias": Case(
        {"lora_bias": True},
        refuses={"save_as_lora": "do not support LoRA conversion"},  # of the delta weight alone, without the bias
    ),
    "rank_pattern": Case({"rank_pattern": tiny.now({"q_proj": 4, "layers.1.attention.v_proj": 2})}, never=HOTSWAP),
    "alpha_pattern": Case(
        {"alpha_pattern": tiny.now({"v_proj": 3}), "rank_pattern": tiny.now({r"layers\.0\..*": 5})}, never=HOTSWAP
    ),
    "dropout": Case({"lora_dropout": 0.3}),
    "gaussian": Case({"init_lora_weights": "gaussian"}),
    "orthogonal": Case({"init_lora_weights": "orthogonal"}),
    "no initialisation": Case({"init_lora_weights": False}),
    "eva": Case(
        {"init_lora_weights": "eva", "eva_config": EvaConfig(), "r": 4},
        prepare=eva,
        warns=("lora with eva initialization used with low_cpu_mem_usage=False",),
        refuses={
            "hotswap": "Configs are incompatible: for alpha_pattern",  # the other adapter was not prepared
            # EVA makes target_modules a list, which PEFT refuses in stock LoRA as well
            "add_weighted_adapter": "adapter configs should follow the same target modules type",
            "add_weighted_adapter_of_one": "Invalid type <class 'list'> found in target_modules",
        },
    ),
    "layers_to_transform": Case(
        {"layers_to_transform": [1]}, masked=tiny.now(r"layers\.1\.attention\.(q_proj|v_proj)")
    ),
    "exclude_modules": Case(
        {"exclude_modules": tiny.now(["layers.0.attention.q_proj"])},
        masked=tiny.now(r"(layers\.1\.attention\.q_proj|v_proj)"),
        warns=("Found missing adapter keys",),  # save_as_lora does not pass the option on
    ),
    "regular expression": Case(
        {"target_modules": tiny.now(r".*\.0\.attention\.(k_proj|v_proj)")},
        masked=tiny.now(r"0\.attention\.(k_proj|v_proj)"),
    ),
    "all-linear": Case(
        {"target_modules": "all-linear", "r": 3}, masked=tiny.now(r"(q_proj|k_proj|v_proj)"), warns=HEADLESS
    ),
    "convolution": Case(
        {"target_modules": tiny.now(["q_proj", "fc1", "projection"])},
        masked=tiny.now(r"q_proj"),
        warns=HEADLESS,
        refuses={"save_as_lora": "do not support LoRA conversion"},  # PEFT converts linear layers alone
    ),
    "num_heads": Case({"num_heads": 6}),
    "fan_in_fan_out": Case({"fan_in_fan_out": True}, warns=("fan_in_fan_out is set to True",)),
    "velora": Case({"velora_config": VeloraConfig(num_groups=4)}, never=HOTSWAP),
    "1 bit": k_bit(1),
    "2 bit, per layer": k_bit(2, granularity="layer", use_rslora=True, differ="layer"),
    "4 bit, head scope": k_bit(4, mask_scope="head"),
    "8 bit, swin": k_bit(8, lora_dropout=0.2, bottleneck_dropout=0.1, backbone="swin", refuses=NO_MIXED_SWIN),
    "1 bit, lora_bias": k_bit(1, lora_bias=True, refuses={"save_as_lora": "do not support LoRA conversion"}),
    "1 bit, no heads too": k_bit(
        1, target_modules="all-linear", masked=tiny.now(r"(q_proj|k_proj|v_proj)"), warns=HEADLESS
    ),
    "bottleneck_dropout": Case(
        {"bottleneck_dropout": 0.3}, never=frozenset({"gradients"})
    ),  # stock LoRA has none there
    "monteclora": Case(
        {"monteclora_config": MontecloraConfig(num_samples=2)},
        never=frozenset({"gradient_checkpointing"}),  # its random numbers are not replayed, in stock LoRA either
    ),
}


def behaviour(test):
    """Run a test on every row of the table; where a row refuses, the refusal is what is tested."""
    name = test.__name__.removeprefix("test_")

    @pytest.mark.parametrize(
        "case",
        [
            pytest.param(c, id=i, marks=[pytest.mark.slow] if i in SLOW else [])
            for i, c in CASES.items()
            if name not in c.never
        ],
    )
    @functools.wraps(test)
    def on_case(case, **fixtures):
        refusal = case.refuses.get(name)
        with warnings.catch_warnings():
            for text in case.warns:
                warnings.filterwarnings("ignore", message=re.escape(text))
            error = (ValueError, TypeError, NotImplementedError)
            with pytest.raises(error, match=re.escape(refusal)) if refusal else nullcontext():
                test(case=case, **fixtures)

    return on_case


def test_rows_name_behaviours():
    behaviours = {name.removeprefix("test_") for name, value in globals().items() if inspect.isfunction(value)}
    assert {name for case in CASES.values() for name in (*case.refuses, *case.never)} <= behaviours


# What the behaviours are made of


def create(case, *adapters, seed=0):
    """A model with adapters that have values, each with heads of its own deactivated; "default" is active."""
    adapters = adapters or ("default",)
    model = get_peft_model(tiny.make(case.backbone), case.config(), adapter_name=adapters[0])
    case.prepare(model)
    for adapter in adapters[1:]:
        model.add_adapter(adapter, case.config())
    case.method.randomize(model, seed)
    for index, adapter in enumerate(adapters):
        deactivate(case, model, adapter, seed + index)
    return model.eval()


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def projections(case):
    """Names of the projections that must carry a mask, from the untouched model."""
    pattern = re.compile(rf"(.*\.)?{case.masked}")
    return [name for name, module in tiny.make(case.backbone).named_modules() if pattern.fullmatch(name)]


def deactivated(case, seed=0):
    """`{projection: indices of deactivated heads}`: one head each, another one for another seed."""
    model = tiny.make(case.backbone)
    result = {}
    for index, name in enumerate(projections(case)):
        head = 1 + seed
        head += index // 2 if "layer" in case.differ else 0
        head += tiny.now("v_proj") in name if "part" in case.differ else 0
        result[name] = [head % (model.get_submodule(name).out_features // HEAD_DIM[case.backbone])]
    return result


def deactivate(case, model, adapter="default", seed=0):
    masks = get_head_masks(model, adapter)
    for name, heads in deactivated(case, seed).items():
        masks[name][:] = True
        masks[name][heads] = False
    set_head_masks(model, masks, adapter)
    for mask in masks.values():  # what was passed is the caller's
        mask.logical_not_()


def rows_of(case, heads):
    """Indices of the output rows that belong to the heads."""
    size = HEAD_DIM[case.backbone]
    return [row for head in heads for row in range(head * size, (head + 1) * size)]


def heads_off(model, adapter="default"):
    masks = get_head_masks(model, adapter)
    return {name: [head for head, active in enumerate(mask.tolist()) if not active] for name, mask in masks.items()}


def reference(case, model, adapter="default"):
    """Stock PEFT with explicitly edited rows, `adapter` active."""
    stock = case.method.stock(case, model)
    for each in model.peft_config:
        for name, heads in heads_off(model, each).items():
            case.method.edit(case, stock, each, name, rows_of(case, heads), base=each == adapter)
    stock.set_adapter(adapter)
    return stock.eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(tiny.images(), **kwargs).logits


def assert_same(case, actual, expected):
    """Bit for bit where the reference computes the same numbers in the same order."""
    tolerance = {"rtol": 0, "atol": 0} if case.exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual, expected, **tolerance)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


def assert_heads_are_off(case, model, adapter="default"):
    """The rows of deactivated heads are the frozen projection's own, and exactly so; the others are not."""
    for name, heads in heads_off(model, adapter).items():
        layer = base_of(model).get_submodule(name)
        x = torch.randn(2, 5, layer.in_features)
        with torch.no_grad():
            adapted, frozen = layer(x), layer.base_layer(x)
        rows = rows_of(case, heads)
        assert rows
        expected = torch.zeros_like(frozen) if case.options.get("mask_scope") == "head" else frozen
        assert torch.equal(adapted[..., rows], expected[..., rows]), name
        active = [row for row in range(layer.out_features) if row not in rows]
        assert (adapted != frozen)[..., active].any(dim=-1).all(), name


# The behaviours


@behaviour
def test_forward(case):
    model = create(case)
    assert list(get_head_masks(model)) == projections(case)
    assert heads_off(model) == deactivated(case)
    expected = logits(reference(case, model))
    assert_same(case, logits(model), expected)
    assert not torch.allclose(expected, logits(case.method.stock(case, model)), atol=1e-4)  # the mask does something
    assert_heads_are_off(case, model)


@behaviour
def test_gradients(case):
    """In training mode, with the same random numbers for dropout."""
    model = create(case)
    stock = reference(case, model)
    for each in (model, stock):
        torch.manual_seed(5)
        each.train()(**tiny.batch()).loss.backward()
    for name, heads in heads_off(model).items():
        rows = rows_of(case, heads)
        for param in model.get_base_model().get_submodule(name).head_parameters("default"):
            assert param.grad[rows].count_nonzero() == 0
            assert param.grad.count_nonzero() > 0
        layer = stock.get_base_model().get_submodule(name)
        for param in (*case.method.row_tensors(layer, "default"), *layer.lora_magnitude_vector.parameters()):
            param.grad[rows] = 0
    if case.options.get("mask_scope") == "head":
        return  # the frozen part of a head is gone as well, of which stock PEFT has no gradient
    gradients = {name: param.grad for name, param in stock.named_parameters() if param.grad is not None}
    for name, param in model.named_parameters():
        if param.grad is not None:
            assert_same(case, param.grad, gradients.pop(name))
    assert not gradients


@behaviour
def test_training(case, tmp_path):
    """Selected by score, then trained on: the heads' update is exactly zero in memory, merged, and in the file."""
    model = create(case)
    set_head_masks(model, {name: torch.ones_like(mask) for name, mask in get_head_masks(model).items()})
    scorer = HeadScorer(model)
    optimizer = tiny.train(model, steps=2, after_backward=scorer.update)
    scorer.apply(optimizer)
    off = heads_off(model)
    share = case.options.get("ratio")
    for name, mask in get_head_masks(model).items():
        assert len(off[name]) == (int(share * len(mask)) if share else case.options.get("ne", 1))
    if "layer" not in case.differ and case.backbone == "vit":
        assert len({str(heads) for name, heads in off.items() if name.endswith(tiny.now("v_proj"))}) <= 1
    tiny.train(model, steps=3, optimizer=optimizer, seed=50)
    model.eval()
    assert heads_off(model) == off
    assert_heads_are_off(case, model)
    for name, heads in off.items():
        for param in model.get_base_model().get_submodule(name).head_parameters("default"):
            assert param[rows_of(case, heads)].count_nonzero() == 0
    assert_same(case, logits(model), logits(reference(case, model)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make(case.backbone), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@behaviour
def test_save_and_load(case, tmp_path):
    model = create(case)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny.make(case.backbone), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert heads_off(loaded) == heads_off(model)
        assert type(PeftConfig.from_pretrained(tmp_path)) is case.method.config


@behaviour
def test_load_under_another_name(case, tmp_path):
    source = create(case)
    source.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        model = create(case, seed=1)
        before = logits(model)
        result = model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.missing_keys
        assert torch.equal(logits(model), before)
        model.set_adapter("loaded")
        assert torch.equal(logits(model.eval()), logits(source))
        assert heads_off(model, "loaded") == heads_off(source)
        assert heads_off(model) == deactivated(case, 1)


@behaviour
def test_plain_lora_file(case):
    """Stock PEFT reads what we save, and computes the same."""
    model = create(case)
    file = {key: value for key, value in get_peft_model_state_dict(model).items() if value.dtype != torch.bool}
    other = create(case, seed=3)  # other values
    other.peft_config["default"] = model.peft_config["default"]
    stock = case.method.stock(case, other)
    assert not set_peft_model_state_dict(stock, file).unexpected_keys
    assert not torch.allclose(logits(stock), logits(other), atol=1e-4)
    assert_same(case, logits(stock), logits(model))


@behaviour
def test_merge_and_unmerge(case):
    for safe_merge in (False, True):
        model = create(case)
        layers = {name: model.get_base_model().get_submodule(name).base_layer for name in projections(case)}
        before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
        expected = logits(reference(case, model))

        model.merge_adapter(safe_merge=safe_merge)
        assert_close(logits(model), expected)
        for name, heads in heads_off(model).items():
            rows = rows_of(case, heads)
            for key, tensor in layers[name].state_dict().items():
                kept = torch.zeros_like if case.options.get("mask_scope") == "head" else torch.clone
                assert torch.equal(tensor[rows], kept(before[name][key][rows]))

        model.unmerge_adapter()
        assert_close(logits(model), expected)
        for name, heads in heads_off(model).items():
            for key, tensor in layers[name].state_dict().items():
                assert torch.equal(tensor[rows_of(case, heads)], before[name][key][rows_of(case, heads)])
                assert_close(tensor, before[name][key])


@behaviour
def test_merge_two_adapters(case):
    """One after the other; what is merged first is unmerged last."""
    model = create(case, "default", "other")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    expected = [logits(reference(case, model, adapter)) for adapter in ("default", "other")]
    model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    for name, tensor in base.items():
        assert_close(model.state_dict()[name], tensor)
    for adapter, value in zip(("default", "other"), expected, strict=True):
        model.set_adapter(adapter)
        assert_close(logits(model.eval()), value)


@behaviour
def test_merge_and_unload(case):
    model = create(case)
    expected = logits(reference(case, model))
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny.make(case.backbone))
    assert merged.state_dict().keys() == tiny.make(case.backbone).state_dict().keys()
    assert_close(logits(merged), expected)


@behaviour
def test_unload(case):
    model = create(case)
    unloaded = model.unload()
    base = tiny.make(case.backbone).state_dict()
    for name, tensor in unloaded.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, base.pop(name))
    assert all(name.startswith("classifier") for name in base)


@behaviour
def test_disable(case):
    model = create(case)
    expected = logits(model)
    base = tiny.make(case.backbone).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), expected)


@behaviour
def test_disable_merged(case):
    model = create(case)
    expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(logits(model), logits(tiny.make(case.backbone).eval()))
    assert_close(logits(model), expected)


@behaviour
def test_switch(case):
    model = create(case, "default", "other")
    assert heads_off(model) == deactivated(case, 0)
    assert heads_off(model, "other") == deactivated(case, 1)
    expected = {adapter: logits(reference(case, model, adapter)) for adapter in ("default", "other")}
    assert not torch.allclose(expected["default"], expected["other"], atol=1e-4)
    for adapter in ("other", "default", "other"):
        model.set_adapter(adapter)
        assert_same(case, logits(model.eval()), expected[adapter])


@behaviour
def test_delete(case):
    model = create(case, "default", "other")
    expected = logits(reference(case, model))
    model.delete_adapter("other")
    assert_same(case, logits(model), expected)
    assert not any("other" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="no attention head of the model belongs to adapter 'other'"):
        get_head_masks(model, "other")
    model.add_adapter("other", case.config())  # the name is free again, and nothing of the old mask remains
    assert all(mask.all() for mask in get_head_masks(model, "other").values())
    assert_same(case, logits(model), expected)


@behaviour
def test_mixed_batch(case):
    model = create(case, "default", "other")
    expected = {adapter: logits(reference(case, model, adapter)) for adapter in ("default", "other")}
    with model.disable_adapter():
        expected["__base__"] = logits(model)
    names = ["other", "__base__", "default", "other"]
    mixed = logits(model, adapter_names=names)
    for index, name in enumerate(names):
        assert_close(mixed[index], expected[name][index])


@behaviour
def test_copy_and_pickle(case):
    model = create(case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert heads_off(other) == heads_off(model)
        deactivate(case, other, seed=1)
        assert heads_off(model) == deactivated(case)  # nothing is shared
        assert_same(case, logits(other), logits(reference(case, other)))


@behaviour
def test_state_dict(case):
    """What Trainer and accelerate save: everything, masks included."""
    model, other = create(case), create(case, seed=1)
    buffers = dict(other.named_buffers())
    deactivate(case, other, seed=2)
    assert all(buffer is buffers[name] for name, buffer in other.named_buffers())  # set in place, as DDP needs it
    other.load_state_dict(model.state_dict())
    assert heads_off(other) == heads_off(model)
    assert torch.equal(logits(other), logits(model))


@behaviour
def test_half_precision(case):
    dtype = torch.bfloat16
    model = create(case).to(dtype)
    stock = reference(case, model).to(dtype)  # of the weights as they are now
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


@behaviour
def test_scale(case):
    """`set_scale`, `scale_layer`, `unscale_layer`."""
    model = create(case)
    stock = reference(case, model)
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
    assert_close(logits(copy.deepcopy(model).merge_and_unload()), logits(stock))
    each_layer(lambda layer: layer.unscale_layer(0.25))
    assert_same(case, logits(model), expected)


@behaviour
def test_gradient_checkpointing(case):
    model = create(case)
    other = copy.deepcopy(model)
    base = other.get_base_model()
    if hasattr(base, "activation_checkpointing_enable"):  # transformers renames it in v6
        base.activation_checkpointing_enable()
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    for each in (model, other):
        torch.manual_seed(5)
        each.train()(**tiny.batch()).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.slow
@behaviour
def test_compile(case):
    model = create(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(logits(compiled), logits(reference(case, model)))
    with torch._dynamo.config.patch(error_on_recompile=True):  # masks are data
        deactivate(case, model, seed=1)
        assert_close(logits(compiled), logits(reference(case, model)))
    torch._dynamo.reset()


@behaviour
def test_inject(case):
    """`inject_adapter_in_model`: without a PeftModel around it."""
    source = create(case)
    config = copy.deepcopy(source.peft_config["default"])
    keys = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(source).items()}
    for low_cpu_mem_usage in (False, True):
        model = inject_adapter_in_model(config, tiny.make(case.backbone), low_cpu_mem_usage=low_cpu_mem_usage)
        result = set_peft_model_state_dict(model, keys, low_cpu_mem_usage=low_cpu_mem_usage)
        # MonteCLoRA makes its buffers later then
        assert low_cpu_mem_usage or not result.unexpected_keys
        assert heads_off(model) == heads_off(source)
        assert torch.equal(logits(model.eval()), logits(source))


@behaviour
def test_hotswap(case, tmp_path):
    # without a classifier: PEFT's hot-swap knows LoRA's own keys alone, and fails on stock adapters with one as well
    case = case.varied(modules_to_save=[])
    model = create(case)
    other = create(dataclasses.replace(case, prepare=lambda model: None), seed=1)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert heads_off(model) == heads_off(other) == deactivated(case, 1)
    assert torch.equal(logits(model), logits(other))


@behaviour
def test_save_as_lora(case, tmp_path):
    """Written anew by PEFT, from the delta weight."""
    model = create(case)
    save_as_lora(tmp_path, model, rank=24 if case.backbone == "vit" else 12)
    stock = PeftModel.from_pretrained(tiny.make(case.backbone), tmp_path)
    assert type(stock.peft_config["default"]) is LoraConfig
    assert_close(logits(stock), logits(reference(case, model)))


@behaviour
@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat"])
def test_add_weighted_adapter(case, combination_type):
    """A head of the sum is active where it is in any of the summands."""
    case = case.varied(modules_to_save=[])  # which PEFT does not sum
    model = create(case, "default", "other")
    stock = reference(case, model)
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
    assert_close(logits(model), logits(stock))
    off = {adapter: heads_off(model, adapter) for adapter in ("default", "other", "sum")}
    for name in projections(case):
        assert set(off["sum"][name]) == set(off["default"][name]) & set(off["other"][name])
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), before)  # the summands are as they were


@behaviour
def test_add_weighted_adapter_of_one(case):
    """Deactivated in every summand, a head stays deactivated."""
    model = create(case)
    if case.options.get("mask_scope") == "head":
        return  # refused: test_add_weighted_adapter
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    assert heads_off(model, "sum") == heads_off(model)
    model.set_adapter("sum")
    for name, heads in heads_off(model, "sum").items():
        delta = base_of(model).get_submodule(name).get_delta_weight("sum")
        assert delta[rows_of(case, heads)].count_nonzero() == 0
        assert delta.count_nonzero() > 0


@behaviour
def test_stock_adapter_joins(case, tmp_path):
    """`from_lora`: a stock adapter of the same options beside ours, switched to and mixed in."""
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


# Every option of LoRA is a row, refused, or has no part in this


ROWS = {option for case in CASES.values() for option in case.options} & {
    f.name for f in dataclasses.fields(LoraConfig)
}
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
        HeadMaskedLora.randomize(models[-1])
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert torch.equal(logits(models[0].merge_and_unload()), logits(models[1].merge_and_unload()))


def test_conversion_from_an_initialisation_is_refused(tmp_path):
    """PEFT then writes `lora_A` and `lora_B` alone, of twice the rank."""
    model = create(CASES["orthogonal"].varied(modules_to_save=[]))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion .* no masks"):
        model.save_pretrained(tmp_path / "saved", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_hotswap_of_an_adapter_with_fewer_targets(tmp_path):
    """PEFT fills what the file does not hold with zeros: no update, and no head off, which `mask_scope="head"` shows."""
    for name in ("plain", "head scope"):
        case = CASES[name].varied(modules_to_save=[])
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
    model = create(CASES["plain"].varied(modules_to_save=[]))
    model.add_adapter("other", HeadMaskedLoraConfig(ne=1, num_heads=3, modules_to_save=[]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=tiny.now(r"other heads \(num_heads\).* cannot be combined; in model.vit.layers.0")
    ):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_hotswap_of_another_number_of_heads(tmp_path):
    case = CASES["plain"].varied(modules_to_save=[])
    model, other = create(case), create(case.varied(ne=2), seed=1)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(logits(model), logits(other))


def test_add_weighted_adapter_under_a_name_that_exists():
    """PEFT leaves it alone, so its heads stay as they are."""
    model = create(CASES["plain"])
    model.add_adapter("sum", HeadMaskedLoraConfig(ne=1))
    set_head_masks(model, tiny.masks_off(model, 3), "sum")
    model.add_weighted_adapter(["default"], [1.0], "sum")
    assert {tuple(mask.tolist()).index(False) for mask in get_head_masks(model, "sum").values()} == {3}
