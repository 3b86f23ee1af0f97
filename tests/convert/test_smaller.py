"""Models without their deactivated heads and neurons, compared with models in which these are silent."""

import re

import backbones
import pytest
import silenced
import tiny
import torch
import transformers
from silenced import BOTH, HAS_BIAS, IMAGES, NEURONS_ALONE, OLD, logits, make, silence_heads, silence_neurons
from transformers import AutoModelForImageClassification

from peft_heads.backbones.units import count_units
from peft_heads.convert.smaller import prune, prune_heads


HEADS = {0: [1, 2], 1: [0, 3], 2: [4, 5], 3: [2, 5]}
same = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("name", [name for name in (*BOTH, *NEURONS_ALONE) if not (OLD and name in HAS_BIAS)])
def test_heads_and_neurons_go(name, tmp_path):
    """Which ones differs from layer to layer; the reloaded model has the logits of the masked one."""
    model = make(name)
    before, whole = count_units(model), logits(model)
    head_masks = {} if name in NEURONS_ALONE else silence_heads(model, HEADS)
    neuron_masks = silence_neurons(model, silenced.neurons_off(name))
    expected = logits(model)
    assert (whole - expected).norm() > 0.05 * expected.norm()  # they were not idle before
    small = prune(model, head_masks, neuron_masks)
    assert not small.training and all(param.requires_grad for param in small.parameters())
    small.save_pretrained(tmp_path)
    pruned, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(pruned) is type(model) and not any(info.values())
    torch.testing.assert_close(logits(pruned.eval()), expected, **same)
    units = count_units(pruned)
    assert units.num_neurons == before.num_neurons - silenced.neurons_off(name)
    assert (units.num_heads, units.head_dim) == (6 if name in NEURONS_ALONE else 4, before.head_dim)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # the model itself is left alone
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}


@pytest.mark.parametrize("name", [name for name in BOTH if name in HAS_BIAS])
def test_neurons_go_where_heads_cannot(name):
    model = make(name)
    masks = silence_neurons(model, 7)
    torch.testing.assert_close(logits(prune(model, silence_heads(model, {}), masks)), logits(model), **same)


def test_half_precision():
    model = make("vit").to(torch.bfloat16)
    masks = silence_heads(model, {0: [1], 1: [2], 2: [0], 3: [5]})
    pruned = prune(model, masks, silence_neurons(model, 3))
    assert pruned.dtype == torch.bfloat16 and not pruned.training
    images = IMAGES.bfloat16()
    torch.testing.assert_close(pruned(images).logits, model(images).logits, rtol=0.05, atol=0.05)


@pytest.mark.skipif(OLD, reason="transformers 4.57 cannot run DINOv3 without data")
def test_buffers_follow():
    """Those that are in no state dict have the type of the whole model's (DINOv3's rotations)."""
    model = backbones.FAMILIES["dinov3"].make().eval().to(torch.bfloat16)
    small = prune(model, {}, silence_neurons(model, 7))
    types = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert types and {name: buffer.dtype for name, buffer in small.named_buffers()} == types


def test_pruning_again():
    """transformers 4.57 counts the heads in `pruned_heads` as they were at first: there neurons alone go again."""
    model = make("vit")
    once = prune(model, silence_heads(model, HEADS), silence_neurons(model, 4))
    heads = silence_heads(once, {} if OLD else {index: [index] for index in range(4)})
    neurons = silence_neurons(once, 4)
    twice = prune(once, heads, neurons)
    torch.testing.assert_close(logits(twice), logits(once), **same)
    assert count_units(twice).num_heads == (4 if OLD else 3) and count_units(twice).num_neurons == 8


def test_nothing_random_is_drawn():
    model = make("vit")
    masks = silence_neurons(model, 4)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    prune(model, {}, masks)
    assert torch.equal(torch.rand(1), expected)


# What is refused, with the reason


@pytest.mark.parametrize(
    ("off", "message"),
    [
        ({0: [1], 1: [1, 2], 2: [1], 3: [1]}, "2 in .*1.*value|2 in .*1.*v_proj"),
        ({0: [1]}, "at least one; found 1 in"),
        ({}, "at least one; found 0 in"),
        ({index: range(6) for index in range(4)}, "all heads are deactivated"),
    ],
)
def test_numbers_of_heads(off, message):
    model = make("vit")
    with pytest.raises(ValueError, match=message):
        prune_heads(model, silence_heads(model, off))


@pytest.fixture
def nothing_built(monkeypatch):
    def build(*args):
        raise AssertionError("a model is built")

    monkeypatch.setattr("peft_heads.backbones.prunable.build_empty", build)
    monkeypatch.setattr("peft_heads.convert.smaller.build_empty", build)


