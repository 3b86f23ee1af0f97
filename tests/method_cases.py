"""The methods and their options, one row each, and the helpers of `tests/tuners/test_contract.py`.

A new method is one row of `METHODS`; a new option of a method is one row of `OPTIONS`. A method with a plain reference
of its own is a subclass of `Method` as well. A reference never uses our masks: it is built from stock PEFT, or from
the formulas, with the rows of deactivated heads edited by explicit indices.
"""

import copy
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import reference as reference_values
import rlrr_reference
import tiny
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftConfig,
    VeloraConfig,
    get_eva_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    set_peft_model_state_dict,
)

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, get_head_masks, set_head_masks


HEAD_DIM = {"vit": 4, "swin": 6}


# The methods


class Method:
    """A method without a reference of its own: an adapter must act as it does alone on a new model.

    Attributes:
        config: Class of its configurations.
        prefix: Beginning of the names of its parameters.
        restores_exactly: Whether unmerging restores the base model bit for bit.
        rounding: `(rtol, atol)` against a reference that computes in another order.
        atol: Absolute tolerance of merged weights.
    """

    restores_exactly = False
    rounding = (1e-5, 1e-6)
    atol = 2e-6

    def __init__(self, config: type[PeftConfig], prefix: str):
        self.config = config
        self.prefix = prefix

    def randomize(self, model, seed=0):
        """Give every adapter on the model values with which it has an effect."""
        generator = torch.Generator().manual_seed(seed)
        for name, param in model.named_parameters():
            if self.prefix in name:
                param.data += 0.2 * torch.randn(param.shape, generator=generator)

    def logits(self, case, model, adapter="default"):
        """Return the logits that the model must have with `adapter` active."""
        return logits(self._alone(case, model, adapter))

    def gradients(self, case, model):
        """Return `{parameter name: gradient}` of a batch, in training mode, "default" being active; None if unknown."""
        alone = self._alone(case, model, "default").train()
        torch.manual_seed(5)
        alone(**tiny.batch()).loss.backward()
        return {name: param.grad for name, param in alone.named_parameters() if param.requires_grad}

    def _alone(self, case, model, adapter):
        alone = get_peft_model(tiny.make(case.backbone), copy.deepcopy(model.peft_config[adapter]))
        set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name=adapter))
        return alone.eval()


