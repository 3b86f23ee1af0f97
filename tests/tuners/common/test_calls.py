"""A layer whose weight is read although it is never called is found, in the first forward pass at the latest."""

import copy
import pickle

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.tuners.common.calls import watch_calls


def linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Projections(nn.Module):
    """The layers of an attention module."""

    num_heads = 2

    def __init__(self, dim=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)


class Attention(Projections):
    """Attention that calls q, k and v in the ordinary way."""

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.projections())
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def projections(self):
        return self.q_proj, self.k_proj, self.v_proj


class ReadingAttention(Attention):
    """Attention whose own code does not show that q and v are never called."""

    def forward(self, x):
        q, k, v = (linear(p, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.projections())
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PlainReadingAttention(Projections):
    """Attention whose own code shows that q and v are never called."""

    def forward(self, x):
        return self.out(F.linear(x, self.q_proj.weight) * self.k_proj(x) * F.linear(x, self.v_proj.weight.T))


class ReadingMLP(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm, self.unused = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        return self.unused(x) if x is None else self.fc2(linear(self.fc1, self.norm(x)).relu())


class Block(nn.Module):
    def __init__(self, attention, mlp):
        super().__init__()
        self.attention, self.mlp, self.norm = attention, mlp, nn.LayerNorm(8)

    def forward(self, x):
        x = self.attention(x)
        return x if self.mlp is None else self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, attention=Attention, mlp=None, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList([Block(attention(), mlp() if mlp else None) for _ in range(depth)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
OURS = {"head-masked": HeadMaskedLoraConfig(ne=1), "ne=0": HeadMaskedLoraConfig(ne=0), "rlrr": RLRRConfig(ne=1)}
FOUND = r"blocks\.0\.attention\.q_proj.* ran without calling this layer .*exclude_modules="


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
@pytest.mark.parametrize("training", [False, True])
def test_found_in_the_first_pass(config, training):
    model = get_peft_model(Net(ReadingAttention), copy.deepcopy(config)).train(training)
    for _ in range(2):  # and in every other
        with pytest.raises(ValueError, match=FOUND):
            model(X)
    with pytest.raises(ValueError, match=FOUND), model.disable_adapter():
        model(X)


@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_refused_at_creation_where_the_code_shows_it(config):
    net = Net(PlainReadingAttention)
    with pytest.raises(ValueError, match=r"blocks\.\*\.attention\.q_proj.*PlainReadingAttention reads the weight"):
        get_peft_model(net, copy.deepcopy(config))
    assert not any(hasattr(module, "base_layer") for module in net.modules())


@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_nothing_is_left_after_the_first_pass(config):
    model = get_peft_model(Net(), copy.deepcopy(config))
    assert hooks(model)
    model(X)
    assert not hooks(model)


@pytest.mark.parametrize("method", [LoraConfig(target_modules=["q_proj"]), IA3Config(target_modules=["q_proj"], feedforward_modules=[])])  # fmt: skip
def test_other_methods(method):
    model = get_peft_model(Net(ReadingAttention), method)
    watch_calls(model)
    with pytest.raises(ValueError, match=FOUND):
        model(X)


@pytest.mark.parametrize("config", [RLRRConfig(target_modules=["fc1"]), HeadMaskedLoraConfig(ne=0, target_modules=["fc1"])])  # fmt: skip
def test_a_layer_of_any_module(config):
    model = get_peft_model(Net(mlp=ReadingMLP), config)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1: blocks\.0\.mlp ran without calling this layer"):
        model(X)


def test_a_layer_that_is_merely_not_used_is_no_error():
    model = get_peft_model(Net(mlp=ReadingMLP), RLRRConfig(target_modules=["unused", "q_proj"]))
    model(X)
    assert not hooks(model)


def test_skipped_modules_are_judged_when_they_run():
    """Examples are layer drop, and the predictor of V-JEPA 2."""
    model = get_peft_model(Net(), HeadMaskedLoraConfig(ne=1))
    blocks = model.get_base_model().blocks
    last = blocks[1]
    del blocks[1]
    model(X)
    last(X)
    assert not hooks(model) and not hooks(last)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])  # fmt: skip
def test_copies_are_judged_by_themselves(again):
    model = get_peft_model(Net(), HeadMaskedLoraConfig(ne=1))
    other = again(model)
    other(X)
    assert not hooks(other) and hooks(model)
    with pytest.raises(ValueError, match=FOUND):
        again(get_peft_model(Net(ReadingAttention), HeadMaskedLoraConfig(ne=1)))(X)


def test_layers_of_a_second_adapter():
    config = HeadMaskedLoraConfig(ne=0, target_modules=["out"])
    model = get_peft_model(Net(ReadingAttention), config)
    model(X)
    model.add_adapter("second", HeadMaskedLoraConfig(ne=1))
    with pytest.raises(ValueError, match=FOUND):
        model(X)
    # before a first pass as well
    model = get_peft_model(Net(), config)
    model.add_adapter("second", HeadMaskedLoraConfig(ne=1))
    model(X)
    assert not hooks(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_after_unloading(compiled):
    """Traces of an unloaded adapter cause no error for the next adapter or the base model."""
    net = get_peft_model(Net(ReadingAttention), HeadMaskedLoraConfig(ne=1)).unload()
    run = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    run(X)
    net = get_peft_model(Net(), HeadMaskedLoraConfig(ne=1)).unload()
    model = get_peft_model(net, HeadMaskedLoraConfig(ne=1, target_modules=["q_proj"]))
    (torch.compile(model, backend="eager") if compiled else model)(X)
    torch._dynamo.reset()


def test_injected_without_a_peft_model():
    model = inject_adapter_in_model(HeadMaskedLoraConfig(ne=1), Net(ReadingAttention))
    with pytest.raises(ValueError, match=FOUND):
        model(X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_new_model_is_traced():
    model = get_peft_model(Net(), HeadMaskedLoraConfig(ne=1)).eval()
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(model, X)(X), model(X))
    with pytest.raises(ValueError, match=FOUND):
        torch.jit.trace(get_peft_model(Net(ReadingAttention), HeadMaskedLoraConfig(ne=1)).eval(), X)


def test_a_new_model_is_compiled_whole_and_once():
    torch._dynamo.reset()
    model = get_peft_model(Net(), HeadMaskedLoraConfig(ne=1))
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    compiled(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(X + 1), compiled(X + 1))
    torch._dynamo.reset()
    model = get_peft_model(Net(ReadingAttention), HeadMaskedLoraConfig(ne=1))
    with pytest.raises(ValueError, match=FOUND):
        torch.compile(model, backend="eager")(X)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**tiny.batch()).loss.backward()
    tiny.gradients(model)


def test_multihead_attention_and_its_encoder_layer():
    """`out_proj` is read in any mode, the MLP in evaluation mode."""
    encoder = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)})
    for target, kind in {"out_proj": "MultiheadAttention", "linear1": r"torch\.nn\.TransformerEncoderLayer"}.items():
        config = HeadMaskedLoraConfig(ne=0, target_modules=[target])
        with pytest.raises(ValueError, match=f"{target}: .*{kind} reads the weight"):
            get_peft_model(copy.deepcopy(encoder), config)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        get_peft_model(encoder, HeadMaskedLoraConfig(ne=0, target_modules=["linear1"]))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*there is no place for a bias in the checkpoint format of VideoMAE")
