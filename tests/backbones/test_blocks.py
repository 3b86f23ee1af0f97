"""Every part of every family's blocks, compared with the data flow between a block's modules in a forward pass."""

import backbones
import pytest
import tiny
import torch
from backbones import FAMILIES, FusedAttention, FusedViT
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Dinov2Config, Dinov2Model, HieraConfig, HieraModel, PvtV2Config, PvtV2Model

from peft_heads import RLRRConfig
from peft_heads.backbones.blocks import Block, find_blocks, whole_blocks


# Families by what their blocks have beside two norms and two ends; a name stands for all that begin with it.
LAYER_SCALE = ("beit", "dinov2", "dinov3", "depth anything")
NORMS_AT_THE_END = ("swinv2",)
# transformers' Swin drops only its attention; the rates of other families are 0 by default.
DROP_PATH = {
    **dict.fromkeys(("beit", "swinv2", "segformer", "timm swin", "timm wrapper swin"), (True, True)),
    **dict.fromkeys(("swin", "upernet swin"), (True, False)),
}
WINDOWS = ("swin", "upernet", "hiera", "sam", "timm swin", "timm wrapper swin")
WITHOUT_MLP = ("fused",)
# transformers before 5.9 (SwinV2: always) has the two layers of the MLP in the block itself.
LAYERS_OF_MLP_ALONE = ("swinv2", *(("vit", "deit", "beit", "swin", "upernet") if tiny.OLD_NAMES else ()))


def is_one_of(name, families):
    return name.startswith(tuple(families))


def build(name):
    if "timm" in name:
        pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    model = FAMILIES[name].make().eval()
    for key, param in model.named_parameters():
        if "relative_position" in key or "rel_pos" in key or "position_bias_mlp" in key or "cpb_mlp" in key:
            param.data.zero_()  # attention without biases, and heads that differ
        elif param.dim() == 2 and "embed" not in key:
            param.data.normal_(std=0.3)
        elif any(word in key for word in ("lambda", "gamma", "ls1", "ls2", "layer_scale")):
            param.data.uniform_(0.5, 1.5)
    for module in model.modules():  # DINOv3 rotates queries and keys
        if type(module).__name__.endswith("RopePositionEmbedding"):
            module.register_forward_hook(lambda module, args, out: (torch.ones_like(out[0]), torch.zeros_like(out[1])))
    return model


class Seen:
    """Inputs and outputs of the modules of a model's blocks in a forward pass."""

    def __init__(self, model, blocks):
        self.model, self.calls, self.order = model, {}, []
        prefixes = tuple(f"{block.name}." for block in blocks)
        for name, module in model.named_modules():
            if f"{name}.".startswith(prefixes):
                module.register_forward_hook(self._hook(name), with_kwargs=True)
        with torch.no_grad():
            backbones.output(model, **backbones.inputs(model))

    def _hook(self, name):
        def hook(module, args, kwargs, output):
            given = next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
            self.calls.setdefault(name, []).append((given, output if torch.is_tensor(output) else output[0]))
            self.order.append(name)

        return hook

    def input(self, name, call=0):
        return self.calls[name][call][0]

    def output(self, name, call=0):
        return self.calls[name][call][1]

    def scale(self, name):
        """Return the numbers of a layer scale, which is a module or a parameter."""
        if name is None:
            return 1
        if name in self.calls:
            return self.output(name) / self.input(name)
        return self.model.get_parameter(name)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """The family's name, its blocks, and their inputs and outputs."""
    model = build(request.param)
    is_whole = not is_one_of(request.param, WITHOUT_MLP)
    blocks = whole_blocks(model) if is_whole else find_blocks(model)
    return request.param, blocks, Seen(model, blocks)


def same(one, other):
    """Whether the numbers are the same; windows may have other shapes and order."""
    return one.numel() == other.numel() and torch.allclose(one.flatten().sort().values, other.flatten().sort().values)