class HeadMaskedLora(Method):
    """Head-masked LoRA, compared with stock LoRA whose rows of deactivated heads are zero."""

    own_options = frozenset(f.name for f in dataclasses.fields(HeadMaskedLoraConfig)) - frozenset(
        f.name for f in dataclasses.fields(LoraConfig)
    )

    def __init__(self):
        super().__init__(HeadMaskedLoraConfig, "lora_")

    def randomize(self, model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.data.normal_(std=0.5, generator=generator)
            if "lora_magnitude_vector" in name:
                param.data.mul_(1 + torch.rand(param.shape, generator=generator))

    def logits(self, case, model, adapter="default"):
        return logits(self.reference(case, model, adapter))

    def gradients(self, case, model):
        if case.options.get("mask_scope") == "head":
            return None  # the frozen part of a head is removed as well; stock PEFT has no gradient of it
        stock = self.reference(case, model).train()
        torch.manual_seed(5)
        stock(**tiny.batch()).loss.backward()
        for name, heads in heads_off(case, model).items():
            layer = stock.get_base_model().get_submodule(name)
            for param in (*self.row_tensors(layer, "default"), *layer.lora_magnitude_vector.parameters()):
                param.grad[rows_of(case, heads)] = 0
        return {name: param.grad for name, param in stock.named_parameters() if param.requires_grad}

    def reference(self, case, model, adapter="default"):
        """Return stock PEFT with explicitly edited rows, `adapter` being active."""
        stock = self.stock(case, model)
        for each in model.peft_config:
            for name, heads in heads_off(case, model, each).items():
                self.edit(case, stock, each, name, rows_of(case, heads), base=each == adapter)
        stock.set_adapter(adapter)
        return stock.eval()

    def stock(self, case, model):
        """Return the same adapters as stock PEFT's, with the same values and without masks."""
        reference = None
        for adapter, ours in model.peft_config.items():
            options = {"target_modules": tiny.now(["q_proj", "v_proj"]), "modules_to_save": ["classifier"]}
            options |= {key: value for key, value in case.options.items() if key not in self.own_options}
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

    def edit(self, case, stock, adapter, name, rows, *, base=False):
        """Deactivate rows of one projection: they contribute nothing to the adapter or, if base=True, to the model."""
        layer = stock.get_base_model().get_submodule(name)
        for tensor in self.row_tensors(layer, adapter):
            tensor.data[rows] = 0
        if adapter in layer.lora_magnitude_vector:  # the magnitude of the frozen row alone
            norm = torch.linalg.norm(layer.base_layer.weight[rows], dim=1)
            layer.lora_magnitude_vector[adapter].weight.data[rows] = norm
        if base and case.options.get("mask_scope") == "head":
            layer.base_layer.weight.data[rows] = 0
            layer.base_layer.bias.data[rows] = 0

    @staticmethod
    def row_tensors(layer, adapter):
        """Return the parameters of a stock layer whose first dimension is that of the projection's rows."""
        lora_B = layer.lora_B[adapter]
        return [tensor for tensor in (lora_B.weight, lora_B.bias) if tensor is not None]


class KBitLora(HeadMaskedLora):
    """k-bit LoRA, compared with stock LoRA whose weights are those that the plain reference quantises."""

    def gradients(self, case, model):
        return None  # tests/tuners/head_masked_lora/test_k_bit.py has them

    def stock(self, case, model):
        stock = super().stock(case, model)
        for adapter, config in model.peft_config.items():
            if getattr(config, "adapter_bits", 32) == 32:
                continue
            for name, layer in stock.get_base_model().named_modules():
                if adapter in getattr(layer, "lora_A", {}):
                    layer.lora_A[adapter].weight.data = self.quantized(layer.lora_A[adapter].weight, config)
                    heads = heads_off(case, model, adapter).get(name, [])
                    rows = torch.ones(layer.out_features, dtype=torch.bool)
                    rows[rows_of(case, heads)] = False
                    quantized = self.quantized(layer.lora_B[adapter].weight, config, rows)
                    layer.lora_B[adapter].weight.data[rows] = quantized[rows]
        return stock

    @staticmethod
    def quantized(weight, config, rows=None):
        values = reference_values.quantized(
            weight.tolist(), config.adapter_bits, None if rows is None else rows.tolist()
        )
        return torch.tensor(values, dtype=weight.dtype)


class RLRR(Method):
    """RLRR, compared with a plain model whose weights are computed by the formulas (rlrr_reference.py)."""

    restores_exactly = True
    rounding = (1e-4, 3e-6)
    atol = 3e-6

    def __init__(self):
        super().__init__(RLRRConfig, "rlrr_")

    def logits(self, case, model, adapter="default"):
        base, weights = self._acting(case, model, self.tensors(model, adapter), adapter)
        with torch.no_grad():
            return torch.func.functional_call(base, weights, (tiny.images(),)).logits

    def gradients(self, case, model):
        leaves = {
            key: value.clone().requires_grad_(value.is_floating_point()) for key, value in self.tensors(model).items()
        }
        base, weights = self._acting(case, model, leaves, "default")
        torch.manual_seed(5)
        torch.func.functional_call(base.train(), weights, kwargs=tiny.batch()).loss.backward()
        return {
            name: leaves[self.key(name, "default")].grad for name, p in model.named_parameters() if p.requires_grad
        }

    def tensors(self, model, adapter="default"):
        """Return the adapter's tensors from the model's state dict, with the keys of a file."""
        return {
            self.key(key, adapter): value
            for key, value in model.state_dict().items()
            if f".{adapter}" in key and ("rlrr_" in key or "modules_to_save" in key)
        }

    @staticmethod
    def key(name, adapter):
        return name.replace(f".{adapter}", "").replace(".modules_to_save", "").removeprefix("base_model.model.")

    @staticmethod
    def _acting(case, model, tensors, adapter):
        base = tiny.make(case.backbone).eval()
        off = {name: rows_of(case, heads) for name, heads in heads_off(case, model, adapter).items()}
        variant = case.options.get("residual", True), case.options.get("rescale_weight", True)
        weights = rlrr_reference.acting(base.state_dict(), tensors, variant, off)
        # layers without biases get them
        for key in weights.keys() - base.state_dict().keys():
            if key.endswith(".bias"):
                base.get_submodule(key.removesuffix(".bias")).bias = torch.nn.Parameter(weights[key].detach())
        return base, weights


# A row


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a configuration, and the behaviours in which it differs from the others."""

    method: Method
    options: dict
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

    @property
    def is_masked(self):
        return bool(self.options.get("ne") or self.options.get("ratio"))

    def config(self):
        return self.method.config(**self.options)

    def varied(self, **options):
        """Return the same row with some options set."""
        return dataclasses.replace(self, options=self.options | options)


# The table


def eva(model):
    batches = [{"pixel_values": tiny.images(16, seed=seed)} for seed in range(3)]
    functions = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    directions = get_eva_state_dict(model, batches, show_progress_bar=False, **functions)
    # the tiny layers have similar inputs; this lets ranks differ, as in larger models
    directions = {
        name: rows[:2] if name.endswith(tiny.now("1.attention.v_proj")) else rows for name, rows in directions.items()
    }
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    assert model.peft_config["default"].rank_pattern == tiny.now({"vit.layers.1.attention.v_proj": 2})


HOTSWAP = frozenset({"hotswap"})  # with stock LoRA, PEFT 0.21's hot-swap goes wrong there as well
NO_MIXED_SWIN = {"mixed_batch": "Length of `adapter_names` should be the same as the number of inputs"}
REFUSED_BY_HEAD_SCOPE = {
    "save_as_lora": "do not support LoRA conversion",
    "add_weighted_adapter": "mask_scope='head' cannot be combined",
}
HEADLESS = ("these targets have no attention heads",)


def lora(options, **departures):
    """Make a row of head-masked LoRA; one head is deactivated unless the options say otherwise."""
    return Case(HeadMaskedLora(), ({} if "ratio" in options else {"ne": 1}) | options, **departures)


def k_bit(bits, *, refuses=None, **options):
    """Make a row with adapter_bits."""
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
        KBitLora(),
        {"ne": 1, "adapter_bits": bits, "r": 4, **options},
        exact=False,  # the reference's sums are in another order
        refuses=refuses,
        never=frozenset({"plain_lora_file"}),  # the file holds the weights behind the bits
        **own,
    )


def rlrr(options, **departures):
    """Make a row of RLRR, whose reference computes the weights in another way."""
    return Case(RLRR(), options, exact=False, **departures)


# One row for every method, and for each of its variants that computes in a way of its own
METHODS = {
    "plain": lora({}),
    "dora": lora(
        {"use_dora": True},
        never=HOTSWAP,
        exact=False,
        refuses={
            "mixed_batch": "Cannot pass `adapter_names` when DoRA is enabled",
            "add_weighted_adapter": "DoRA normalises the sum",
            "save_as_lora": "do not support LoRA conversion",  # of the delta weight alone, without the magnitude
        },
    ),
    "head scope": lora(
        {"mask_scope": "head"},
        refuses=REFUSED_BY_HEAD_SCOPE,
        never=frozenset({"plain_lora_file"}),
    ),
    "1 bit": k_bit(1),
    "rlrr": rlrr({}),
    "rlrr, masked": rlrr({"ne": 1}),
    "rlrr, no residual": rlrr(
        {"residual": False, "r": 2},
        refuses={
            "add_weighted_adapter": "all of it",
            "new_adapter": "head masks cannot be combined with residual=False",
        },
    ),
    "rlrr, masked, like LoRA": rlrr({"ne": 1, "rescale_weight": False, "init": "normal"}),
}
OPTIONS = {
    "swin": lora({}, backbone="swin", refuses=NO_MIXED_SWIN),
    "two heads": lora({"ne": 2}),
    "ratio": lora({"ratio": 0.5}, backbone="swin", refuses=NO_MIXED_SWIN),
    "per layer": lora({"granularity": "layer"}, differ="layer"),
    "separate q and v": lora({"joint": False}, differ="part"),
    "per layer, separate, swin": lora(
        {"granularity": "layer", "joint": False}, backbone="swin", differ="layer part", refuses=NO_MIXED_SWIN
    ),
    "rslora": lora({"use_rslora": True, "r": 3, "lora_alpha": 5}),
    "lora_bias": lora(
        {"lora_bias": True},
        refuses={"save_as_lora": "do not support LoRA conversion"},  # of the delta weight alone, without the bias
    ),
    "rank_pattern": lora({"rank_pattern": tiny.now({"q_proj": 4, "layers.1.attention.v_proj": 2})}, never=HOTSWAP),
    "alpha_pattern": lora(
        {"alpha_pattern": tiny.now({"v_proj": 3}), "rank_pattern": tiny.now({r"layers\.0\..*": 5})}, never=HOTSWAP
    ),
    "dropout": lora({"lora_dropout": 0.3}),
    "gaussian": lora({"init_lora_weights": "gaussian"}),
    "orthogonal": lora({"init_lora_weights": "orthogonal"}),
    "no initialisation": lora({"init_lora_weights": False}),
    "eva": lora(
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
    "layers_to_transform": lora(
        {"layers_to_transform": [1]}, masked=tiny.now(r"layers\.1\.attention\.(q_proj|v_proj)")
    ),
    "exclude_modules": lora(
        {"exclude_modules": tiny.now(["layers.0.attention.q_proj"])},
        masked=tiny.now(r"(layers\.1\.attention\.q_proj|v_proj)"),
        warns=("Found missing adapter keys",),  # save_as_lora does not pass the option on
    ),
    "regular expression": lora(
        {"target_modules": tiny.now(r".*\.0\.attention\.(k_proj|v_proj)")},
        masked=tiny.now(r"0\.attention\.(k_proj|v_proj)"),
    ),
    "all-linear": lora(
        {"target_modules": "all-linear", "r": 3}, masked=tiny.now(r"(q_proj|k_proj|v_proj)"), warns=HEADLESS
    ),
    "convolution": lora(
        {"target_modules": tiny.now(["q_proj", "fc1", "projection"])},
        masked=tiny.now(r"q_proj"),
        warns=HEADLESS,
        refuses={"save_as_lora": "do not support LoRA conversion"},  # PEFT converts only linear layers
    ),
    "num_heads": lora({"num_heads": 6}),
    "fan_in_fan_out": lora({"fan_in_fan_out": True}, warns=("fan_in_fan_out is set to True",)),
    "velora": lora({"velora_config": VeloraConfig(num_groups=4)}, never=HOTSWAP),
    "2 bit, per layer": k_bit(2, granularity="layer", use_rslora=True, differ="layer"),
    "4 bit, head scope": k_bit(4, mask_scope="head"),
    "8 bit, swin": k_bit(8, lora_dropout=0.2, bottleneck_dropout=0.1, backbone="swin", refuses=NO_MIXED_SWIN),
    "1 bit, lora_bias": k_bit(1, lora_bias=True, refuses={"save_as_lora": "do not support LoRA conversion"}),
    "1 bit, no heads too": k_bit(
        1, target_modules="all-linear", masked=tiny.now(r"(q_proj|k_proj|v_proj)"), warns=HEADLESS
    ),
    "bottleneck_dropout": lora(
        {"bottleneck_dropout": 0.3}, never=frozenset({"gradients"})
    ),  # stock LoRA has none there
    "monteclora": lora(
        {"monteclora_config": MontecloraConfig(num_samples=2)},
        never=frozenset({"gradient_checkpointing"}),  # its random numbers are not replayed, in stock LoRA either
    ),
    "rlrr, swin": rlrr({}, backbone="swin", refuses=NO_MIXED_SWIN),
    "rlrr, rank 3": rlrr({"r": 3, "init": "normal"}),
    "rlrr, left only": rlrr({"right": False}),
    "rlrr, right only": rlrr({"left": False, "init": "uniform"}),
    "rlrr, left only, no residual": rlrr(
        {"residual": False, "right": False, "init": "constant"}, refuses={"add_weighted_adapter": "all of it"}
    ),
    "rlrr, like LoRA": rlrr({"rescale_weight": False, "r": 2, "init": "zero"}),
    "rlrr, matrices alone": rlrr({"norms": False, "patch_embedding": False}),
    "rlrr, no shift": rlrr({"exclude_modules": tiny.now(["k_proj"]), "shift_without_bias": False}),
    "rlrr, a block": rlrr({"layers_to_transform": [1]}),
    "rlrr, regular expression": rlrr(
        {"target_modules": tiny.now(r".*\.0\..*(v_proj|fc1|layernorm_after)|.*projection")}
    ),
    "rlrr, masked, rank 2": rlrr({"ne": 2, "r": 2, "init": "normal", "granularity": "layer"}),
    "rlrr, masked, swin": rlrr({"ratio": 0.5, "joint": False}, backbone="swin", refuses=NO_MIXED_SWIN),
}
CASES = METHODS | OPTIONS
# Rows that CI alone asks, so that the default run stays under ten minutes: each differs from a row that it asks always by
# its initialisation, its targets or its number of bits.
SLOW = (
    "8 bit, swin",
    "4 bit, head scope",
    "1 bit, lora_bias",
    "two heads",
    "ratio",
    "rslora",
    "alpha_pattern",
    "dropout",
    "gaussian",
    "orthogonal",
    "no initialisation",
    "exclude_modules",
    "regular expression",
    "num_heads",
    "fan_in_fan_out",
    "velora",
    "monteclora",
    "rlrr, rank 3",
    "rlrr, right only",
    "rlrr, left only, no residual",
    "rlrr, matrices alone",
    "rlrr, no shift",
    "rlrr, a block",
    "rlrr, regular expression",
    "rlrr, masked, swin",
)


def rows_of_method(*methods):
    """Return the rows of some methods, given by the classes of their references."""
    return {name: case for name, case in CASES.items() if isinstance(case.method, methods)}


def behaviour(rows):
    """Run a test on every row; for a row that refuses, test the refusal."""

    def decorate(test):
        name = test.__name__.removeprefix("test_")

        @pytest.mark.parametrize(
            "case",
            [
                pytest.param(c, id=i, marks=[pytest.mark.slow] if i in SLOW else [])
                for i, c in rows.items()
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

    return decorate


# Helpers of the behaviours


def create(case, *adapters, seed=0):
    """Make a model with adapters that have an effect, each with other heads deactivated; "default" is active."""
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


@functools.cache
def num_rows(backbone):
    """Return `{name of a linear layer: number of its rows}` of the untouched model."""
    return {name: m.out_features for name, m in tiny.make(backbone).named_modules() if hasattr(m, "out_features")}


def projections(case):
    """Return the names of the projections that must carry a mask, from the untouched model."""
    pattern = re.compile(rf"(.*\.)?{case.masked}")
    return [name for name in num_rows(case.backbone) if pattern.fullmatch(name)] if case.is_masked else []


def deactivated(case, seed=0):
    """Return `{projection: indices of deactivated heads}`: one head each, which depends on the seed."""
    result = {}
    for index, name in enumerate(projections(case)):
        head = 1 + seed
        head += index // 2 if "layer" in case.differ else 0
        head += tiny.now("v_proj") in name if "part" in case.differ else 0
        result[name] = [head % (num_rows(case.backbone)[name] // HEAD_DIM[case.backbone])]
    return result


def deactivate(case, model, adapter="default", seed=0):
    if not case.is_masked:
        return
    masks = get_head_masks(model, adapter)
    for name, heads in deactivated(case, seed).items():
        masks[name][:] = True
        masks[name][heads] = False
    set_head_masks(model, masks, adapter)
    for mask in masks.values():  # the argument belongs to the caller
        mask.logical_not_()


def rows_of(case, heads):
    """Return the indices of the output rows that belong to the heads."""
    size = HEAD_DIM[case.backbone]
    return [row for head in heads for row in range(head * size, (head + 1) * size)]


def heads_off(case, model, adapter="default"):
    """Return `{projection: indices of deactivated heads}`, from the masks."""
    masks = get_head_masks(model, adapter) if case.is_masked else {}
    return {name: [head for head, active in enumerate(mask.tolist()) if not active] for name, mask in masks.items()}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(tiny.images(), **kwargs).logits


def assert_same(case, actual, expected):
    """Compare bit for bit if the reference computes the same numbers in the same order."""
    rtol, atol = (0, 0) if case.exact else case.method.rounding
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_close(case, actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=case.method.atol)


def assert_heads_are_off(case, model, adapter="default"):
    """Check that exactly the rows of deactivated heads equal those of the frozen projection."""
    off = heads_off(case, model, adapter)
    assert len(off) == len(projections(case))
    for name, heads in off.items():
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
