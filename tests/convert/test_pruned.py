"""Models from which the deactivated heads were removed, compared with the masked ones."""

import json
import warnings

import backbones
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification, BeitConfig, BeitForImageClassification

from peft_heads import HeadMaskedLoraConfig, get_head_masks, set_head_masks
from peft_heads.cli.main import main
from peft_heads.convert.pruned import export_pruned
from peft_heads.convert.slices import slice_heads
from peft_heads.convert.smaller import prune_heads
from peft_heads.heads import resolve_heads


pytestmark = pytest.mark.filterwarnings("ignore:ne=2. . group.s. with no more heads")

# transformers before 5.9 has no `head_dim` but `pruned_heads`, which forgets BEiT's relative position bias
OLD = tiny.OLD_NAMES
FAMILIES = {
    **{
        name: backbones.FAMILIES[name].make
        for name in (
            "vit",
            "deit",
            "deit with teacher",
            "beit",
            "beit relative bias",
            "dinov2",
            "dinov2 with registers",
            "vit msn",
        )
    },
    "beit shared bias": lambda: BeitForImageClassification(
        BeitConfig(**backbones.VIT, **backbones.LABELS, use_shared_relative_position_bias=True)
    ),
}
IMAGES = torch.randn(2, 3, backbones.IMAGE_SIZE, backbones.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
HAS_BIAS = ("beit relative bias", "beit shared bias")


def make(name):
    model = FAMILIES[name]() if name in FAMILIES else backbones.FAMILIES[name].make()
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():  # no bias, position bias or layer scale may be zero
        param.data += 0.2 * torch.randn(param.shape, generator=generator)
    return model.eval()


def save_adapter(root, model, different=True, **settings):
    """Save the model in `root/base` and an adapter with 2 of 6 heads off in `root/adapter`; return its model."""
    model.save_pretrained(root / "base")
    model = type(model).from_pretrained(root / "base")
    config = HeadMaskedLoraConfig(ne=2, **{"mask_scope": "head", **settings})
    peft_model = get_peft_model(model, config).eval()
    tiny.randomize_lora(peft_model)
    masks = get_head_masks(peft_model)
    for index, mask in enumerate(masks.values()):
        layer = index // 2 if different else 0  # q and v
        mask[[layer % len(mask), (layer + 3) % len(mask)]] = False
    set_head_masks(peft_model, masks)
    peft_model.save_pretrained(root / "adapter")
    return peft_model


def logits(model):
    with torch.no_grad():
        return model(IMAGES).logits


@pytest.mark.parametrize("name", [name for name in FAMILIES if not (OLD and name in HAS_BIAS)])
def test_an_ordinary_smaller_checkpoint(name, tmp_path):
    """The heads differ from layer to layer, but not where layers share a position bias."""
    model = save_adapter(tmp_path, make(name), different=name != "beit shared bias")
    expected = logits(model)
    export_pruned(tmp_path / "adapter", tmp_path / "pruned")
    pruned, info = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(pruned.eval()), expected, rtol=0, atol=1e-5)
    assert {(p.num_heads, p.head_dim) for layout in resolve_heads(pruned).values() for p in layout.parts} == {(4, 4)}
    assert pruned.num_parameters() < model.get_base_model().num_parameters()
    whole = AutoModelForImageClassification.from_pretrained(tmp_path / "base").eval()
    assert (logits(whole) - expected).norm() > 0.1 * expected.norm()  # the heads were not idle before


def test_config_says_it(tmp_path):
    save_adapter(tmp_path, make("vit"))
    assert main(["export", str(tmp_path / "adapter"), "--to", "pruned", str(tmp_path / "pruned")]) == 0
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    if OLD:
        assert config["num_attention_heads"] == 6 and config["pruned_heads"]["1"] == [1, 4]
    else:
        assert config["num_attention_heads"] == 4 and config["head_dim"] == 4


def test_a_classifier_on_a_mae_checkpoint(tmp_path):
    """MAE has no image classifier: a ViT is trained, whose adapter names MAE's checkpoint."""
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**backbones.VIT)).save_pretrained(tmp_path / "mae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vit = transformers.ViTForImageClassification.from_pretrained(tmp_path / "mae", num_labels=3)
    model = save_adapter(tmp_path, vit)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "mae")
    model.save_pretrained(tmp_path / "adapter")
    export_pruned(tmp_path / "adapter", tmp_path / "pruned")
    pruned = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(logits(pruned), logits(model), rtol=0, atol=1e-5)


def test_half_precision():
    model = make("vit").to(torch.bfloat16)
    masks = silence(model, {0: [1], 1: [2], 2: [0], 3: [5]})
    pruned = prune_heads(model, masks)
    assert pruned.dtype == torch.bfloat16 and not pruned.training
    images = IMAGES.bfloat16()
    torch.testing.assert_close(pruned(images).logits, model(images).logits, rtol=0.05, atol=0.05)