@pytest.mark.parametrize(
    ("off", "message"),
    [
        (
            {0: 4, 1: 5, 2: 4, 3: 4},
            tiny.now(r"neurons must be deactivated in the MLPs of all layers.*4 in .*0.*fc1, 5 in .*1.*fc1"),
        ),
        ({0: 4}, "found 4 in .* 0 in"),
        (dict.fromkeys(range(4), 16), "all neurons are deactivated"),
    ],
)
@pytest.mark.usefixtures("nothing_built")
def test_numbers_of_neurons(off, message):
    """Layers that differ are refused before anything is built."""
    model = make("vit")
    with pytest.raises(ValueError, match=message):
        prune(model, {}, silence_neurons(model, off))


@pytest.mark.usefixtures("nothing_built")
def test_masks_that_do_not_fit():
    model = make("vit")
    masks = silence_neurons(model, 4)
    first = next(iter(masks))
    with pytest.raises(ValueError, match=r"vit.pooler is not the first layer of an MLP; those are .*" + first):
        prune(model, {}, {**masks, "vit.pooler": torch.tensor([False])})
    for wrong in (torch.zeros(15, dtype=torch.bool), torch.zeros(16)):
        with pytest.raises(ValueError, match=rf"mask of {first} must be a bool tensor of shape \(16,\).*; got torch."):
            prune(model, {}, {**masks, first: wrong})
    with pytest.raises(ValueError, match="no head and no neuron is deactivated; use --to merged"):
        prune(model, silence_heads(model, {}), {name: torch.ones_like(mask) for name, mask in masks.items()})
    with pytest.raises(ValueError, match="at least one; found 0 in"):
        prune(model, {}, {})


@pytest.mark.parametrize("name", ["dinov2", "dinov2 with registers"])
def test_numbers_that_dinov2_can_say(name):
    """One and a half times the width is none of them."""
    model = make(name)
    masks = silence_neurons(model, 96 - 36)
    with pytest.raises(
        ValueError, match=r"cannot say 36 of 96 neurons \(mlp_ratio\); it can say 72, 48, 24; .*merged"
    ):
        prune(model, {}, masks)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_gated_neurons(kind):
    config = getattr(transformers, f"{kind}Config")(**backbones.VIT, num_labels=3, use_swiglu_ffn=True)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    first = next(name for name, module in model.named_modules() if re.search(r"mlp\.(weights_in|gate_proj)$", name))
    with pytest.raises(ValueError, match=r"neurons cannot be removed from a Dinov2.*the MLP is gated \(SwiGLU\)"):
        prune(model, {}, {first: torch.zeros(1, dtype=torch.bool)})


@pytest.mark.parametrize("name", ["swin", "swinv2", "pvt v2", "segformer", "hiera"])
def test_layers_of_different_widths(name):
    model = make(name)
    with pytest.raises(ValueError, match="its layers have different numbers of neurons .*; use --to merged"):
        prune(model, {}, silence_neurons(model, 1))


@pytest.mark.parametrize("name", NEURONS_ALONE)
def test_two_towers_would_build_wider_heads(name):
    """Three of six heads of 4 rows is what they take for three heads of 8 rows."""
    model = make(name)
    masks = silence_heads(model, {index: [0, 2, 4] for index in range(4)})
    with pytest.raises(ValueError, match="with 3 heads of 4 rows .*VisionConfig does not heed them"):
        prune(model, masks, silence_neurons(model, 7))


def test_a_configuration_that_does_not_heed_head_dim():
    model = backbones.FAMILIES["dinov3"].make().eval()
    masks = silence_heads(model, {index: [1, 2, 3] for index in range(4)})
    with pytest.raises(ValueError, match="cannot build a DINOv3ViTModel with 3 heads of 4 rows .*not heed them"):
        prune_heads(model, masks)


def test_a_pooling_head_that_is_used():
    """The vision tower alone returns what its pooling head makes of the tokens."""
    model = backbones.FAMILIES["siglip vision"].make().eval()
    with pytest.raises(ValueError, match="vision_use_head=False: it has 1 outputs instead of 2"):
        prune(model, {}, silence_neurons(model, 7))


def test_a_masked_query_removes_no_head():
    model = make("vit")
    masks = silence_heads(model, {})
    names = tiny.now({f"vit.layers.{i}.attention.q_proj": torch.tensor([False] + [True] * 5) for i in range(4)})
    with pytest.raises(ValueError, match="at least one; found 0 in"):
        prune_heads(model, {**masks, **names})


def test_units_that_still_work():
    """The masks belong to a model into which the adapter was not merged."""
    model = make("vit")
    masks = {name: ~torch.eye(6)[0].bool() for name in silence_heads(model, {})}
    with pytest.raises(ValueError, match="its outputs differ by"):
        prune_heads(model, masks)
    masks = {name: torch.arange(16) < 8 for name in silence_neurons(model, 0)}
    with pytest.raises(ValueError, match="intermediate_size=8: its outputs differ by"):
        prune(model, {}, masks)