def context(block, seen, attention):
    """Compute the heads' outputs side by side from the projections' outputs: (groups of tokens, tokens, width)."""
    if block.fused:
        query, key, value = seen.output(block.fused).chunk(3, dim=-1)
    else:
        query, key, value = (seen.output(part) for part in (block.query, block.key, block.value))
    tokens = [x.flatten(1, -2).unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
    query, key, value = tokens
    if block.scaling is None:  # cosine attention
        query, key = (nn.functional.normalize(x, dim=-1) for x in (query, key))
        scaling = attention.logit_scale.clamp(max=torch.tensor(100.0).log()).exp()
    else:
        scaling = block.scaling
    products = scaling * (query @ key.transpose(-2, -1))
    return (products.softmax(-1) @ value).transpose(1, 2).flatten(2)


def is_linear(model, name):
    return isinstance(model.get_submodule(name), nn.Linear)


def is_shifted(model, block):
    shift = getattr(model.get_submodule(block.name), "shift_size", 0)
    return any(shift) if isinstance(shift, tuple) else shift > 0


def test_the_attention_layer(family):
    """Query, key, value or fused, number of heads, scaling and output are right."""
    name, blocks, seen = family
    compared = 0
    for block in blocks:
        assert (block.fused is None) == all((block.query, block.key, block.value))
        attention = seen.model.get_submodule((block.fused or block.query).rpartition(".")[0])
        assert (block.scaling is None) == hasattr(attention, "logit_scale")
        # masks between shifted windows, units of tokens and pooled queries (Hiera) are not computed here
        if is_shifted(seen.model, block) or (name == "hiera" and "stages.2" not in block.name):
            continue
        expected = context(block, seen, attention)
        assert torch.allclose(expected.flatten(), seen.input(block.out).flatten(), atol=1e-5), block.name
        compared += 1
    assert compared == FAMILIES[name].layers - (name in ("swin", "swinv2")) - 2 * (name == "hiera")


def test_norms(family):
    name, blocks, seen = family
    for block in blocks:
        if is_one_of(name, NORMS_AT_THE_END):
            assert same(seen.input(block.norm1), seen.output(block.out))
            assert same(seen.input(block.norm2), seen.output(block.mlp_layers[-1]))
            continue
        assert same(seen.output(block.norm1), seen.input(block.fused or block.query))
        assert (block.norm2 is None) == is_one_of(name, WITHOUT_MLP)
        if block.norm2:
            assert same(seen.output(block.norm2), seen.input(block.mlp_layers[0]))


def test_the_mlp(family):
    """The MLP has its layers in the order of their calls: all linear layers of the block outside the attention."""
    name, blocks, seen = family
    for block in blocks:
        linear = [key for key in seen.order if is_linear(seen.model, key) and key.startswith(f"{block.name}.")]
        assert [key for key in linear if key in block.mlp_layers] == list(block.mlp_layers)
        beside = set(linear) - {*block.mlp_layers, block.out, block.query, block.key, block.value, block.fused}
        widening = {f"{block.name}.proj"} if name == "hiera" else set()
        assert all("position" in key for key in beside - widening)
        assert (block.mlp is None) == is_one_of(name, (*WITHOUT_MLP, *LAYERS_OF_MLP_ALONE))
        if block.mlp:
            assert torch.equal(seen.input(block.mlp), seen.input(block.mlp_layers[0]))
            assert torch.equal(seen.output(block.mlp), seen.output(block.mlp_layers[-1]))


def test_the_branches_and_their_layer_scales(family):
    """Tokens, plus the scaled end of the attention, plus the scaled end of the MLP, are what the block returns."""
    name, blocks, seen = family
    if is_one_of(name, WITHOUT_MLP):
        assert not any(block.scale1 or block.scale2 for block in blocks)
        return
    for block in blocks:
        assert bool(block.scale1) == bool(block.scale2) == is_one_of(name, LAYER_SCALE)
        at_the_end = is_one_of(name, NORMS_AT_THE_END)
        between = seen.input(block.mlp_layers[0] if at_the_end else block.norm2)
        end = seen.output(block.norm2 if at_the_end else block.mlp_layers[-1])
        added = (seen.scale(block.scale2) * end).view(between.shape)
        assert torch.allclose(seen.output(block.name).view(between.shape), between + added, atol=1e-4)
        if is_one_of(name, WINDOWS):  # whose order is not that of the tokens
            continue
        added = (seen.scale(block.scale1) * seen.output(block.out)).view(between.shape)
        assert torch.allclose(seen.input(block.name).view(between.shape) + added, between, atol=1e-4)


def test_drop_paths(family):
    """A module is called as often as it is named, and is no `nn.Identity`."""
    name, blocks, seen = family
    expected = next((branches for key, branches in DROP_PATH.items() if name.startswith(key)), (False, False))
    assert expected == tuple(
        any(branch) for branch in zip(*[(b.drop_path1, b.drop_path2) for b in blocks], strict=True)
    )
    for block in blocks:
        named = [block.drop_path1, block.drop_path2]
        for module in {*named} - {None}:
            assert not isinstance(seen.model.get_submodule(module), nn.Identity)
            assert len(seen.calls[module]) == named.count(module)


@pytest.mark.parametrize(
    ("make", "without"),
    [
        (lambda: Dinov2Model(Dinov2Config(**backbones.VIT, drop_path_rate=0.5)), 0),
        # the rate grows from 0
        (lambda: PvtV2Model(PvtV2Config(**backbones.PYRAMID, image_size=32, drop_path_rate=0.5)), 1),
        (lambda: HieraModel(HieraConfig(**backbones._HIERA, drop_path_rate=0.5)), 1),
    ],
    ids=["dinov2", "pvt v2", "hiera"],
)
def test_drop_paths_that_are_switched_on(make, without):
    model = make().eval()
    blocks = whole_blocks(model)
    assert all((block.drop_path1, block.drop_path2) == (None, None) for block in blocks[:without])
    seen = Seen(model, blocks)
    for block in blocks[without:]:
        assert block.drop_path1 == block.drop_path2 == f"{block.name}.drop_path"
        assert len(seen.calls[block.drop_path1]) == 2


def test_what_torchvision_calls_them():
    """torchvision's Swin reads the weights of qkv and proj, so no hook sees the layers."""
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = models.SwinTransformer([4, 4], 8, depths=[1, 1], num_heads=[2, 4], window_size=[2, 2])
    name = "features.3.0"
    assert whole_blocks(model)[1] == Block(
        name=name,
        fused=f"{name}.attn.qkv",
        out=f"{name}.attn.proj",
        num_heads=4,
        scaling=0.5,
        norm1=f"{name}.norm1",
        norm2=f"{name}.norm2",
        mlp=f"{name}.mlp",
        mlp_layers=(f"{name}.mlp.0", f"{name}.mlp.3"),
        drop_path1=f"{name}.stochastic_depth",
        drop_path2=f"{name}.stochastic_depth",
    )


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class TimmBlock(nn.Module):
    """A block with timm's names of parts, with layer scale and drop path in each branch."""

    def __init__(self, width=24, heads=6):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), FusedAttention(width, heads), LayerScale(width)
        self.drop_path1 = nn.Dropout(0.1)
        self.norm2, self.ls2, self.drop_path2 = nn.LayerNorm(width), nn.Identity(), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


