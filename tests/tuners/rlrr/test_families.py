"""RLRR on the families of vision models: the default targets, and the merged model."""

import copy
import itertools
import re
import warnings

import backbones
import pytest
import tiny
import torch
import transformers as hf
from peft import get_peft_model
from torch import nn

from peft_heads import RLRRConfig, get_head_masks
from peft_heads.backbones.structure import find_backbone


def resnet():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    return hf.ResNetForImageClassification(config)


def mobilevit():
    sizes = {
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [8] * 7,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    return hf.MobileViTForImageClassification(hf.MobileViTConfig(**sizes, image_size=32, num_labels=3))


def levit():
    sizes = {
        "hidden_sizes": [8, 16, 16],
        "num_attention_heads": [1, 2, 2],
        "key_dim": [4] * 3,
        "depths": [1] * 3,
        "image_size": 32,
    }
    return hf.LevitForImageClassification(hf.LevitConfig(**sizes, num_labels=3))


def hgnet():
    sizes = {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8],
        "stage_mid_channels": [8, 8],
        "stage_out_channels": [8, 16],
        "stage_num_blocks": [1, 1],
        "stage_downsample": [False, True],
        "stage_light_block": [False, True],
        "stage_kernel_size": [3, 3],
        "stage_numb_of_layers": [2, 2],
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    }
    model = hf.HGNetV2ForImageClassification(hf.HGNetV2Config(**sizes, num_labels=3))
    nn.init.normal_(model.fc.weight)  # trained in full, not rescaled: what changes before it must be seen
    return model


def mobilenet():
    config = hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3)
    return hf.MobileNetV2ForImageClassification(config)


def regnet():
    config = hf.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, layer_type="y", num_labels=3
    )
    return hf.RegNetForImageClassification(config)


def convnext():
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    return hf.ConvNextForImageClassification(config)


def without_qkv_bias():
    return hf.ViTForImageClassification(hf.ViTConfig(**backbones.VIT, **backbones.LABELS, qkv_bias=False))


FAMILIES = (
    *("vit", "deit", "deit with teacher", "beit", "dinov2", "swin", "swinv2"),
    *("clip classifier", "dinov3", "fused vit", "upernet swin", "siglip2 classifier"),
)
MAKERS = {name: backbones.FAMILIES[name].make for name in FAMILIES} | {
    "resnet": resnet,
    "regnet": regnet,
    "mobilenet": mobilenet,
    "mobilevit": mobilevit,
    "levit": levit,
    "hgnet": hgnet,
    "convnext": convnext,
    "vit without qkv bias": without_qkv_bias,
}
# per block (q, k, v or qkv, output, two of the MLP); norms of all blocks and the final one
SIZES = {
    "vit": (4, 6, 9),
    "deit": (4, 6, 9),
    "deit with teacher": (4, 6, 9),
    "beit": (4, 6, 9),
    "dinov2": (4, 6, 9),
    "swin": (3, 6, 7),
    "swinv2": (3, 6, 7),
    "clip classifier": (4, 6, 9),
    "dinov3": (4, 6, 9),
    "fused vit": (4, 2, 4),
    "siglip2 classifier": (4, 6, 9),  # not that of the attention pooling
    "vit without qkv bias": (4, 6, 9),
}
NO_PLACE = {
    "swinv2": "attention.self.key",
    "clip classifier": "vision_model.embeddings.patch_embedding",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* has batch norms"),
    pytest.mark.filterwarnings("ignore:.* there is no place for a bias in the checkpoint format"),
]


def create(name, seed=0, **options):
    torch.manual_seed(seed)
    base = MAKERS[name]().eval()
    for module in base.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):  # as of a trained one
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    model = get_peft_model(copy.deepcopy(base), RLRRConfig(**options)).eval()
    for key, param in model.named_parameters():
        if "rlrr_" in key:
            param.data += 0.1 * torch.randn_like(param)
    return base, model


def output(model):
    with torch.no_grad():
        return backbones.output(model, **backbones.inputs(getattr(model, "get_base_model", lambda: model)()))


def kinds(model):
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "rlrr_left"):
            found.setdefault(type(module).__name__, []).append(name)
    return found


@pytest.mark.parametrize("name", SIZES)
def test_default_targets(name):
    base, model = create(name)
    found = kinds(model)
    blocks, per_block, norms = SIZES[name]
    assert len(found["RLRRLinear"]) == blocks * per_block
    scaled = {True: [], False: []}
    for module in found["RLRRScale"]:
        scaled[isinstance(base.get_submodule(module), torch.nn.LayerNorm)].append(module)
    assert len(scaled[True]) == norms
    assert len(scaled[False]) == 1 and "patch" in scaled[False][0]
    assert "RLRRConv2d" not in found
    assert not any("classifier" in module or "position" in module for module in itertools.chain(*found.values()))


