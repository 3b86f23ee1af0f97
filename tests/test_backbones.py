"""Every family of backbones: the modules adapted without `target_modules`, and the rows that belong to each head."""

import copy
import json
import re
from contextlib import nullcontext

import backbones
import pytest
import tiny
import torch
from backbones import FAMILIES, FusedAttention, FusedViT
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, HeadScorer, TaylorHeadScorer, get_head_masks, set_head_masks
from peft_heads.backbones.classifier import classifier_names
from peft_heads.backbones.targets import default_targets
from peft_heads.heads.detect import resolve_heads


# PVT-v2, SegFormer and Hiera begin with a stage of one head, which ne=1 keeps with a warning
pytestmark = pytest.mark.filterwarnings("ignore:ne=1. . group.s. with no more heads")


def build(name):
    if "timm" in name:
        try:
            import timm  # noqa: F401
        except Exception as error:
            pytest.skip(f"timm does not import here (it needs torchvision): {error}")
    model = FAMILIES[name].make().eval()
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():  # some families begin with next to nothing (SAM: 1e-10)
        if param.dim() > 1:
            param.data.normal_(std=0.2, generator=generator)
    return model


def adapted(name, **config):
    """Return a base model, and a copy of it with an adapter on default targets whose update is not zero."""
    base = build(name)
    model = get_peft_model(copy.deepcopy(base), HeadMaskedLoraConfig(ne=1, **config)).eval()
    randomize(model)
    return base, model


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for parameter_name, param in model.named_parameters():
        if "lora_B" in parameter_name:
            param.data.normal_(std=0.5, generator=generator)


def lora_layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}


def deactivate(model, head):
    """Deactivate the head in every projection that has more than one."""
    masks = {name: mask for name, mask in get_head_masks(model).items() if len(mask) > 1}
    for mask in masks.values():
        mask[head] = False
    set_head_masks(model, masks)


def num_heads_of(attention):
    return attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads


