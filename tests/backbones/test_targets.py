import tiny
from backbones import FusedViT
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_heads import RLRRConfig
from peft_heads.backbones.targets import default_targets, exact_targets


class Attention(nn.Module):
    """An attention layer with the names that transformers used before 5.9."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads = 4
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


def test_last_components_where_they_are_enough():
    assert default_targets(nn.Sequential(Attention())) == ["query", "value"]
    assert default_targets(nn.Sequential(nn.Linear(4, 4))) == []


def test_wrapped_modules_are_looked_through():
    model = get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"])))
    assert default_targets(model.get_base_model()) == tiny.now(["q_proj", "v_proj"])


def test_default_targets_are_names_where_suffixes_match_too_much():
    model = nn.Sequential(Attention(), nn.ModuleDict({"query": nn.Linear(2, 2)}))
    assert default_targets(model) == ["0.query", "0.value"]


def test_targets_that_peft_would_read_too_widely():
    """timm's ViT has a final `norm` at the top, and elsewhere a `norm` that is not one."""
    model = FusedViT((6, 6))
    model.norm, model.patch_embed.norm = nn.LayerNorm(24), nn.Identity()
    names = ["blocks.0.norm", "blocks.1.norm", "norm"]
    assert exact_targets(names[:2], model) == names[:2]
    assert exact_targets(names, model) == r"blocks\.0\.norm|blocks\.1\.norm|norm"
    adapted = get_peft_model(model, RLRRConfig(target_modules=exact_targets(names, model)))
    assert [n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "rlrr_shift")] == names
    del model.patch_embed.norm
    assert exact_targets(names, model) == ["norm"]
