"""PEFT's features with RLRR: one table of cases, and every behaviour asked of each of them.

The reference (rlrr_reference.py) is a plain model whose weights are computed by the formulas, with the rows of
deactivated heads named by explicit indices.
"""

import copy
import dataclasses
import functools
import pickle
import re
import warnings
from contextlib import nullcontext

import pytest
import rlrr_reference
import tiny
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from peft_heads import HeadScorer, RLRRConfig, get_head_masks, set_head_masks


HEAD_DIM = {"vit": 4, "swin": 6}


@dataclasses.dataclass(frozen=True)
class Case:
    options: dict
    backbone: str = "vit"
    refuses: dict = dataclasses.field(default_factory=dict)
    """{behaviour: text of the error that says why not}"""

    @property
    def is_masked(self):
        return bool(self.options.get("ne") or self.options.get("ratio"))

    @property
    def variant(self):
        return self.options.get("residual", True), self.options.get("rescale_weight", True)

    def config(self):
        return RLRRConfig(**self.options)

    def varied(self, **options):
        return dataclasses.replace(self, options=self.options | options)


NO_MIXED_SWIN = {"mixed_batch": "Length of `adapter_names` should be the same as the number of inputs"}
CASES = {
    "plain": Case({}),
    "swin": Case({}, backbone="swin", refuses=NO_MIXED_SWIN),
    "rank 3": Case({"r": 3, "init": "normal"}),
    "left only": Case({"right": False}),
    "right only": Case({"left": False, "init": "uniform"}),
    "no residual": Case({"residual": False, "r": 2}, refuses={"add_weighted_adapter": "all of it"}),
    "left only, no residual": Case(
        {"residual": False, "right": False, "init": "constant"}, refuses={"add_weighted_adapter": "all of it"}
    ),
    "like LoRA": Case({"rescale_weight": False, "r": 2, "init": "zero"}),
    "matrices alone": Case({"norms": False, "patch_embedding": False}),
    "no shift": Case({"exclude_modules": tiny.now(["k_proj"]), "shift_without_bias": False}),
    "a block": Case({"layers_to_transform": [1]}),
    "regular expression": Case({"target_modules": tiny.now(r".*\.0\..*(v_proj|fc1|layernorm_after)|.*projection")}),
    "masked": Case({"ne": 1}),
    "masked, rank 2": Case({"ne": 2, "r": 2, "init": "normal", "granularity": "layer"}),
    "masked, swin": Case({"ratio": 0.5, "joint": False}, backbone="swin", refuses=NO_MIXED_SWIN),
    "masked, like LoRA": Case({"ne": 1, "rescale_weight": False, "init": "normal"}),
}


def behaviour(test):
    """Run a test on every row of the table; where a row refuses, the refusal is what is tested."""
    name = test.__name__.removeprefix("test_")

    @pytest.mark.parametrize("case", [pytest.param(case, id=key) for key, case in CASES.items()])
    @functools.wraps(test)
    def on_case(case, **fixtures):
        refusal = case.refuses.get(name)
        with pytest.raises(ValueError, match=re.escape(refusal)) if refusal else nullcontext():
            test(case=case, **fixtures)

    return on_case


# What the behaviours are made of


def create(case, *adapters, seed=0):
    """A model with adapters that have values, each with heads of its own deactivated; "default" is active."""
    adapters = adapters or ("default",)
    model = get_peft_model(tiny.make(case.backbone), case.config(), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, case.config())
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "rlrr_" in name:
            param.data += 0.2 * torch.randn(param.shape, generator=generator)
    for index, adapter in enumerate(adapters):
        deactivate(case, model, adapter, seed + index)
    return model.eval()


def deactivate(case, model, adapter="default", seed=0):
    if case.is_masked:
        masks = get_head_masks(model, adapter)
        for mask in masks.values():
            mask[:] = True
            mask[(1 + seed) % len(mask)] = False
        set_head_masks(model, masks, adapter)


def rows_off(case, model, adapter="default"):
    """`{projection: rows of deactivated heads}`, from the masks."""
    if not case.is_masked:
        return {}
    size, rows = HEAD_DIM[case.backbone], {}
    for name, mask in get_head_masks(model, adapter).items():
        rows[name] = [h * size + i for h, active in enumerate(mask.tolist()) if not active for i in range(size)]
    return rows


def tensors(model, adapter="default"):
    """The adapter's tensors, keys as of a file, taken from the model's state dict."""
    found = {}
    for key, value in model.state_dict().items():
        if f".{adapter}" in key and ("rlrr_" in key or "modules_to_save" in key):
            key = key.replace(f".{adapter}", "").replace(".modules_to_save", "").removeprefix("base_model.model.")
            found[key] = value
    return found