def test_default_targets_by_name():
    _, model = create("swin")
    roles = {re.sub(r"\d+", "*", name) for name in itertools.chain(*kinds(model).values())}
    block = "swin.encoder.layers.*.blocks.*."
    parts = find_backbone(MAKERS["swin"]())
    assert roles == {re.sub(r"\d+", "*", n) for n in (*parts.matrices, *parts.norms, parts.patch_embedding)}
    # neither the patches' merging nor the norm of the embeddings
    assert not any("downsample" in role or role == "swin.embeddings.norm" for role in roles)
    assert "swin.layernorm" in roles and all(r.startswith(("swin.layernorm", "swin.embed", block)) for r in roles)


def test_default_targets_of_a_convolutional_network():
    """All convolutions of a ResNet; of a ConvNeXt, its linear layers and layer norms as well."""
    base, model = create("resnet")
    convolutions = [n for n, module in base.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert kinds(model) == {"RLRRConv2d": convolutions}
    base, model = create("convnext")
    assert {kind: len(names) for kind, names in kinds(model).items()} == {
        "RLRRConv2d": 4,
        "RLRRLinear": 4,
        "RLRRScale": 5,
    }


@pytest.mark.parametrize("name", MAKERS)
def test_merge(name, tmp_path):
    base, model = create(name)
    expected = output(model)
    before = copy.deepcopy(model.state_dict())
    if name != "upernet swin":  # its trained classifier has a batch norm in between
        assert (expected - output(base)).abs().max() > 0.01
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    if name in NO_PLACE:
        with pytest.raises(
            ValueError, match=f"{NO_PLACE[name]}.*no place for a bias in the checkpoint.*shift_without_bias=False"
        ):
            model.merge_and_unload()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        base, model = create(name, shift_without_bias=False)
        expected = output(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)
    if hasattr(merged, "save_pretrained"):
        merged.save_pretrained(tmp_path)
        loaded, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(output(loaded.eval()), expected, rtol=1e-4, atol=1e-5)
    else:
        assert merged.state_dict().keys() == base.state_dict().keys()


def test_a_checkpoint_that_can_be_asked_for_biases():
    base, model = create("vit without qkv bias")
    assert model.merge_and_unload().config.qkv_bias is True and base.config.qkv_bias is False


@pytest.mark.parametrize("zeros", [[], ["v_proj"]], ids=["not targeted", "targeted, not shifted"])
def test_a_setting_that_asks_for_more_biases_than_there_are(zeros, tmp_path):
    """Only q needs a bias; with qkv_bias k and v get biases as well, which are zero."""
    base, model = create("vit without qkv bias", target_modules=tiny.now(["q_proj", *zeros]))
    for name, param in model.named_parameters():
        if "rlrr_shift" in name and "q_proj" not in name and "query" not in name:
            param.data.zero_()
    expected = output(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(output(loaded.eval()), expected, rtol=1e-4, atol=1e-5)
    biases = {key: value for key, value in loaded.state_dict().items() if key.endswith("bias")}
    added = biases.keys() - base.state_dict().keys()
    assert len(added) == 3 * loaded.config.num_hidden_layers
    assert sum(biases[key].count_nonzero() > 0 for key in added) == loaded.config.num_hidden_layers
    assert not any(merged.get_parameter(key).requires_grad for key in added)


def test_a_pooling_is_not_the_backbones():
    """SigLIP's classifier never calls its attention pooling; every adapted module must have a gradient."""
    family = backbones.FAMILIES["siglip classifier"]
    model = get_peft_model(family.make(), RLRRConfig(init="normal"))
    output = backbones.output(model, **backbones.inputs(model.get_base_model()))
    output.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_layer_under_two_names():
    """The setting gives a block's alias a bias, which is the block's trained bias."""
    torch.manual_seed(0)
    base = MAKERS["vit without qkv bias"]().eval()
    blocks = base.get_submodule(tiny.now("vit.layers.0.mlp.fc1").partition(".0.")[0])
    blocks[1] = blocks[0]
    model = get_peft_model(base, RLRRConfig()).eval()
    for key, param in model.named_parameters():
        if "rlrr_" in key:
            param.data += 0.1 * torch.randn_like(param)
    expected = output(model)
    torch.testing.assert_close(output(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_modules_trained_in_full():
    """These are batch norms, as the warning advises, and a projection to which the setting gives a bias."""
    _, model = create("resnet", modules_to_save=["classifier", "normalization"])
    expected = output(model)
    torch.testing.assert_close(output(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
    q, v = tiny.now(["q_proj", "v_proj"])
    _, model = create("vit without qkv bias", target_modules=[q], modules_to_save=["classifier", v])
    expected = output(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)
    biases = [module.bias for name, module in merged.named_modules() if name.endswith((q, v))]
    assert biases and not any(bias is None for bias in biases)


class Settings(hf.PreTrainedConfig if hasattr(hf, "PreTrainedConfig") else hf.PretrainedConfig):
    def __init__(self, table_bias=False, all_bias=False, kind="plain", **kwargs):
        super().__init__(**kwargs)
        self.table_bias, self.all_bias, self.kind = table_bias, all_bias, kind


class Network(hf.PreTrainedModel):
    """One linear layer, to which two settings would give a bias; the first adds something else as well."""

    config_class = Settings

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(3, 3, bias=config.table_bias or config.all_bias)
        self.second = nn.Linear(3, 3, bias=config.all_bias)
        if config.table_bias:
            self.table = nn.Parameter(torch.zeros(3))
        if config.kind == "asks":
            torch.ones(1).sum().item()
        self.post_init()

    def forward(self, x):
        return self.second(self.first(x))


def network(kind="plain", target_modules=("first",)):
    torch.manual_seed(0)
    model = get_peft_model(Network(Settings(kind=kind)), RLRRConfig(target_modules=list(target_modules)))
    for key, param in model.named_parameters():
        if "rlrr_" in key:
            param.data += 0.1 * torch.randn_like(param)
    return model


def test_a_setting_that_adds_something_else():
    model, x = network(), torch.randn(2, 3)
    expected = model(x)
    merged = model.merge_and_unload()
    assert merged.config.all_bias and not merged.config.table_bias
    assert merged.second.bias.count_nonzero() == 0 and merged.first.bias.count_nonzero() == 3
    torch.testing.assert_close(merged(x), expected)


def test_merged_before_unloading_with_a_layer_that_is_not_shifted():
    model, x = network(target_modules=["first", "second"]), torch.randn(2, 3)
    model.get_base_model().second.rlrr_shift["default"].data.zero_()
    expected = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="[Aa]lready merged"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert merged.config.all_bias and merged.second.bias.count_nonzero() == 0


def test_a_model_that_cannot_be_built():
    """It is then unknown whether a checkpoint has a place for biases: the adapter trains, but does not merge."""
    expected = "first: whether there is a place .* of Network is not known, since .*item.* called on meta tensors"
    with pytest.warns(UserWarning, match=f"{expected}.*merge_and_unload.. will refuse"):
        model = network("asks")
    with pytest.raises(ValueError, match=f"{expected}.*shift_without_bias=False"):
        model.merge_and_unload()


def test_nothing_to_merge():
    base, model = create("resnet")
    merged = model.merge_and_unload(adapter_names=[])
    assert torch.equal(output(merged), output(base))


def test_a_merged_model_without_a_place_is_unloaded():
    """The merged model is right in memory, but would be saved without its shift."""
    _, model = create("swinv2")
    expected = output(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="attention.self.key: there is no place .* unmerge_adapter.. before unload"):
        unloaded = model.unload()
    torch.testing.assert_close(output(unloaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8)], ids=str)
def test_norms_without_running_statistics(norm):
    """Such norms have no running mean that could take a shift."""
    torch.manual_seed(0)
    base = MAKERS["resnet"]().eval()
    base.resnet.embedder.embedder.normalization = norm
    model = get_peft_model(base, RLRRConfig())
    base.resnet.embedder.embedder.convolution.rlrr_shift["default"].data += 1
    with pytest.raises(ValueError, match="resnet.embedder.embedder.convolution: there is no place"):
        model.merge_and_unload()


@pytest.mark.parametrize("name", ["beit", "resnet", "vit without qkv bias"])
@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_merged_before_unloading(name, unload):
    """The biases that `merge_adapter` has written reach the checkpoint format as well."""
    _, model = create(name)
    expected = output(model)
    keys = create(name)[1].merge_and_unload().state_dict().keys()
    model.merge_adapter()
    if unload == "unload":
        merged = model.unload()
    else:
        with pytest.warns(UserWarning, match="[Aa]lready merged"):
            merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == keys


def test_unloading_needs_no_place():
    base, model = create("swinv2")
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(output(unloaded), output(base))


def test_a_classifier_without_a_head_s_name_is_trained():
    """HGNet's `fc` is as large as the number of labels, and no matrix of the backbone."""
    _, model = create("hgnet")
    assert list(model.peft_config["default"].modules_to_save) == ["fc"]
    assert not any(".fc" in name for name in kinds(model)["RLRRConv2d"]) and "RLRRLinear" not in kinds(model)


@pytest.mark.parametrize("name", ["resnet", "regnet", "hgnet"])
def test_a_batch_norm_takes_the_shift(name):
    """It takes the shift of the convolution before it; other batch norms do not change."""
    base, model = create(name)
    shifts = {n: m.shift("default").detach() for n, m in model.get_base_model().named_modules() if hasattr(m, "shift")}
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    before, after = dict(base.named_buffers()), dict(merged.named_buffers())
    assert all(before[key].count_nonzero() for key in before if key.endswith("running_mean"))
    taken = {n.replace("convolution", "normalization") + ".running_mean": f for n, f in shifts.items()}
    found = [key for key in before if key.endswith("running_mean")]
    assert found and all(torch.equal(after[key], before[key] - taken[key]) for key in found)


@pytest.mark.parametrize("name", NO_PLACE)
def test_shifts_without_a_place_are_warned_of(name):
    """The warning comes when the adapter is made, not after it has been trained."""
    expected = f"{NO_PLACE[name]}.*merge_and_unload.. will refuse.*shift_without_bias=False"
    with pytest.warns(UserWarning, match=expected):
        get_peft_model(MAKERS[name](), RLRRConfig())
    with pytest.warns(UserWarning, match=expected):
        get_peft_model(MAKERS[name](), RLRRConfig(init="zero"))


@pytest.mark.parametrize("name", ["vit", "beit", "vit without qkv bias", "convnext"])
def test_nothing_else_is_warned_of(name):
    with pytest.warns() as caught:
        warnings.warn("so that there is one")
        model = get_peft_model(MAKERS[name](), RLRRConfig())
        model.add_adapter("other", RLRRConfig())
    assert [str(w.message) for w in caught if w.category is UserWarning] == ["so that there is one"]


def test_adapters_that_do_not_train_are_not_warned_of():
    with pytest.warns() as caught:
        warnings.warn("so that there is one")
        for options in ({"shift_without_bias": False}, {"inference_mode": True}):
            get_peft_model(MAKERS["swinv2"](), RLRRConfig(**options))
    assert [str(w.message) for w in caught if w.category is UserWarning] == ["so that there is one"]


def test_a_new_adapter_needs_no_place_for_its_shift(tmp_path):
    """f is still zero, so nothing is lost."""
    torch.manual_seed(0)
    base = MAKERS["swinv2"]().eval()
    model = get_peft_model(copy.deepcopy(base), RLRRConfig()).eval()
    expected = output(model)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


def test_a_plain_module_keeps_its_biases():
    """A model without a checkpoint format gets biases where it had none."""
    base = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(16, 2, bias=False)
    )
    x = torch.randn(2, 3, 4, 4)
    model = get_peft_model(copy.deepcopy(base), RLRRConfig(target_modules=["0", "2"]))
    for param in model.parameters():
        if param.requires_grad:
            param.data += 0.1 * torch.randn_like(param)
    expected = model(x)
    merged = model.merge_and_unload()
    assert merged[0].bias is not None and merged[2].bias is not None
    torch.testing.assert_close(merged(x), expected)


def test_heads_of_a_fused_projection():
    """Heads of q and v are masked, those of k are not; keys are rescaled nevertheless."""
    _, model = create("fused vit", ne=1)
    masks = get_head_masks(model)
    assert {name.rpartition(".")[2] for name in masks} == {"q", "v"}
    (layer, *_) = (m for m in model.modules() if getattr(m, "head_layout", None))
    before = layer.get_delta_weight("default")
    mask = torch.ones(12, dtype=torch.bool)
    mask[[0, 7]] = False  # head 0 of q, head 1 of v
    layer.set_head_mask("default", mask)
    change = layer.get_delta_weight("default")
    off = [*range(0, 4), *range(48 + 4, 48 + 8)]
    on = [row for row in range(72) if row not in off]
    assert change[off].count_nonzero() == 0 and torch.equal(change[on], before[on])
    assert layer.active_rows("default").nonzero().flatten().tolist() == on


def test_batch_norms_are_warned_of():
    for model in (resnet().train(), resnet().eval()):  # as from_pretrained gives it
        with pytest.warns(UserWarning, match="running statistics move"):
            get_peft_model(model, RLRRConfig())


def test_unrecognised_attention_is_no_convolutional_network():
    """Layers of quantisation libraries are no nn.Linear; nothing else is adapted instead."""
    vit = tiny.make("vit")
    for module in list(vit.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child))
    with pytest.raises(
        ValueError, match="no block with an attention layer, and no convolution, was recognised in ViT"
    ):
        get_peft_model(vit, RLRRConfig(modules_to_save=[]))


class Packed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.register_buffer("qweight", layer.weight.to(torch.int8))