def silence(model, heads):
    """Zero the values of heads, `{index of the layer: heads}`, in the model itself; return the masks."""
    masks = {}
    values = {n: layout for n, layout in resolve_heads(model).items() if layout.parts[0].role == "value"}
    for index, (name, layout) in enumerate(values.items()):
        mask = torch.ones(layout.num_heads, dtype=torch.bool)
        mask[heads.get(index, [])] = False
        masks[name] = mask
        for param in model.get_submodule(name).parameters():
            param.data = layout.mask_rows(param.data, mask)
    return masks


def test_slicing_knows_rows_from_heads():
    kept = {"blocks.0.attn": torch.tensor([True, False, True]), "blocks.1.attn": torch.tensor([False, True, True])}
    weights = {
        "blocks.0.attn.v.weight": torch.arange(12).view(6, 2),
        "blocks.0.output.weight": torch.arange(12).view(2, 6),
        "blocks.1.bias_table": torch.arange(6).view(2, 3),
        "norm": torch.arange(6),
    }
    shapes = [(4, 2), (2, 4), (2, 2), (6,)]
    smaller = {key: torch.empty(shape) for key, shape in zip(weights, shapes, strict=True)}
    sliced = slice_heads(weights, smaller, kept, head_dim=2)
    assert sliced["blocks.0.attn.v.weight"].tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert sliced["blocks.0.output.weight"].tolist() == [[0, 1, 4, 5], [6, 7, 10, 11]]
    assert sliced["blocks.1.bias_table"].tolist() == [[1, 2], [4, 5]]
    assert sliced["norm"].tolist() == list(range(6))
    with pytest.raises(ValueError, match="bias_table is shared by layers that keep different heads"):
        slice_heads({"bias_table": torch.zeros(2, 3)}, {"bias_table": torch.zeros(2, 2)}, kept, 2)
    with pytest.raises(ValueError, match=r"blocks.0.mlp is \(5,\), and \(4,\) with fewer heads"):
        slice_heads({"blocks.0.mlp": torch.zeros(5)}, {"blocks.0.mlp": torch.zeros(4)}, kept, 2)


# What is refused, with the reason; nothing is written


@pytest.fixture
def refused(tmp_path, capsys):
    def run(adapter=None):
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        adapter = adapter or tmp_path / "adapter"
        assert main(["export", str(adapter), "--to", "pruned", str(tmp_path / "pruned")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("peft-heads export: error: ") and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


@pytest.mark.parametrize("name", ["swin", "swinv2", "clip classifier", "siglip classifier", "pvt v2"])
def test_no_number_of_heads_for_all_layers(name, tmp_path, refused):
    save_adapter(tmp_path, make(name))
    error = refused()
    assert "has no number of heads that holds for all layers (num_attention_heads)" in error
    assert f"from a {type(make(name)).__name__}" in error and "--to merged" in error


def test_a_configuration_that_does_not_heed_head_dim():
    model = backbones.FAMILIES["dinov3"].make().eval()
    masks = silence(model, {index: [1, 2, 3] for index in range(4)})
    with pytest.raises(ValueError, match="cannot build a DINOv3ViTModel with 3 heads of 4 rows .*not heed them"):
        prune_heads(model, masks)


@pytest.mark.skipif(not OLD, reason="later versions can")
@pytest.mark.parametrize("name", HAS_BIAS)
def test_what_pruned_heads_forgets(name, tmp_path, refused):
    save_adapter(tmp_path, make(name), different=False)
    assert "pruned_heads: it cannot be run" in refused()


@pytest.mark.skipif(OLD, reason="refused as a whole")
def test_layers_that_share_a_position_bias(tmp_path, refused):
    save_adapter(tmp_path, make("beit shared bias"))
    error = refused()
    assert "relative_position_bias_table is shared by layers that keep different heads" in error


def test_mask_scope_adapter_and_other_types(tmp_path, refused):
    save_adapter(tmp_path, make("vit"), mask_scope="adapter")
    assert "mask_scope='adapter', under which the frozen heads go on working" in refused()
    stock = get_peft_model(make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"])))
    stock.save_pretrained(tmp_path / "stock")
    assert "mask_scope=None" in refused(tmp_path / "stock")


@pytest.mark.parametrize(
    ("off", "message"),
    [
        ({0: [1], 1: [1, 2], 2: [1], 3: [1]}, "2 in .*1.*value|2 in .*1.*v_proj"),
        ({0: [1]}, "at least one; found 1 in"),
        ({}, "at least one; found 0 in"),
        ({index: range(6) for index in range(4)}, "all heads are deactivated"),
    ],
)
def test_numbers_of_heads(off, message):
    model = make("vit")
    with pytest.raises(ValueError, match=message):
        prune_heads(model, silence(model, off))


def test_a_masked_query_removes_no_head():
    model = make("vit")
    masks = silence(model, {})
    names = tiny.now({f"vit.layers.{i}.attention.q_proj": torch.tensor([False] + [True] * 5) for i in range(4)})
    with pytest.raises(ValueError, match="at least one; found 0 in"):
        prune_heads(model, {**masks, **names})


def test_a_head_that_still_works():
    """The masks belong to a model into which the adapter was not merged."""
    model = make("vit")
    masks = {name: ~torch.eye(6)[0].bool() for name in silence(model, {})}
    with pytest.raises(ValueError, match="its outputs differ by"):
        prune_heads(model, masks)