def edit(base, model, head):
    """Add the update to the weights of `base`, row by row, without the given head and without the keys."""
    for name, layer in lora_layers(model).items():
        weight = base.get_submodule(name).weight
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        num_heads = num_heads_of(base.get_submodule(name.rpartition(".")[0]))
        parts = 3 if name.endswith("qkv") else 1
        head_dim = weight.shape[0] // parts // num_heads
        for row in range(weight.shape[0]):
            part, row_in_part = divmod(row, num_heads * head_dim)
            if part != 1 and (num_heads == 1 or row_in_part // head_dim != head):
                weight.data[row] += delta[row].detach()


def forward(model):
    with torch.no_grad():
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        dtype = next(model.parameters()).dtype
        inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in backbones.inputs(base).items()}
        return backbones.output(model, **inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_finds_projections_and_classifiers(name):
    family = FAMILIES[name]
    _, model = adapted(name)
    names = list(lora_layers(model))
    assert len(names) == family.layers * len(family.projections)
    before_5_18 = ("query", "value") if tiny.VERSION < Version("5.18") else ()
    assert {n.rpartition(".")[2] for n in names} in (set(family.projections), set(before_5_18))
    assert tiny.OLD_NAMES or all(n.startswith(family.prefix) for n in names)

    layouts = resolve_heads(model.get_base_model())
    attention = {n: num_heads_of(model.get_base_model().get_submodule(n.rpartition(".")[0])) for n in names}
    assert tuple(sorted(set(attention.values()))) == family.heads
    expected = {}
    for n, heads in attention.items():
        assert [part.num_heads for part in layouts[n].parts] == [heads] * (3 if n.endswith("qkv") else 1)
        expected.update(dict.fromkeys([f"{n}.q", f"{n}.v"] if n.endswith("qkv") else [n], heads))
    assert {n: len(mask) for n, mask in get_head_masks(model).items()} == expected

    trained = {n.partition(".modules_to_save")[0] for n, _ in model.get_base_model().named_modules() if "modules_to_save.default" in n}  # fmt: skip
    assert trained == set(family.classifiers)
    others = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert all(".modules_to_save.default." in n for n in others)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("head", [0, -1])
def test_output_equals_an_edited_model(name, head):
    base, model = adapted(name)
    if name != "clip":  # before transformers 5.0 its text tower overflows in float64
        base, model = base.double(), model.double()
    before = forward(model)
    deactivate(model, head)
    reference = copy.deepcopy(base)
    for layer_name in lora_layers(model):  # -1 is another index in each stage
        attention = reference.get_submodule(layer_name.rpartition(".")[0])
        assert num_heads_of(attention) in FAMILIES[name].heads
    heads = {n: num_heads_of(base.get_submodule(n.rpartition(".")[0])) for n in lora_layers(model)}
    for count in set(heads.values()):  # stage by stage, each with its own index of the head
        part = copy.deepcopy(base)
        edit(part, model, head % count)
        for layer_name, layer_heads in heads.items():
            if layer_heads == count:
                reference.get_submodule(layer_name).weight.data = part.get_submodule(layer_name).weight.data
    expected = forward(reference)
    scale = expected.abs().max()
    assert (forward(model) - expected).abs().max() < (1e-5 if name == "clip" else 1e-10) * scale
    assert (before - expected).abs().max() > 1e-3 * scale  # the head did matter


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scope", ["adapter", "head"])
def test_context_of_the_head(name, scope):
    """The rows belong to the head, as seen where the attention layer puts the heads' outputs side by side."""
    base, model = adapted(name, mask_scope=scope)
    names = [n for n in lora_layers(model) if num_heads_of(base.get_submodule(n.rpartition(".")[0])) > 1]
    attention = names[0].rpartition(".")[0]
    num_heads = num_heads_of(base.get_submodule(attention))
    for layer_name, layer in lora_layers(model).items():  # in one layer only, so that its input stays the same
        if not layer_name.startswith(attention + "."):
            layer.lora_B["default"].weight.data.zero_()
    place = FAMILIES[name].output
    if place == "o_proj" and not hasattr(base.get_submodule(attention), place):
        place = "^output.dense"  # the form of transformers before 5.9 (DINOv2: 5.18)
    place = f"{attention.rpartition('.')[0]}.{place[1:]}" if place.startswith("^") else f"{attention}.{place}"

    def context(model):
        root, seen = (model.get_base_model() if isinstance(model, PeftModel) else model), []
        handle = root.get_submodule(place).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        forward(model)
        handle.remove()
        return seen[0].unflatten(-1, (num_heads, -1))  # (…, num_heads, head_dim)

    frozen, free = context(base), context(model)
    head = 1
    masks = {n: m for n, m in get_head_masks(model).items() if n.startswith(attention + ".")}
    for mask in masks.values():
        mask[head] = False
    set_head_masks(model, masks)
    masked = context(model)
    expected = free.clone()
    expected[..., head, :] = frozen[..., head, :] if scope == "adapter" else 0
    assert torch.allclose(masked, expected, atol=1e-6)
    assert not torch.allclose(free[..., head, :], frozen[..., head, :], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_saves_and_reloads_exactly(name, tmp_path):
    base, model = adapted(name)
    deactivate(model, 1)
    for module in FAMILIES[name].classifiers:
        for param in model.get_base_model().get_submodule(module).modules_to_save["default"].parameters():
            param.data += 0.1
    model.save_pretrained(tmp_path)
    # trainable like the other: torch multiplies a weight that requires gradients in another order of rounding
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    assert torch.equal(forward(again), forward(model))
    assert str(get_head_masks(again)) == str(get_head_masks(model))
    again.load_adapter(tmp_path, "second", is_trainable=True)
    again.set_adapter("second")
    assert torch.equal(forward(again), forward(model))
    assert torch.equal(forward(model.merge_and_unload()), forward(again.merge_and_unload()))


@pytest.mark.parametrize(
    "name", ["deit with teacher", "clip", "hiera", "beit segmentation", "fused vit", "segformer segmentation"]
)
def test_a_second_adapter_finds_the_same(name):
    _, model = adapted(name)
    model.add_adapter("second", HeadMaskedLoraConfig(ne=1))
    first, second = model.peft_config["default"], model.peft_config["second"]
    assert first.target_modules == second.target_modules
    assert first.modules_to_save == second.modules_to_save
    base = model.get_base_model()
    assert default_targets(base) == default_targets(build(name))
    assert classifier_names(base) == classifier_names(build(name)) == list(FAMILIES[name].classifiers)


# Attention to a single key does not depend on the query (segformer's, in such small images); BEiT's last layer lies
# behind the last one that its classifier reads.
WITHOUT_GRADIENT = {"segformer segmentation": "q", "beit segmentation": "layer.*3"}


@pytest.mark.parametrize("name", ["segformer segmentation", "beit segmentation", "upernet swin"])
def test_segmentation_trains_and_saves_its_classifier(name, tmp_path):
    base, model = adapted(name)
    head = FAMILIES[name].classifiers[0]
    wrapper = model.get_base_model().get_submodule(head)
    start = copy.deepcopy(wrapper.modules_to_save["default"].state_dict())
    images = backbones.inputs(base)["pixel_values"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scorer = HeadScorer(model)
    labels = torch.zeros(2, backbones.IMAGE_SIZE, backbones.IMAGE_SIZE, dtype=torch.long)
    model.train()
    losses = []
    for _ in range(3):
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        scorer.update()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    silent = WITHOUT_GRADIENT.get(name)
    with pytest.warns(UserWarning, match=f"no gradient has reached .*{silent}") if silent else nullcontext():
        masks = scorer.apply(optimizer)
    assert not all(mask.all() for mask in masks.values())
    model.eval()
    assert any(not torch.equal(v, start[k]) for k, v in wrapper.modules_to_save["default"].state_dict().items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    assert torch.equal(forward(again), forward(model))


# Fused projections


@pytest.mark.parametrize("scope", ["adapter", "head"])
@pytest.mark.parametrize("ne", [0, 1])
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_keys_of_a_fused_projection_never_change(ne, scope, extra):
    base = build("fused vit")
    model = get_peft_model(copy.deepcopy(base), HeadMaskedLoraConfig(ne=ne, mask_scope=scope, **extra)).eval()
    randomize(model)
    if ne:
        deactivate(model, 1)
    keys = slice(24, 48)
    values = torch.randn(2, 5, 24)
    layer = next(iter(lora_layers(model).values()))
    assert layer.get_delta_weight("default")[keys].count_nonzero() == 0
    expected = layer.base_layer(values)[..., keys]
    assert torch.equal(layer(values)[..., keys], expected)
    assert not torch.allclose(layer(values)[..., :24], layer.base_layer(values)[..., :24])
    before, weight = forward(model), layer.base_layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.base_layer.weight[keys], weight[keys])
    assert torch.allclose(forward(model), before, atol=1e-5)
    layer.unmerge()
    assert torch.allclose(layer.base_layer.weight, weight, atol=1e-6)
    assert torch.equal(layer.base_layer.weight[keys], weight[keys])

    model.train()
    model(x=backbones.inputs(base)["x"]).square().sum().backward()
    gradient = layer.lora_B["default"].weight.grad
    assert gradient[keys].count_nonzero() == 0
    assert gradient[:24].count_nonzero() > 0


def test_file_of_a_fused_projection_is_a_plain_lora(tmp_path):
    from safetensors.torch import load_file

    _, model = adapted("fused vit")
    deactivate(model, 1)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    updates = [tensor for name, tensor in file.items() if "lora_B" in name]
    assert updates
    for tensor in updates:
        zero = [row for row in range(72) if not tensor[row].any()]
        assert zero == [*range(4, 8), *range(24, 48), *range(52, 56)]


def test_all_parts_of_a_fused_projection():
    """`fused_parts="qkv"` equals stock LoRA until heads are deactivated; then all three parts lose them."""
    from peft import LoraConfig

    base = build("fused vit")
    models = []
    for config in (
        LoraConfig(target_modules=["qkv"], modules_to_save=["head"]),
        HeadMaskedLoraConfig(ne=0, fused_parts="qkv"),
        HeadMaskedLoraConfig(ne=1, fused_parts="qkv"),
    ):
        torch.manual_seed(3)
        models.append(get_peft_model(copy.deepcopy(base), config).eval())
        randomize(models[-1])
    stock, plain, masked = models
    assert torch.equal(forward(plain), forward(stock))
    assert torch.equal(forward(masked), forward(stock))
    assert [n[-1] for n in get_head_masks(masked)] == list("qkv" * 4)
    deactivate(masked, 2)
    delta = next(iter(lora_layers(masked).values())).get_delta_weight("default")
    off = [row for row in range(72) if not delta[row].any()]
    assert off == [*range(8, 12), *range(32, 36), *range(56, 60)]


def test_a_stock_adapter_of_a_fused_model_keeps_its_keys(tmp_path):
    from peft import LoraConfig

    base = build("fused vit")
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["qkv"], modules_to_save=["head"])).eval()
    randomize(stock)
    stock.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=HeadMaskedLoraConfig.from_lora(tmp_path))
    assert torch.equal(forward(ours.eval()), forward(stock))


