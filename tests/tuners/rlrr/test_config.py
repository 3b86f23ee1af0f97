import copy
import itertools
import pickle
import re

import pytest
import tiny
import torch
from backbones import FusedViT
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, RLRRModel
from peft_heads.functional.rescaling import Rescaling


def test_defaults():
    config = RLRRConfig()
    assert (config.r, config.left, config.right, config.norms, config.patch_embedding) == (1, True, True, True, True)
    assert config.variant == Rescaling(residual=True, rescale_weight=True)
    assert (config.init, config.ne, config.ratio, config.masks_heads) == ("kaiming", 0, None, False)
    assert RLRRConfig(ratio=0.25).ne is None and RLRRConfig(ratio=0.25).masks_heads


def test_registered():
    config = RLRRConfig()
    assert config.peft_type == "RLRR"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type] is RLRRConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type] is RLRRModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] == "rlrr_"
    assert isinstance(PeftConfig.from_peft_type(peft_type="RLRR", r=2), RLRRConfig)


def test_round_trip(tmp_path):
    config = RLRRConfig(
        r=3, norms=False, patch_embedding=False, init="zero", shift_without_bias=False, ratio=0.25, joint=False,
        granularity="layer", criterion="negative", mask_seed=4, num_heads=tiny.now({"q_proj": 3}),
        target_modules=tiny.now(["q_proj", "fc1"]), exclude_modules=["0"], layers_to_transform=[1],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == RLRRConfig.from_pretrained(tmp_path) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "rank of the factors, an integer of at least 1; got 0"),
        ({"r": 2.0}, "at least 1; got 2.0"),
        ({"r": True}, "at least 1; got True"),
        ({"init": "gaussian"}, "init must be one of kaiming, normal, zero, constant, uniform; got 'gaussian'"),
        ({"left": False, "right": False}, "nothing is left that rescales"),
        ({"residual": False, "rescale_weight": False}, "nothing of the pre-trained weight would be left"),
        (
            {"left": False, "rescale_weight": False},
            "left=False with rescale_weight=False: LoRA's update is the product",
        ),
        ({"right": False, "r": 2}, "right=False with r=2: one factor alone has rank 1"),
        ({"init": "constant", "r": 2}, "init='constant' with r=2: .* keep rank 1"),
        ({"residual": False, "init": "zero"}, "training would begin with zero weights"),
        ({"ne": 1, "residual": False}, "head masks cannot be combined with residual=False"),
        ({"ne": 1, "left": False}, "head masks cannot be combined with left=False"),
        ({"ne": -1}, "at least 0; got -1"),
        ({"ne": 1, "ratio": 0.5}, "not both"),
        ({"criterion": "best"}, "criterion must be one of"),
        ({"granularity": "block"}, "granularity must be one of global, layer; got 'block'"),
        ({"num_heads": 0}, "num_heads must be a positive integer"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "cannot be combined with a regular expression"),
        ({"layers_pattern": "layers"}, "goes with layers_to_transform"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RLRRConfig(**arguments)


# Targets


class Int8Linear(nn.Linear):
    """A subclass of nn.Linear whose weight is not floating-point, as in bitsandbytes."""


def a_model():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 4),
            "batch_norm": nn.BatchNorm2d(4),
            "without_affine": nn.LayerNorm(4, elementwise_affine=False),
            "without_bias": nn.LayerNorm(4, bias=False),
            "quantized": Int8Linear(4, 4),
            "one_dimensional": nn.Conv1d(4, 4, 1),
            "good": nn.Linear(4, 4),
        }
    ).eval()


@pytest.mark.filterwarnings("ignore:.* has batch norms")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "embedding",
            r"embedding is a Embedding, for which RLRR is not defined (expected torch.nn.Linear, torch.nn.Conv2d or",
        ),
        ("batch_norm", "batch_norm is a BatchNorm2d"),
        ("without_affine", "is a LayerNorm without weight and bias (expected both)"),
        ("without_bias", "is a LayerNorm without bias (expected both)"),
        (
            "quantized",
            "quantized is a Int8Linear, which may use its weight in a way of its own (expected torch.nn.Linear itself); if it ",
        ),
        ("one_dimensional", "is a Conv1d, for which RLRR is not defined"),
    ],
)
def test_wrong_targets(name, message):
    model = a_model()
    before = str(model)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        get_peft_model(model, RLRRConfig(target_modules=["good", name]))
    assert f"exclude_modules=['{name}']" in str(error.value)
    assert str(model) == before
    get_peft_model(model, RLRRConfig(target_modules=["good", name], exclude_modules=[name]))


def test_integer_weights():
    model = a_model()
    model["good"].weight = nn.Parameter(model["good"].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="good is a Linear with a Tensor of torch.int8 for a weight"):
        get_peft_model(model, RLRRConfig(target_modules=["good"]))


def test_a_norm_of_another_kind_in_a_block():
    vit = FusedViT((6, 6))
    vit.blocks[1].norm = nn.RMSNorm(24)
    with pytest.raises(ValueError, match=r"blocks.1.norm is a RMSNorm.*\(expected .*LayerNorm\).*or pass norms=False"):
        get_peft_model(vit, RLRRConfig())
    get_peft_model(vit, RLRRConfig(norms=False))


