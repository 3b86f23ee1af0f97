"""Stochastic depth by hooks: which layers are dropped, how often, and not in evaluation."""

import backbones
import pytest
import tiny
import torch
from transformers import ViTConfig, ViTForImageClassification

from peft_heads.backbones.drop_path import add_drop_path, has_drop_path, residual_branches


def test_branches_are_the_last_layers_of_attention_and_mlp():
    model = tiny.make("vit")
    ends = ("attention.output.dense", "output.dense") if tiny.OLD_NAMES else ("attention.o_proj", "mlp.fc2")
    blocks = [tiny.now(f"vit.layers.{i}") for i in range(2)]
    assert residual_branches(model) == [tuple(f"{block}.{end}" for end in ends) for block in blocks]


@pytest.mark.parametrize("family", ["vit", "deit", "vit mae", "vit msn", "clip classifier", "siglip classifier"])
def test_backbones_without_drop_path(family):
    model = backbones.FAMILIES[family].make()
    branches = residual_branches(model)
    assert not has_drop_path(model.config) and len(branches) == 4
    for attention, mlp in branches:
        block = attention.partition(".self_attn")[0].partition(".attention")[0]
        assert mlp.startswith(block) and model.get_submodule(mlp).in_features != model.get_submodule(mlp).out_features


def test_backbones_with_drop_path_of_their_own():
    assert has_drop_path(tiny.make("swin").config) and not has_drop_path(tiny.make("vit").config)


def test_a_branch_is_left_out_image_by_image():
    model = tiny.make("vit")
    branches = residual_branches(model)
    add_drop_path(model, branches, 0.5)
    last = model.get_submodule(branches[-1][1])
    first = model.get_submodule(branches[0][0])
    x = torch.randn(4000, 3, last.in_features)
    torch.manual_seed(0)
    output = model.train().get_submodule(branches[-1][1])(x)
    plain = torch.nn.functional.linear(x, last.weight, last.bias)
    kept = (output != 0).flatten(1).any(dim=1)
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(output[kept], plain[kept] * 2)  # the mean does not change
    assert not output[~kept].any()
    # the first block is never dropped
    assert not first._forward_hooks


def test_evaluation_sees_nothing():
    model = tiny.make("vit").eval()
    with torch.no_grad():
        expected = model(tiny.images()).logits
        add_drop_path(model, residual_branches(model), 0.9)
        assert torch.equal(model(tiny.images()).logits, expected)
        torch.manual_seed(0)
        assert not torch.equal(model.train()(tiny.images()).logits, expected)


def test_rates_grow_linearly_over_the_blocks():
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
    )
    model = ViTForImageClassification(config)
    branches = residual_branches(model)
    add_drop_path(model, branches, 0.4)
    torch.manual_seed(0)
    for index, pair in enumerate(branches):
        for name in pair:
            layer = model.get_submodule(name)
            output = layer(torch.randn(4000, 1, layer.in_features))
            left_out = (output == 0).flatten(1).all(dim=1).float().mean().item()
            assert left_out == pytest.approx(0.1 * index, abs=0.025), name


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="ResNetForImageClassification has no blocks with attention heads; use drop_"):
        from transformers import ResNetConfig, ResNetForImageClassification

        residual_branches(ResNetForImageClassification(ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)))
