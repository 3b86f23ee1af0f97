import pytest
import tiny
import transformers as hf
from backbones import FusedViT
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTModel

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.heads.detect import default_targets, exact_targets, matches_pattern, resolve_heads, task_head_names
from peft_heads.heads.layout import HeadLayout, ProjectionLayout


def whole(role, num_heads, head_dim):
    """The layout of a projection that is nothing but a query, key or value."""
    return ProjectionLayout(num_heads * head_dim, (HeadLayout(role, num_heads, head_dim),))


def test_vit():
    layouts = resolve_heads(tiny.make("vit"))
    assert len(layouts) == 6  # q, k, v of two layers; neither the output projection nor the MLP
    assert layouts[tiny.now("vit.layers.1.attention.v_proj")] == whole("value", 6, 4)
    assert not any("o_proj" in name or "output" in name or "mlp" in name for name in layouts)


def test_swin_has_heads_per_stage():
    layouts = resolve_heads(tiny.make("swin"))
    heads = {name.split(".")[3]: layout.num_heads for name, layout in layouts.items()}
    assert heads == {"0": 2, "1": 4}
    assert len(layouts) == 12


class Attention(nn.Module):
    """Grouped-query attention with the names transformers used before 5.9."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads = 4
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.dense = nn.Linear(8, 8)


def test_old_names_and_fewer_key_value_heads():
    model = nn.Sequential(Attention())
    assert resolve_heads(model) == {
        "0.query": whole("query", 4, 2),
        "0.key": whole("key", 2, 2),
        "0.value": whole("value", 2, 2),
    }
    assert default_targets(model) == ["query", "value"]


def test_explicit_num_heads():
    model = nn.Sequential(Attention())
    assert resolve_heads(model, 2)["0.query"] == whole("query", 2, 4)
    assert "0.dense" not in resolve_heads(model, 2)  # an int counts heads where there are heads
    assert resolve_heads(model, {"dense": 8})["0.dense"] == whole("projection", 8, 1)
    assert resolve_heads(model, {"dense": 8})["0.query"] == whole("query", 4, 2)  # the rest is detected
    assert "0.query" not in resolve_heads(model, {"query": 3})  # 3 does not divide 8
    fused = FusedViT()
    assert [part.num_heads for part in resolve_heads(fused, 4)["blocks.0.attn.qkv"].parts] == [4, 4, 4]
    assert [part.num_heads for part in resolve_heads(fused, {"qkv": 8})["blocks.1.attn.qkv"].parts] == [8, 8, 8]


def test_no_attention_no_heads():
    pooling = nn.Module()  # knows heads and queries, but is no attention layer of ours
    pooling.num_heads, pooling.query, pooling.dense = 2, nn.Linear(4, 4), nn.Linear(4, 4)
    assert resolve_heads(nn.Sequential(pooling)) == {}
    assert resolve_heads(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 1))) == {}
    assert default_targets(nn.Sequential(nn.Linear(4, 4))) == []


def test_default_targets_are_names_where_suffixes_match_too_much():
    model = nn.Sequential(Attention(), nn.ModuleDict({"query": nn.Linear(2, 2)}))
    assert default_targets(model) == ["0.query", "0.value"]


def test_wrapped_modules_are_looked_through():
    plain = tiny.make("vit")
    expected = resolve_heads(plain)
    wrapped = get_peft_model(
        tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"]), modules_to_save=["classifier"])
    )
    assert resolve_heads(wrapped.get_base_model()) == expected
    assert default_targets(wrapped.get_base_model()) == tiny.now(["q_proj", "v_proj"])
    assert task_head_names(wrapped.get_base_model()) == ["classifier"]


def test_classifier():
    assert task_head_names(tiny.make("vit")) == ["classifier"]
    assert task_head_names(ViTModel(tiny.make("vit").config, add_pooling_layer=False)) == []
    assert task_head_names(tiny.make("vit", num_labels=0)) == []  # nn.Identity


def test_matches_pattern():
    assert matches_pattern("q_proj", "vit.layers.0.attention.q_proj")
    assert matches_pattern(r"layers\.0\..*", "vit.layers.0.attention.q_proj")
    assert not matches_pattern("proj", "vit.layers.0.attention.q_proj")


def test_heads_that_cannot_be_wrapped_whole():
    model = nn.Module()
    model.head = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()])  # is never called itself
    assert task_head_names(model) == ["head.0", "head.1"]

    model = nn.Module()
    model.block = nn.ModuleDict({"subhead": nn.Linear(2, 2)})  # ends with "head"
    model.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert task_head_names(model) == ["head.0"]
    model.block = nn.Linear(2, 2)
    assert task_head_names(model) == ["head"]


def test_targets_that_peft_would_read_too_widely():
    """A final `norm` at the top, and a `norm` elsewhere that is none (timm's ViT)."""
    model = FusedViT((6, 6))
    model.norm, model.patch_embed.norm = nn.LayerNorm(24), nn.Identity()
    names = ["blocks.0.norm", "blocks.1.norm", "norm"]
    assert exact_targets(names[:2], model) == names[:2]
    assert exact_targets(names, model) == r"blocks\.0\.norm|blocks\.1\.norm|norm"
    adapted = get_peft_model(model, RLRRConfig(target_modules=exact_targets(names, model)))
    assert [n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "rlrr_shift")] == names
    del model.patch_embed.norm
    assert exact_targets(names, model) == ["norm"]