def test_scores_of_a_fused_projection():
    """Taylor scores of q and v, from the gradient of the unmasked parameters sliced by hand."""
    _, model = adapted("fused vit")
    scorer = HeadScorer(model)
    model(x=backbones.inputs(model.get_base_model())["x"]).square().sum().backward()
    scorer.update()
    scores, norms = scorer.scores("absolute"), scorer.scores("weight_norm")
    for name, layer in lora_layers(model).items():
        weight = layer.lora_B["default"].weight
        for part, first in (("q", 0), ("v", 48)):
            for head in range(6):
                rows = slice(first + head * 4, first + head * 4 + 4)
                expected = (weight.detach()[rows].double() * weight.grad[rows].double()).abs().sum()
                assert torch.allclose(scores[f"{name}.{part}"][head], expected)
                assert torch.allclose(norms[f"{name}.{part}"][head], weight.detach()[rows].double().norm())
    masks = scorer.apply()
    total = sum(scores.values())
    assert {n: (~m).nonzero().item() for n, m in masks.items()} == dict.fromkeys(scores, int(total.argmin()))
    for layer in lora_layers(model).values():
        head = int(total.argmin())
        assert layer.lora_B["default"].weight[48 + 4 * head : 52 + 4 * head].count_nonzero() == 0


def test_trainer_on_a_fused_projection(tmp_path):
    base, model = adapted("hiera")
    images = backbones.inputs(base)["pixel_values"]
    examples = [{"pixel_values": images[i % 2], "labels": i % 2} for i in range(8)]
    args = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(model, args, train_dataset=examples, callbacks=[TaylorHeadScorer(select_at=2)]).train()
    masks = get_head_masks(model)
    assert [int((~mask).sum()) for mask in masks.values()] == [0, 0, 1, 1, 1, 1]  # stages of 1, 2 and 4 heads
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert set(report["scores"]["absolute"]) == set(masks)
    assert (tmp_path / "head_scores.png").exists()


