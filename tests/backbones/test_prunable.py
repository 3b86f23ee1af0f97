"""Numbers of heads and neurons that a configuration can say, and what the installed transformers makes of others."""

import backbones
import pytest
import silenced
import torch
import transformers
from peft import LoraConfig, get_peft_model
from silenced import BOTH, HAS_BIAS, NEURONS_ALONE, OLD

from peft_heads.backbones.blocks import find_blocks
from peft_heads.backbones.prunable import prunable
from peft_heads.backbones.units import count_units


ANY_NUMBER = tuple(range(16, 0, -1))
MULTIPLES = (96, 72, 48, 24)  # of the width, by an integer mlp_ratio


@pytest.mark.parametrize("name", BOTH)
def test_heads_and_neurons(name):
    found = prunable(backbones.FAMILIES[name].make())
    dinov2 = name.startswith("dinov2")
    assert (found.num_heads, found.head_dim, found.num_neurons) == (6, 4, 96 if dinov2 else 16)
    assert (found.neurons, found.why_neurons) == (MULTIPLES if dinov2 else ANY_NUMBER, "")
    if OLD and name in HAS_BIAS:
        assert found.heads == (6,) and "pruned_heads: it cannot be run" in found.why_heads
    else:
        assert (found.heads, found.why_heads) == ((6, 5, 4, 3, 2, 1), "")


@pytest.mark.parametrize("name", NEURONS_ALONE)
def test_neurons_alone(name):
    found = prunable(backbones.FAMILIES[name].make())
    assert (found.num_heads, found.head_dim, found.num_neurons) == (6, 4, 16)
    assert (found.heads, found.neurons, found.why_neurons) == ((6,), ANY_NUMBER, "")
    assert "has no number of heads that holds for all layers (num_attention_heads)" in found.why_heads
    assert "ForImageClassification with 5 heads of 4 rows" in found.why_heads


@pytest.mark.parametrize("name", ["swin", "swinv2", "pvt v2", "segformer", "hiera", "upernet swin"])
def test_layers_of_different_widths(name):
    found = prunable(backbones.FAMILIES[name].make())
    assert (found.num_heads, found.num_neurons, found.heads, found.neurons) == (0, 0, (0,), (0,))
    assert "has no number of heads that holds for all layers" in found.why_heads
    assert found.why_neurons.startswith("its layers have different numbers of neurons (")


def test_images_that_are_not_known():
    """SigLIP 2 takes patches, of which its configuration says no number."""
    found = prunable(backbones.FAMILIES["siglip2 classifier"].make())
    assert found.neurons == (16,) and "states no size of images (image_size)" in found.why_neurons


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_gated_neurons(kind):
    config = getattr(transformers, f"{kind}Config")(**backbones.VIT, num_labels=3, use_swiglu_ffn=True)
    found = prunable(getattr(transformers, f"{kind}ForImageClassification")(config))
    assert found.heads == (6, 5, 4, 3, 2, 1) and found.neurons == (0,) and "SwiGLU" in found.why_neurons


def test_models_without_a_configuration():
    found = prunable(backbones.FAMILIES["fused vit"].make())
    assert found.heads == (6,) and found.neurons == (0,)
    assert found.why_heads == found.why_neurons == "it has no configuration of transformers"


def test_one_unit_of_each():
    config = transformers.ViTConfig(**{**backbones.VIT, "num_attention_heads": 1, "intermediate_size": 1})
    found = prunable(transformers.ViTForImageClassification(config))
    assert (found.heads, found.neurons) == ((1,), (1,))
    assert found.why_heads == "its layers have one head each" and "every layer has one neuron" in found.why_neurons
    config = transformers.Dinov2Config(**backbones.VIT, mlp_ratio=1)
    assert prunable(transformers.Dinov2ForImageClassification(config)).neurons == (24,)


def test_adapters_are_looked_through():
    model = silenced.make("siglip classifier")
    plain = prunable(model)
    targets = ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["classifier"], lora_bias=True))
    before = {name: param.clone() for name, param in adapted.named_parameters()}
    assert prunable(adapted) == prunable(adapted.get_base_model()) == plain
    assert count_units(adapted) == count_units(adapted.get_base_model())
    assert all(torch.equal(param, before[name]) for name, param in adapted.named_parameters())


# What the installed transformers does. A change is to be noticed: more could be pruned then


@pytest.mark.parametrize("name", ["dinov2", "dinov2 with registers"])
def test_dinov2_ignores_intermediate_size(name):
    model = backbones.FAMILIES[name].make()
    assert model.config.intermediate_size == 16 and count_units(model).num_neurons == 96


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_two_towers_build_wider_heads(kind):
    """Told of three heads of four rows, they build three of eight."""
    vision = {**backbones.VIT, "num_attention_heads": 3, "head_dim": 4}
    config = getattr(transformers, f"{kind}Config")(text_config=backbones.TEXT, vision_config=vision, num_labels=3)
    units = count_units(getattr(transformers, f"{kind}ForImageClassification")(config))
    assert (units.num_heads, units.head_dim) == (3, 8)


def layers_differ(model):
    """Whether two of the blocks have parameters of different shapes."""
    blocks = [model.get_submodule(block.name) for block in find_blocks(model)]
    return len({tuple(param.shape for param in block.parameters()) for block in blocks}) > 1


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        *((kind, {"intermediate_size": 8}) for kind in ("ViT", "DeiT", "Beit", "ViTMSN")),
        *((kind, {"num_attention_heads": 3, "head_dim": 4}) for kind in ("ViT", "DeiT", "Beit", "ViTMSN", "Dinov2")),
        ("Dinov2", {"mlp_ratio": 2}),
    ],
)
def test_layers_cannot_differ(kind, overrides):
    """transformers 5.24 accepts a `per_layer_config` and raises in these models; 4.57 ignores it."""
    shape = {**backbones.VIT, "head_dim": 4}
    try:
        config = getattr(transformers, f"{kind}Config")(**shape, per_layer_config={1: overrides})
        model = getattr(transformers, f"{kind}ForImageClassification")(config)
    except RuntimeError as error:
        assert "is a per-layer attribute" in str(error)
    else:
        assert not layers_differ(model)
        model.set_submodule(find_blocks(model)[1].mlp_layers[0], torch.nn.Linear(24, 8))
        assert layers_differ(model)