@pytest.fixture
def timm_like():
    model = FusedViT()
    model.blocks[0], model.blocks[1] = TimmBlock(), TimmBlock()
    return model


def test_what_timm_calls_them(timm_like):
    assert find_blocks(timm_like)[1] == Block(
        name="blocks.1",
        out="blocks.1.attn.proj",
        fused="blocks.1.attn.qkv",
        num_heads=6,
        scaling=0.5,
        norm1="blocks.1.norm1",
        norm2="blocks.1.norm2",
        mlp="blocks.1.mlp",
        mlp_layers=("blocks.1.mlp.0", "blocks.1.mlp.2"),
        scale1="blocks.1.ls1",
        drop_path1="blocks.1.drop_path1",
    )


def test_adapters_are_looked_through():
    expected = find_blocks(tiny.make("swin"))
    targets = tiny.now(["q_proj", "fc1", "o_proj"])
    lora = LoraConfig(target_modules=targets, modules_to_save=["layernorm_before"])
    assert find_blocks(get_peft_model(tiny.make("swin"), lora).get_base_model()) == expected
    assert find_blocks(get_peft_model(tiny.make("swin"), RLRRConfig()).get_base_model()) == expected
    assert expected and all(block.norm1 and block.mlp_layers for block in expected)


def test_linear_layers_that_are_neither_output_nor_mlp(timm_like):
    """CaiT mixes its heads; Hiera widens the tokens beside the branches."""
    timm_like.blocks[0].attn.proj_l = nn.Linear(6, 6)
    timm_like.blocks[0].widen = nn.Linear(24, 24)
    first, second = whole_blocks(timm_like)
    assert repr(first).replace("blocks.0", "blocks.1") == repr(second)