def test_q_and_v_of_a_fused_projection_may_differ():
    _, model = adapted("fused vit", joint=False)
    name = "blocks.0.attn.qkv"
    set_head_masks(model, {f"{name}.v": torch.arange(6) != 3})
    masks = get_head_masks(model)
    assert masks[f"{name}.q"].all() and (~masks[f"{name}.v"]).nonzero().tolist() == [[3]]
    assert not lora_layers(model)[name].get_delta_weight("default")[60:64].any()
    with pytest.raises(ValueError, match=r"no heads in a module 'blocks.0.attn.qkv'; it has: blocks.0.attn.qkv.q"):
        set_head_masks(model, {name: torch.ones(12, dtype=torch.bool)})


@pytest.mark.parametrize("combination_type", ["linear", "svd", "cat"])
def test_weighted_adapters_of_a_fused_projection(combination_type):
    _, model = adapted("fused vit", modules_to_save=[])
    model.add_adapter("other", HeadMaskedLoraConfig(ne=1, modules_to_save=[]))
    randomize(model)
    name = "blocks.0.attn.qkv"
    set_head_masks(model, {f"{name}.v": torch.arange(6) != 3})
    set_head_masks(model, {f"{name}.v": torch.arange(6) > 3}, "other")
    layer = lora_layers(model)[name]
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type=combination_type)
    if combination_type == "cat":  # "linear" adds the factors, "svd" keeps the rank of one
        assert torch.allclose(layer.get_delta_weight("sum"), expected, atol=1e-4)
    assert not layer.get_delta_weight("sum")[[*range(24, 48), *range(60, 64)]].any()
    assert get_head_masks(model, "sum")[f"{name}.v"].tolist() == [True, True, True, False, True, True]