def test_no_backbone():
    with pytest.raises(ValueError, match="was recognised in Sequential. Its linear layers: none. Name the modules"):
        get_peft_model(nn.Sequential(nn.Embedding(2, 2)), RLRRConfig())


def test_no_heads():
    with pytest.raises(ValueError, match="no target has attention heads.*pass ne=0 for plain RLRR"):
        get_peft_model(tiny.make("vit"), RLRRConfig(ne=1, target_modules=tiny.now(["fc1"])))


def test_the_patch_embedding_as_a_convolution():
    """If it is named while patch_embedding is off, it is rescaled; a later adapter must agree."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig(target_modules=["projection"], patch_embedding=False))
    layer = model.get_base_model().get_submodule("vit.embeddings.patch_embeddings.projection")
    assert type(layer).__name__ == "RLRRConv2d"
    assert layer.rlrr_left["default"].shape == (24 * 4, 1) and layer.rlrr_right["default"].shape == (1, 3 * 4)
    with pytest.raises(ValueError, match="projection is a RLRRConv2d of an earlier adapter.*same patch_embedding"):
        model.add_adapter("other", RLRRConfig(target_modules=["projection"]))


def test_layers_to_transform():
    """Modules outside the blocks are not adapted then."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig(layers_to_transform=[1]))
    modules = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "rlrr_left")]
    assert len(modules) == 6 + 2 and all(name.startswith(tiny.now("vit.layers.1.")) for name in modules)
    with pytest.raises(
        ValueError, match=r"layers_to_transform=\[7\]: no block of ViT\w+ has such a number; it has vit"
    ):
        get_peft_model(tiny.make("vit"), RLRRConfig(layers_to_transform=[7]))


@pytest.mark.parametrize("config_class", [RLRRConfig, HeadMaskedLoraConfig])
def test_a_configuration_that_serves_a_second_model(config_class):
    """What was chosen for the first model is chosen again for the second; what the user gave is kept."""
    config = config_class()
    for make in (lambda: tiny.make("vit"), FusedViT, lambda: tiny.make("vit")):
        model, fresh = get_peft_model(make(), config), get_peft_model(make(), config_class())
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    given = config_class(target_modules=tiny.now(["q_proj"]), modules_to_save=[])
    for _ in range(2):
        get_peft_model(tiny.make("vit"), given)
    assert given.target_modules == set(tiny.now(["q_proj"])) and given.modules_to_save == []


# Initialisation


@pytest.mark.parametrize(
    ("init", "r"), [("constant", 1), *itertools.product(["kaiming", "normal", "zero", "uniform"], [1, 4])]
)
def test_initialisation(init, r):
    model = get_peft_model(tiny.make("vit"), RLRRConfig(init=init, r=r))
    params = {n: p for n, p in model.named_parameters() if ".fc2." in n or "intermediate" in n or "layernorm" in n}
    left = torch.cat([p.flatten() for n, p in params.items() if "left" in n])
    right = torch.cat([p.flatten() for n, p in params.items() if "right" in n])
    columns = next(p.shape[1] for n, p in params.items() if "right" in n)
    shifts = torch.cat([p.flatten() for n, p in params.items() if "shift" in n and "norm" not in n])
    assert not shifts.any()
    gamma = 1 + torch.cat([p.flatten() for n, p in params.items() if "scale" in n])
    beta = torch.cat([p.flatten() for n, p in params.items() if "shift" in n and "norm" in n])
    if init == "zero":
        assert not left.any() and right.any() and (gamma == 1).all() and not beta.any()
    else:
        assert abs(gamma.mean() - 1) < 0.01 and 0.01 < gamma.std() < 0.03
        assert abs(beta.mean()) < 0.01 and 0.01 < beta.std() < 0.03
    if init in ("kaiming", "zero"):  # bound sqrt(6 / fan-in), fan-in r of (out, r), in of (r, in)
        bound = (6 / columns) ** 0.5
        assert 0.7 * bound < right.abs().max() <= bound
    if init == "kaiming":
        assert 0.8 * (6 / r) ** 0.5 < left.abs().max() <= (6 / r) ** 0.5
    if init == "normal":
        assert 0.01 < left.std() < 0.03 and left.abs().max() > 0.03
    if init == "constant":
        assert (left == 0.02).all() and (right == 0.02).all()
    if init == "uniform":
        assert 0.015 < left.abs().max() <= 0.02


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.images()).logits


@pytest.mark.parametrize(
    ("options", "identity"),
    [
        ({}, False),
        ({"init": "zero"}, True),
        ({"init": "zero", "left": False}, True),
        ({"init": "zero", "rescale_weight": False, "r": 4}, True),
        ({"init": "constant", "residual": False, "norms": False, "patch_embedding": False}, True),
    ],
    ids=str,
)
def test_which_initialisation_begins_with_the_model(options, identity):
    base = logits(tiny.make("vit"))
    actual = logits(get_peft_model(tiny.make("vit"), RLRRConfig(**options)))
    assert torch.allclose(actual, base, atol=1e-6) == identity


def test_zero_can_be_trained():
    """One factor has a gradient at the start, and then the other."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig(init="zero"))
    before = {name: param.clone() for name, param in model.named_parameters() if "rlrr_" in name}
    tiny.train(model, steps=2)
    for name, param in model.named_parameters():
        assert "rlrr_" not in name or not torch.equal(param, before[name]), name
