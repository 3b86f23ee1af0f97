import warnings

import pytest
from backbones import FusedAttention, FusedViT
from peft import get_peft_model
from torch import nn

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.backbones.overlooked import overlooked_attention


def layer(class_name="Attention", heads=6, **children):
    module = type(class_name, (nn.Module,), {})()
    module.num_heads = heads
    for name, out_features in children.items():
        setattr(module, name, nn.Linear(24, out_features))
    return module


OVERLOOKED = {
    "ConViT": layer("GPSA", qk=48, v=24, proj=24, pos_proj=6),
    "Twins": layer("GlobalSubSampleAttn", q=24, kv=48, proj=24),
    "to_qkv": layer(to_qkv=72),
    "Wqkv": layer("Mixer", Wqkv=72),
    "queries and keys": layer("Mixer", queries=24, keys=24),
    "projection_query": layer("Mixer", projection_query=24, projection_key=24, projection_value=24),
    "by its class": layer("OutlookAttention", v=24, attn=24),
    "torch": nn.MultiheadAttention(24, 6),
}
NOT_OVERLOOKED = {
    "an MLP": layer("Mlp", fc1=24, fc2=24),
    "a norm": nn.LayerNorm(24),
    "a pooling": layer("AttentionPoolLatent", q=24, kv=48),
    "a gate": layer("GatedAttentionUnit", heads=None, gate=24),
}


def vit(other):
    model = FusedViT((6, 6, 6))
    model.blocks[1].attn = other
    return model


@pytest.mark.parametrize("other", OVERLOOKED.values(), ids=OVERLOOKED)
@pytest.mark.parametrize("config", [HeadMaskedLoraConfig(ne=1), RLRRConfig()], ids=["lora", "rlrr"])
def test_a_warning_names_what_is_left_out(other, config):
    model = vit(other)
    with pytest.warns(
        UserWarning, match=r"^1 attention layers of FusedViT are not recognised.*: blocks\.1\.attn\. Name"
    ):
        get_peft_model(model, HeadMaskedLoraConfig(ne=0) if isinstance(other, nn.MultiheadAttention) else config)
    with warnings.catch_warnings():  # their choice
        warnings.simplefilter("error")
        get_peft_model(vit(other), HeadMaskedLoraConfig(ne=1, target_modules=["qkv"]))


@pytest.mark.parametrize("other", NOT_OVERLOOKED.values(), ids=NOT_OVERLOOKED)
def test_what_is_no_attention_layer(other):
    assert overlooked_attention(vit(other)) == []


def test_nothing_recognised_is_another_matter():
    assert overlooked_attention(nn.ModuleDict({"attn": OVERLOOKED["Twins"]})) == []


@pytest.mark.parametrize("dim", [24, 32])
def test_keys_and_values_under_the_name_qkv(dim):
    """GCViT's 2·24 rows can be divided into 3 parts of 2 heads, but not into heads of the stated width."""
    model = FusedViT((2, 2), dim=dim)
    model.blocks[1].attn = attention = FusedAttention(dim, 2)
    attention.qkv, attention.head_dim = nn.Linear(dim, 2 * dim), dim // 2
    assert overlooked_attention(model) == ["blocks.1.attn"]