def test_weighted_adapters_of_different_parts_are_refused():
    _, model = adapted("fused vit")
    model.add_adapter("other", HeadMaskedLoraConfig(ne=1, fused_parts="qkv"))
    with pytest.raises(ValueError, match=r"\(fused_parts\) cannot be combined; in model.blocks.0.attn.qkv they have"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


@pytest.mark.slow
def test_masks_of_a_fused_projection_do_not_recompile():
    _, model = adapted("fused vit")
    layer = lora_layers(model)["blocks.0.attn.qkv"]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    values = torch.randn(2, 5, 24)
    compiled(values)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for head in range(3):
            deactivate(model, head)
            assert torch.allclose(compiled(values), layer(values), atol=1e-6)
    torch._dynamo.reset()


def test_edited_keys_of_a_fused_file_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base, model = adapted("fused vit")
    deactivate(model, 1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in tensors if "lora_B" in k)
    tensors[key][30] = 1.0
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"attn.qkv.*fused_parts is 'qv'; the deactivated rows of lora_B.weight must be zero"
    ):
        PeftModel.from_pretrained(base, tmp_path)


# Models that are refused


class GroupedQueryAttention(FusedAttention):
    def __init__(self):
        nn.Module.__init__(self)
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)


def test_joint_needs_as_many_heads_in_v_as_in_q():
    model = nn.Sequential(nn.ModuleDict({"attention": GroupedQueryAttention()}))
    with pytest.raises(ValueError, match=r"q_proj has 4 heads and 0.attention.v_proj has 2; pass joint=False"):
        get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=1))
    masks = get_head_masks(get_peft_model(model, HeadMaskedLoraConfig(ne=1, joint=False)))
    assert [len(mask) for mask in masks.values()] == [4, 2]