def expected_logits(case, model, adapter="default"):
    base = tiny.make(case.backbone).eval()
    off = rows_off(case, model, adapter)
    weights = rlrr_reference.acting(base.state_dict(), tensors(model, adapter), case.variant, off)
    # biases that the layers have not are given to them
    for key in weights.keys() - base.state_dict().keys():
        if key.endswith(".bias"):
            base.get_submodule(key.removesuffix(".bias")).bias = torch.nn.Parameter(weights[key])
    with torch.no_grad():
        return torch.func.functional_call(base, weights, (tiny.images(),)).logits


def logits(model, **kwargs):
    with torch.no_grad():
        return model(tiny.images(), **kwargs).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-6)


# The behaviours


@behaviour
def test_forward(case):
    model = create(case)
    assert_close(logits(model), expected_logits(case, model))
    assert (logits(model) - logits(tiny.make(case.backbone).eval())).abs().max() > 1e-3
    for name, rows in rows_off(case, model).items():
        layer = model.get_base_model().get_submodule(name)
        x = torch.randn(2, 5, layer.in_features)
        with torch.no_grad():
            adapted, frozen = layer(x), layer.base_layer(x)
        assert rows and torch.equal(adapted[..., rows], frozen[..., rows])
        active = [row for row in range(layer.out_features) if row not in rows]
        assert (adapted != frozen)[..., active].any(dim=-1).all()


@behaviour
def test_gradients(case):
    model = create(case)
    model(**tiny.batch()).loss.backward()
    base = tiny.make(case.backbone).eval()
    leaves = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in tensors(model).items()}
    weights = rlrr_reference.acting(base.state_dict(), leaves, case.variant, rows_off(case, model))
    torch.func.functional_call(base, weights, kwargs=tiny.batch()).loss.backward()
    grads = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            name = name.replace(".default", "").replace(".modules_to_save", "").removeprefix("base_model.model.")
            grads[name] = param.grad
    assert grads.keys() == {key for key, leaf in leaves.items() if leaf.requires_grad}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, leaves[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@behaviour
def test_training(case, tmp_path):
    """Selected by score where heads are deactivated, then trained on, and saved."""
    model = get_peft_model(tiny.make(case.backbone), case.config())
    optimizer = None
    if case.is_masked:
        scorer = HeadScorer(model)
        optimizer = tiny.train(model, steps=2, after_backward=scorer.update)
        scorer.apply(optimizer)
    off = rows_off(case, model)
    before = copy.deepcopy(model.state_dict())
    tiny.train(model, steps=3, optimizer=optimizer, seed=50)
    model.eval()
    assert rows_off(case, model) == off and all(rows for rows in off.values())
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, name  # what is frozen has stayed
    for name, rows in off.items():
        layer = model.get_base_model().get_submodule(name)
        for param in layer.head_parameters("default"):
            assert param[rows].count_nonzero() == 0 and param.count_nonzero() > 0
        assert layer.get_delta_weight("default")[rows].count_nonzero() == 0
    assert_close(logits(model), expected_logits(case, model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.make(case.backbone), tmp_path)), logits(model))


@behaviour
def test_save_and_load(case, tmp_path):
    model = create(case)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny.make(case.backbone), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert rows_off(case, loaded) == rows_off(case, model)
    assert type(PeftConfig.from_pretrained(tmp_path)) is RLRRConfig


@behaviour
def test_load_under_another_name(case, tmp_path):
    source = create(case)
    source.save_pretrained(tmp_path)
    model = create(case, seed=1)
    before = logits(model)
    assert not model.load_adapter(tmp_path, "loaded").missing_keys
    assert torch.equal(logits(model), before)
    model.set_adapter("loaded")
    assert torch.equal(logits(model.eval()), logits(source))


@behaviour
def test_merge_and_unmerge(case):
    for safe_merge in (False, True):
        model = create(case)
        expected = logits(model)
        before = copy.deepcopy(model.state_dict())
        model.merge_adapter(safe_merge=safe_merge)
        assert_close(logits(model), expected)
        for name, rows in rows_off(case, model).items():
            for part in ("weight", "bias"):
                key = f"base_model.model.{name}.base_layer.{part}"
                assert torch.equal(model.state_dict()[key][rows], before[key][rows])
        model.unmerge_adapter()
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # bit for bit
        assert torch.equal(logits(model), expected)


@behaviour
def test_merge_two_adapters(case):
    """Together they add up their changes, in whatever order they are merged."""
    model = create(case.varied(modules_to_save=[]), "default", "other")
    before = copy.deepcopy(model.state_dict())
    merged = []
    for order in (["default", "other"], ["other", "default"]):
        model.merge_adapter(order[:1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already following adapters were merged")
            model.merge_adapter(order)
        merged.append(logits(model))
        model.unmerge_adapter()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(*merged)
    model.base_model.set_adapter(["default", "other"])
    assert_close(logits(model.eval()), merged[0])


@behaviour
def test_merge_and_unload(case, tmp_path):
    model = create(case)
    expected = expected_logits(case, model)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == tiny.make(case.backbone).state_dict().keys()
    assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))


