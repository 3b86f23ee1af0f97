import backbones
import pytest
import tiny
import torch
from backbones import FAMILIES, FusedViT
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_heads.backbones.blocks import find_blocks
from peft_heads.backbones.structure import Backbone, _within, find_backbone


def test_vit():
    parts = find_backbone(tiny.make("vit"))
    assert parts.blocks == find_blocks(tiny.make("vit")) and len(parts.blocks) == 2
    linear = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    blocks = [tiny.now(f"vit.layers.{i}.") for i in range(2)]
    assert set(parts.matrices) == {tiny.now(f"vit.layers.{i}.{name}") for i in range(2) for name in linear}
    norms = [f"{block}layernorm_{where}" for block in blocks for where in ("before", "after")]
    assert parts.norms == (*norms, "vit.layernorm")
    assert parts.patch_embedding == "vit.embeddings.patch_embeddings.projection"


WHOLE = lambda tokens: tokens  # noqa: E731
WHAT_IS_NORMALISED = {
    **dict.fromkeys(("vit", "deit", "dinov2", "vit msn", "siglip vision", "swin", "pvt v2"), WHOLE),
    "clip vision": lambda tokens: tokens[:, 0],
    "beit": lambda tokens: tokens[:, 1:].mean(dim=1),
}


@pytest.mark.parametrize("name", WHAT_IS_NORMALISED)
def test_the_final_norm_takes_what_the_last_block_returns(name):
    model = FAMILIES[name].make().eval()
    found, seen = find_backbone(model), {}
    for key in (found.blocks[-1].name, found.final_norm):
        model.get_submodule(key).register_forward_hook(
            lambda module, args, output, key=key: seen.update({key: (args[0], output)})
        )
    backbones.output(model, **backbones.inputs(model))
    end = seen[found.blocks[-1].name][1]
    expected = WHAT_IS_NORMALISED[name](end if torch.is_tensor(end) else end[0])
    assert torch.equal(seen[found.final_norm][0], expected)
    assert found.norms[-1] == found.final_norm and found.classifiers == FAMILIES[name].classifiers


def test_adapters_are_looked_through():
    expected = find_backbone(tiny.make("swin"))
    targets = tiny.now(["q_proj", "fc1", "layernorm"])[:2]
    model = get_peft_model(tiny.make("swin"), LoraConfig(target_modules=targets, modules_to_save=["classifier"]))
    assert find_backbone(model.get_base_model()) == expected


def test_a_text_tower_is_left_out():
    parts = find_backbone(FAMILIES["clip"].make())
    names = (*parts.matrices, *parts.norms, parts.patch_embedding)
    assert all(name.startswith("vision_model.") for name in names)
    # the norm before the blocks is neither a block's nor the final one
    assert "vision_model.post_layernorm" in names and "vision_model.pre_layrnorm" not in names


def test_a_backbone_alone():
    """Its final norm and patch embedding are found beside the stack of blocks."""
    parts = find_backbone(FAMILIES["dinov3"].make())
    assert parts.norms[-1] == "norm" and parts.patch_embedding == "embeddings.patch_embeddings"


def test_another_tower_behind_is_left_out():
    assert _within("vision.", ["vision.norm", "text.norm"]) == ["vision.norm"]
    assert _within("encoder.", ["norm"]) == ["norm"]  # beside the stack of blocks, where that is all there is


def test_the_network_of_a_position_bias_is_no_part_of_a_block():
    parts = find_backbone(FAMILIES["swinv2"].make())
    assert len(parts.matrices) == 3 * 6 and not any("position" in name for name in parts.matrices)


def test_nothing_is_found_in_what_is_no_backbone():
    parts = find_backbone(nn.Sequential(nn.Embedding(2, 2)))
    assert parts == Backbone()


def test_every_norm_of_a_block_counts():
    """A norm that RLRR cannot adapt is found, so that an error can name it."""
    vit = FusedViT((6, 6))
    vit.blocks[1].norm = nn.RMSNorm(24)
    assert find_backbone(vit).norms == ("blocks.0.norm", "blocks.1.norm")