class FusedGroupedQueryAttention(nn.Module):
    """4 query heads and 2 key and value heads, of 2 rows."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.qkv = nn.Linear(8, 16)


def test_fused_projection_with_fewer_key_value_heads():
    model = nn.Sequential(nn.ModuleDict({"attn": FusedGroupedQueryAttention()}))
    with pytest.raises(ValueError, match=r"attn.qkv.q has 4 heads and 0.attn.qkv.v has 2; pass joint=False"):
        get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=1))
    model = get_peft_model(model, HeadMaskedLoraConfig(ne=1, joint=False))
    randomize(model)
    set_head_masks(model, {"0.attn.qkv.q": torch.arange(4) != 3, "0.attn.qkv.v": torch.arange(2) != 0})
    delta = lora_layers(model)["0.attn.qkv"].get_delta_weight("default")
    assert [row for row in range(16) if not delta[row].any()] == [6, 7, *range(8, 12), 12, 13]


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_initialisations_that_need_all_rows(option):
    """They move part of the keys into the adapter, which does not adapt keys even with ne=0."""
    with pytest.raises(
        ValueError, match=r"cannot be combined with fused_parts='qv' on a fused.*pass fused_parts=\"qkv"
    ):
        get_peft_model(FusedViT(), HeadMaskedLoraConfig(ne=0, **option))
    base = build("fused vit")
    model = get_peft_model(copy.deepcopy(base), HeadMaskedLoraConfig(ne=0, fused_parts="qkv", **option))
    assert torch.allclose(forward(model.eval()), forward(base), atol=1e-5)
    get_peft_model(FusedViT(), HeadMaskedLoraConfig(ne=0, **option, target_modules=["proj"], modules_to_save=[]))


class QuantisedLinear(nn.Linear):
    """A stand-in for a bitsandbytes layer."""


@pytest.mark.parametrize("ne", [0, 1])
def test_a_quantised_fused_projection_is_refused(ne):
    model = FusedViT()
    model.blocks[0].attn.qkv = QuantisedLinear(24, 72)
    with pytest.raises(ValueError, match="qkv is a QuantisedLinear .*for which head masks are not implemented"):
        get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=ne))
    get_peft_model(model, HeadMaskedLoraConfig(ne=0, fused_parts="qkv"))


def test_towers_for_text_are_never_adapted():
    import transformers as hf

    decoder = hf.BertConfig(is_decoder=True, add_cross_attention=True, num_hidden_layers=1, hidden_size=12,
                            num_attention_heads=2, intermediate_size=8, vocab_size=20)  # fmt: skip
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**backbones.VIT), decoder)
    model = hf.VisionEncoderDecoderModel(config)
    assert len(resolve_targets(model)) == 8
    assert all(name.startswith(("encoder.layers.", "encoder.encoder.")) for name in resolve_targets(model))
    assert classifier_names(model) == ["enc_to_dec_proj"]  # new; the decoder is a pre-trained model

    # a vision tower without attention: nothing is found, and not the text tower
    model = nn.Module()
    model.config = hf.CLIPConfig(text_config=backbones.TEXT, vision_config=backbones.VIT)
    model.text_model = hf.CLIPTextModel(model.config.text_config)
    model.vision_model = nn.Conv2d(3, 8, 1)
    model.vision_model.config = model.config.vision_config
    assert default_targets(model) == []
    # or one that no configuration names
    del model.config
    assert default_targets(model) == []


def test_classifiers_of_segmentation_transformers():
    import transformers as hf

    swin = hf.SwinConfig(**{**backbones._UPERNET_SWIN, "embed_dim": 8})
    config = hf.Mask2FormerConfig(
        backbone_config=swin, num_labels=7, hidden_dim=32, feature_size=32, mask_feature_size=32, decoder_layers=2,
        encoder_layers=1, encoder_feedforward_dim=16, dim_feedforward=16, num_attention_heads=2, num_queries=5,
    )  # fmt: skip
    model = hf.Mask2FormerForUniversalSegmentation(config)
    assert classifier_names(model) == ["class_predictor"]
    assert all(".encoder." in name and "pixel_level_module" in name for name in resolve_targets(model))


def resolve_targets(model):
    targets = default_targets(model)
    return [n for n in resolve_heads(model) if n in targets or n.rpartition(".")[2] in targets]


class UnknownAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


def test_an_unknown_architecture_says_what_was_found_and_the_way_out():
    model = nn.Sequential(nn.ModuleDict({"attention": UnknownAttention()}), nn.Linear(8, 3))
    with pytest.raises(ValueError) as error:
        get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=1))
    message = str(error.value)
    assert "no attention layer was recognised in Sequential" in message
    assert "Its linear layers: 0.attention.to_q, 0.attention.to_k, 0.attention.to_v, 1" in message
    assert 'num_heads={"to_q": 12, "to_v": 12}' in message
    with pytest.raises(ValueError, match=r"no target has attention heads.*num_heads=\{\"to_q\": 12\}"):
        get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=1, target_modules=["to_q", "to_v"]))
    # the way out
    config = HeadMaskedLoraConfig(ne=1, target_modules=["to_q", "to_v"], num_heads={"to_q": 4, "to_v": 4})
    assert {len(mask) for mask in get_head_masks(get_peft_model(model, config)).values()} == {4}


class BiasedAttention(FusedAttention):
    """timm's BEiT: the bias lies beside the projection, whose weight is read."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.q_bias = nn.Parameter(torch.zeros(dim))