@behaviour
def test_unload_and_disable(case):
    model = create(case)
    base, expected = tiny.make(case.backbone).eval(), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert_close(logits(model), expected)
    unloaded = model.unload().state_dict()
    for name, tensor in base.state_dict().items():
        assert name.startswith("classifier") or torch.equal(tensor, unloaded[name])


@behaviour
def test_switch_and_delete(case):
    model = create(case, "default", "other")
    expected = {adapter: expected_logits(case, model, adapter) for adapter in ("default", "other")}
    assert (expected["default"] - expected["other"]).abs().max() > 1e-3
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        assert_close(logits(model.eval()), expected[adapter])
        assert all(adapter in n for n, p in model.named_parameters() if p.requires_grad)
    model.delete_adapter("other")
    assert_close(logits(model), expected["default"])
    assert not any("other" in name for name in model.state_dict())
    model.add_adapter("other", case.config())
    assert_close(logits(model.eval()), expected["default"])


@behaviour
def test_mixed_batch(case):
    model = create(case, "default", "other")
    expected = {adapter: expected_logits(case, model, adapter) for adapter in ("default", "other")}
    with model.disable_adapter():
        expected["__base__"] = logits(model)
    names = ["other", "__base__", "default", "other"]
    before = logits(model)
    mixed = logits(model, adapter_names=names)
    assert torch.equal(logits(model), before)  # nothing of it stays
    for index, name in enumerate(names):
        assert_close(mixed[index], expected[name][index])


@behaviour
def test_copy_pickle_and_state_dict(case):
    model, expected = create(case), None
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
    other = create(case, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)
    assert rows_off(case, other) == rows_off(case, model)


@behaviour
def test_half_precision(case):
    """Factors in full precision on a model in half, as PEFT makes them, and all in half."""
    half = tiny.make(case.backbone).to(torch.bfloat16)
    model = get_peft_model(half, case.config())
    assert {p.dtype for n, p in model.named_parameters() if "rlrr_" in n} == {torch.float32}
    with torch.no_grad():
        for each in (model, model.to(torch.bfloat16)):
            out = each(tiny.images().to(torch.bfloat16)).logits
            assert out.dtype == torch.bfloat16
            each.merge_adapter()
            torch.testing.assert_close(each(tiny.images().to(torch.bfloat16)).logits, out, rtol=0.05, atol=0.05)
            each.unmerge_adapter()


@behaviour
def test_autocast(case):
    model = create(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**tiny.batch()).loss
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    other = create(case)
    other(**tiny.batch()).loss.backward()
    for name, param in other.named_parameters():
        if param.requires_grad:
            assert grads[name].dtype == torch.float32
            assert (grads[name] - param.grad).norm() <= 0.1 * param.grad.norm() + 1e-4, name


@behaviour
def test_gradient_checkpointing(case):
    model = create(case)
    other = copy.deepcopy(model)
    base = other.get_base_model()
    if hasattr(base, "activation_checkpointing_enable"):  # transformers renames it in v6
        base.activation_checkpointing_enable()
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, other):
        torch.manual_seed(5)  # drop path
        each.train()(**tiny.batch()).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


@behaviour
def test_inject(case):
    """`inject_adapter_in_model`: without a PeftModel around it."""
    source = create(case)
    config = copy.deepcopy(source.peft_config["default"])
    keys = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(source).items()}
    for low_cpu_mem_usage in (False, True):
        model = inject_adapter_in_model(config, tiny.make(case.backbone), low_cpu_mem_usage=low_cpu_mem_usage)
        assert not set_peft_model_state_dict(model, keys, low_cpu_mem_usage=low_cpu_mem_usage).unexpected_keys
        assert torch.equal(logits(model.eval()), logits(source))


@behaviour
def test_add_weighted_adapter(case):
    """Every factor by itself, as the paper has it; a head is active in the sum where it is in any summand."""
    case = case.varied(modules_to_save=[])
    model = create(case, "default", "other")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum")
    off = {adapter: rows_off(case, model, adapter) for adapter in ("default", "other", "sum")}
    summed = tensors(model, "sum")
    for key, value in summed.items():
        if value.dtype == torch.bool:
            continue
        a, b = (tensors(model, adapter)[key].clone() for adapter in ("default", "other"))
        name = key.rpartition(".rlrr_")[0]
        if "_left" in key or "_shift" in key:
            a[off["default"].get(name, [])], b[off["other"].get(name, [])] = 0, 0
        expected = 0.7 * a + 0.4 * b
        assert_close(value, expected)
    for name, rows in off["sum"].items():
        assert set(rows) == set(off["default"][name]) & set(off["other"][name])
    before = logits(model)
    model.set_adapter("sum")
    assert_close(logits(model.eval()), expected_logits(case, model, "sum"))
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), before)