class WidthOnly(nn.Module):
    """States the width of its heads, not their number (DETR)."""

    def __init__(self, **rows):
        super().__init__()
        self.head_dim = 4
        for name, out_features in rows.items():
            setattr(self, name, nn.Linear(16, out_features))


def test_attention_layers_that_state_only_the_width_of_their_heads():
    layouts = resolve_heads(nn.Sequential(WidthOnly(q_proj=16, k_proj=8, v_proj=8), WidthOnly(qkv=48)))
    assert layouts["0.q_proj"] == whole("query", 4, 4) and layouts["0.v_proj"] == whole("value", 2, 4)
    assert [part.num_heads for part in layouts["1.qkv"].parts] == [4, 4, 4]
    assert resolve_heads(nn.Sequential(WidthOnly(q_proj=18, k_proj=18, v_proj=18), WidthOnly(qkv=16))) == {}


V = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32}
V["patch_size"] = 8
T = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}


def text(model_type, **config):
    return {**T, "num_key_value_heads": 2, "model_type": model_type, **config}


AROUND_A_VISION_TOWER = {
    "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config={**V, "model_type": "siglip_vision_model"},
            text_config=text("gemma", head_dim=8),
            projection_dim=32,
        )
    ),
    "git": lambda: hf.GitForCausalLM(hf.GitConfig(vision_config=V, **T)),
    "idefics": lambda: hf.IdeficsForVisionText2Text(
        hf.IdeficsConfig(vision_config={"embed_dim": 32, **V}, **T, use_resampler=False)
    ),
    "ovis2": lambda: hf.Ovis2ForConditionalGeneration(
        hf.Ovis2Config(
            vision_config={**V, "hidden_stride": 1, "vocab_size": 99, "num_visual_indicator_tokens": 5},
            text_config=text("qwen2"),
            hidden_size=32,
            vocab_size=99,
        )
    ),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config={**V, "model_type": "clip_vision_model"}, text_config=text("llama"))
    ),
}


@pytest.mark.parametrize("make", AROUND_A_VISION_TOWER.values(), ids=AROUND_A_VISION_TOWER)
def test_a_model_around_the_vision_tower_is_no_text_tower(make):
    model = make()
    seeing = [name for name in resolve_heads(model) if "vision" in name or "image_encoder" in name]
    model = get_peft_model(model, HeadMaskedLoraConfig(ne=1))
    adapted = [name for name, part in model.get_base_model().named_modules() if hasattr(part, "head_layout")]
    assert adapted and set(adapted) < set(seeing) and len(adapted) == len(seeing) * 2 // 3