@pytest.mark.parametrize("ne", [0, 1])
def test_a_projection_that_is_never_called_is_refused(ne):
    model = FusedViT()
    model.blocks[1].attn = BiasedAttention(24, 6)
    with pytest.raises(ValueError, match=r"attn.qkv: the attention layer reads the weight.*qkv_bias_separate = True"):
        get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=ne))
    model.blocks[1].attn.qkv_bias_separate = True
    get_peft_model(model, HeadMaskedLoraConfig(ne=ne))


def test_names_that_peft_would_read_too_widely():
    """`auxiliary_head` and `auxiliary_head.head` end with `head` as well; nothing is wrapped twice."""
    import transformers as hf

    config = hf.DPTConfig(
        **backbones.VIT,
        num_labels=3,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    model = get_peft_model(hf.DPTForSemanticSegmentation(config), HeadMaskedLoraConfig(ne=1))
    wrapped = [n for n, m in model.named_modules() if hasattr(m, "modules_to_save")]
    assert not any(b.startswith(a + ".") for a in wrapped for b in wrapped)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    expected = [n for n, _ in hf.DPTForSemanticSegmentation(config).named_parameters() if not n.startswith("dpt.")]
    assert len(trained) == len(expected)


@pytest.mark.parametrize("name", ["vit", "swin", "clip", "siglip", "siglip2", "vit mae pretraining"])
def test_layers_to_transform(name):
    """They also work where default targets are whole names, because other modules end with the same name."""
    model = get_peft_model(build(name), HeadMaskedLoraConfig(ne=1, layers_to_transform=[1]))
    everything = lora_layers(adapted(name)[1])
    chosen = [n for n in everything if re.search(r"\.(layers?|blocks)\.1\.", n)]
    assert 0 < len(chosen) < len(everything)
    assert list(lora_layers(model)) == ([n for n in everything if ".layers.1." in n] if name == "swin" else chosen)


@pytest.mark.parametrize("attribute", ["head_first", "key_dim"])
def test_interleaved_rows_are_refused(attribute):
    """timm's MaxViT and TinyViT: q, k and v of one head after the other."""
    model = FusedViT()
    setattr(model.blocks[1].attn, attribute, 4)
    for config in ({"ne": 1}, {"ne": 0}):
        with pytest.raises(
            ValueError, match=r"blocks\.\*\.attn\.qkv: the rows of this projection are q, k and v of one"
        ):
            get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(**config))
    plain = get_peft_model(copy.deepcopy(model), HeadMaskedLoraConfig(ne=0, fused_parts="qkv"))
    assert len(lora_layers(plain)) == 2
    get_peft_model(model, HeadMaskedLoraConfig(ne=1, exclude_modules=["blocks.1.attn.qkv"]))


class Wrapped(nn.Module):
    """A model wrapped as transformers wraps timm's, which have the classifier inside."""

    base_model_prefix = "timm_model"

    def __init__(self):
        super().__init__()
        self.timm_model = FusedViT()
        self.timm_model.head_dist = nn.Linear(24, 3)  # of a distilled one

    def forward(self, pixel_values, labels=None):
        return self.timm_model(pixel_values)


def test_classifiers_of_a_wrapped_model():
    assert classifier_names(Wrapped()) == ["timm_model.head", "timm_model.head_dist"]
    assert classifier_names(Wrapped().timm_model) == ["head", "head_dist"]
    model = get_peft_model(Wrapped(), HeadMaskedLoraConfig(ne=1))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        f"base_model.model.timm_model.{head}.modules_to_save.default.{kind}"
        for head in ("head", "head_dist")
        for kind in ("weight", "bias")
    }
