"""Which MLPs have neurons that can be switched off, and whether nothing of such a neuron remains."""

import backbones
import pytest
import tiny
import torch
from backbones import FAMILIES, VIT
from peft import get_peft_model
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ResNetConfig, ResNetForImageClassification

from peft_heads import HeadMaskedLoraConfig, get_neuron_masks, set_neuron_masks
from peft_heads.backbones.neurons import neuron_projections
from peft_heads.demo.model import load_demo_model
from peft_heads.heads import neuron_layers


COVERED = [
    "vit",
    "deit",
    "dinov2",
    "clip vision",
    "clip classifier",
    "siglip classifier",
    "beit relative bias",
    "swin",
]


@torch.no_grad()
def run(model):
    return backbones.output(model.eval(), **backbones.inputs(model))


@pytest.mark.parametrize("name", COVERED)
def test_a_model_acts_as_if_the_neurons_were_not_there(name):
    """Neurons that are off do not change the output, whatever the second layer makes of them."""
    plain = FAMILIES[name].make()
    expected_names = list(neuron_projections(plain))
    model = get_peft_model(plain, HeadMaskedLoraConfig(neuron_ratio=0.5, ne=0))
    tiny.randomize_lora(model)
    base = model.get_base_model()
    all_on = run(base)
    masks = get_neuron_masks(model)
    assert list(masks) == expected_names and len(masks) == FAMILIES[name].layers
    for mask in masks.values():
        mask[1::2] = False
    set_neuron_masks(model, masks)
    expected = run(base)
    assert not torch.equal(all_on, expected)
    for layer, mask in zip(neuron_layers(model).values(), masks.values(), strict=True):
        layer.get_base_layer().weight.data[~mask] += 1
        layer.get_base_layer().bias.data[~mask] -= 1
        layer.lora_B["default"].weight.data[~mask] += 1
    assert torch.equal(run(base), expected)
    # LoRA in the blocks alone, and in each of their linear layers
    adapted = {name for name, module in base.named_modules() if getattr(module, "lora_A", None)}
    assert len(adapted) == 6 * len(masks) and all("head." not in name for name in adapted)


def test_the_model_that_ships():
    found = neuron_projections(load_demo_model(num_labels=3))
    assert found == {tiny.now(f"vit.layers.{i}.mlp.fc1"): 288 for i in range(5)}


class Act(nn.Module):
    def forward(self, x):
        return x.sigmoid() - 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "sigmoid"}, r"maps 0 to 0.5 \(expected an activation that maps 0 to 0: GELU, "),
        ({"hidden_act": "relu"}, None),
        ({"hidden_act": "quick_gelu"}, None),
        ({"hidden_act": "silu"}, None),
    ],
)
def test_activations(change, message):
    model = FAMILIES["vit"].make()
    model = type(model)(type(model.config)(**VIT | change))
    if message is None:
        assert len(neuron_projections(model)) == 4
        return
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, HeadMaskedLoraConfig(neuron_ratio=0.5))
    assert not hasattr(model, "peft_config")


def test_modules_between_the_layers():
    model = tiny.make("vit")
    name = next(iter(neuron_projections(model)))
    mlp = model.get_submodule(name.rpartition(".")[0])
    mlp.between = nn.LayerNorm(32)
    with pytest.raises(ValueError, match=r"between \(LayerNorm\) stands in the MLP .*does not work on single numbers"):
        neuron_projections(model)
    mlp.between = Act()
    with pytest.raises(ValueError, match=r"between \(Act\) stands .* maps 0 to 0.25"):
        neuron_projections(model)
    mlp.between = nn.PReLU()
    assert neuron_projections(model) == neuron_projections(tiny.make("vit"))
    mlp.act = lambda x: x + 1  # no module, as in nn.TransformerEncoderLayer
    with pytest.raises(ValueError, match=r"act \(<lambda>\) stands in the MLP .* maps 0 to 1 "):
        neuron_projections(model)
    mlp.act = torch.relu
    assert neuron_projections(model) == neuron_projections(tiny.make("vit"))


def test_what_has_no_neurons():
    gated = Dinov2ForImageClassification(Dinov2Config(**VIT, use_swiglu_ffn=True))
    message = r"the MLP of dinov2.encoder.layer.0 is gated.*24 → .* → 24; expected two linear layers"
    with pytest.raises(ValueError, match=message + ".*leave neuron_ratio and target_speed out"):
        get_peft_model(gated, HeadMaskedLoraConfig(neuron_ratio=0.5))
    convolutional = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    )
    with pytest.raises(
        ValueError, match="blocks of attention and MLP alone: ResNetForImageClassification has no blocks"
    ):
        get_peft_model(convolutional, HeadMaskedLoraConfig(target_speed=2.0))
    without_mlp = FAMILIES["fused vit"].make()
    with pytest.raises(ValueError, match="alone: blocks.0 has 1 linear layers"):
        get_peft_model(without_mlp, HeadMaskedLoraConfig(neuron_ratio=0.5))


def test_quantised_layers_are_refused():
    class Linear8bit(nn.Linear):
        pass

    model = tiny.make("vit")
    layer = model.get_submodule(next(iter(neuron_projections(model))))
    layer.__class__ = Linear8bit
    with pytest.raises(ValueError, match=r"is a Linear8bit .*\(expected torch.nn.Linear\)"):
        neuron_projections(model)


def test_a_plain_lora_layer_in_the_way():
    first = tiny.now("fc1")
    with pytest.warns(UserWarning, match="no attention heads"):
        model = get_peft_model(
            tiny.make("vit"), HeadMaskedLoraConfig(ne=1, target_modules=[*tiny.now(["v_proj"]), first])
        )
    with pytest.raises(
        ValueError, match="was given a Linear by an earlier adapter.*add the adapter that prunes neurons first"
    ):
        model.add_adapter("second", HeadMaskedLoraConfig(neuron_ratio=0.5))
    assert list(model.peft_config) == ["default"] and not [key for key in model.state_dict() if "second" in key]