@pytest.mark.parametrize("make_config", [HeadMaskedLoraConfig, RLRRConfig])
def test_videomae(make_config):
    """transformers 4 reads the weights of query and value, and is refused; transformers 5 calls the layers."""
    model = VideoMAEForVideoClassification(
        VideoMAEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32,
                       patch_size=8, num_frames=4)
    ).eval()  # fmt: skip
    if transformers.__version__.startswith("4."):
        with pytest.raises(ValueError, match=r"videomae\.encoder\.layer.*VideoMAESelfAttention reads the weight"):
            get_peft_model(model, make_config(ne=1))
        return
    video = torch.randn(2, 4, 3, 32, 32)
    before = model(pixel_values=video).logits
    model = get_peft_model(model, make_config(ne=1)).eval()
    for name, param in model.named_parameters():
        if "lora_B" in name or "rlrr_" in name:
            torch.nn.init.normal_(param)
    output = model(pixel_values=video, labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert not torch.allclose(output.logits, before, atol=1e-3)
    tiny.gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("make_config", [HeadMaskedLoraConfig, RLRRConfig])
@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_swin(version, make_config):
    """Its attention passes the weight of qkv to a function."""
    swin = pytest.importorskip("torchvision.models.swin_transformer", exc_type=ImportError)
    block = {1: swin.SwinTransformerBlock, 2: swin.SwinTransformerBlockV2}[version]
    merging = {1: swin.PatchMerging, 2: swin.PatchMergingV2}[version]
    model = swin.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=3, block=block, downsample_layer=merging
    )
    with pytest.raises(ValueError, match=r"attn\.qkv.*ShiftedWindowAttention.* reads the weight of this layer"):
        get_peft_model(model, make_config(ne=1))