def test_a_scaling_that_the_attention_layer_states(timm_like):
    first, second = (block.attn for block in timm_like.blocks)
    first.scale, second.scale = 0.125, nn.Parameter(torch.ones(1))
    assert [block.scaling for block in find_blocks(timm_like)] == [0.125, None]


def test_layers_of_the_mlp_in_the_block_itself(timm_like):
    block = timm_like.blocks[1]
    block.fc1, block.fc2 = nn.Linear(24, 48), nn.Linear(48, 24)
    del block.mlp
    found = find_blocks(timm_like)[1]
    assert found.mlp is None and found.mlp_layers == ("blocks.1.fc1", "blocks.1.fc2") and found.problem is None


def two_attention_layers(block):
    block.cross_attn = FusedAttention(24, 6)


def no_mlp(block):
    del block.mlp


def two_mlps(block):
    block.mlp2 = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))


def another_width(block):
    block.mlp[2] = nn.Linear(48, 12)


def no_output(block):
    block.attn.proj = nn.Identity()


@pytest.mark.parametrize(
    ("spoil", "ends"),
    [
        (two_attention_layers, "blocks.1.attn.proj, blocks.1.mlp.2, blocks.1.cross_attn.proj"),
        (no_mlp, "blocks.1.attn.proj"),
        (two_mlps, "blocks.1.attn.proj, blocks.1.mlp.2, blocks.1.mlp2.0, blocks.1.mlp2.1"),
        (another_width, "blocks.1.attn.proj"),
        (no_output, "blocks.1.mlp.2"),
    ],
)
def test_what_fails_to_be_a_block_says_why(timm_like, spoil, ends):
    spoil(timm_like.blocks[1])
    first, second = find_blocks(timm_like)
    assert first.problem is None and second.problem is not None and (second.out is None or not second.mlp_layers)
    with pytest.raises(ValueError) as error:
        whole_blocks(timm_like)
    number = len(ends.split(", "))
    assert str(error.value) == (
        f"blocks.1 has {number} linear layers with 24 outputs ({ends}) beside query, key and value; expected two, the "
        "ends of attention and MLP"
    )


def test_no_blocks_at_all():
    with pytest.raises(ValueError, match="^Linear has no blocks with attention heads$"):
        whole_blocks(nn.Linear(2, 2))
    assert find_blocks(nn.Linear(2, 2)) == ()


def test_a_model_that_is_one_block():
    model = nn.ModuleDict({"attn": FusedAttention(24, 6), "mlp": nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 24))})
    (block,) = whole_blocks(model)
    assert (block.name, block.out, block.mlp) == ("", "attn.proj", "mlp")
