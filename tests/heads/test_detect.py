import tiny
from backbones import FusedViT
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_heads.heads.detect import is_attention, is_called_attention, matches_pattern, owns_projections, resolve_heads
from peft_heads.heads.layout import HeadLayout, ProjectionLayout


def whole(role, num_heads, head_dim):
    """Return the layout of a projection that is only a query, key or value."""
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
    """Grouped-query attention with the names that transformers used before 5.9."""

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
    pooling = nn.Module()  # has heads and queries, but is no attention layer that we recognise
    pooling.num_heads, pooling.query, pooling.dense = 2, nn.Linear(4, 4), nn.Linear(4, 4)
    assert resolve_heads(nn.Sequential(pooling)) == {}
    assert resolve_heads(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(3, 4, 1))) == {}


def test_wrapped_modules_are_looked_through():
    plain = tiny.make("vit")
    expected = resolve_heads(plain)
    wrapped = get_peft_model(
        tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"]), modules_to_save=["classifier"])
    )
    assert resolve_heads(wrapped.get_base_model()) == expected


def test_matches_pattern():
    assert matches_pattern("q_proj", "vit.layers.0.attention.q_proj")
    assert matches_pattern(r"layers\.0\..*", "vit.layers.0.attention.q_proj")
    assert not matches_pattern("proj", "vit.layers.0.attention.q_proj")


class WidthOnly(nn.Module):
    """A layer that states the width of its heads, not their number (DETR)."""

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


def test_what_is_an_attention_layer_by_its_names():
    """The signs are the class, a fused projection, or two projections and a number of heads."""
    kinds = {name: type(name, (nn.Module,), {}) for name in ("Mixer", "WindowAttention", "LinearAttn")}
    fused, two = nn.ModuleDict({"qkv": nn.Linear(2, 6)}), nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)})
    one = nn.ModuleDict({"q": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)})
    assert [is_called_attention(kind()) for kind in kinds.values()] == [False, True, True]
    assert [is_attention(kind()) for kind in kinds.values()] == [False, True, True]
    assert [owns_projections(module) for module in (fused, two, one, kinds["LinearAttn"]())] == [
        True,
        True,
        False,
        False,
    ]
    assert [is_attention(module) for module in (fused, two)] == [True, False]
    two.num_heads = 1
    assert is_attention(two)
