import tiny
from backbones import FAMILIES, FusedViT
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_heads.backbones.norms import batch_norms, is_norm
from peft_heads.backbones.structure import _within, find_backbone


def test_vit():
    parts = find_backbone(tiny.make("vit"))
    linear = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    blocks = [tiny.now(f"vit.layers.{i}.") for i in range(2)]
    assert set(parts.matrices) == {tiny.now(f"vit.layers.{i}.{name}") for i in range(2) for name in linear}
    norms = [f"{block}layernorm_{where}" for block in blocks for where in ("before", "after")]
    assert parts.norms == (*norms, "vit.layernorm")
    assert parts.patch_embedding == "vit.embeddings.patch_embeddings.projection"


def test_adapters_are_looked_through():
    expected = find_backbone(tiny.make("swin"))
    targets = tiny.now(["q_proj", "fc1", "layernorm"])[:2]
    model = get_peft_model(tiny.make("swin"), LoraConfig(target_modules=targets, modules_to_save=["classifier"]))
    assert find_backbone(model.get_base_model()) == expected


def test_a_text_tower_is_left_out():
    parts = find_backbone(FAMILIES["clip"].make())
    names = (*parts.matrices, *parts.norms, parts.patch_embedding)
    assert all(name.startswith("vision_model.") for name in names)
    # the norm before the blocks is neither theirs nor the final one
    assert "vision_model.post_layernorm" in names and "vision_model.pre_layrnorm" not in names


def test_a_backbone_alone():
    """Its final norm and patch embedding stand beside the stack of blocks."""
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
    assert (parts.matrices, parts.norms, parts.patch_embedding) == ((), (), None)


def test_what_is_a_norm():
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)):
        assert is_norm(norm)
    for other in (nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm2d(4), nn.Linear(4, 4)):
        assert not is_norm(other)
    assert batch_norms(nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4))) == ["0"]


def test_every_norm_of_a_block_counts():
    """One that RLRR cannot adapt is found, so that it can be said."""
    vit = FusedViT((6, 6))
    vit.blocks[1].norm = nn.RMSNorm(24)
    assert find_backbone(vit).norms == ("blocks.0.norm", "blocks.1.norm")
