"""Checkpoints without the deactivated heads and neurons of an adapter, compared with the adapter."""

import json
import warnings

import backbones
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from silenced import FAMILIES, HAS_BIAS, OLD, logits, make
from transformers import AutoModelForImageClassification

from peft_heads import HeadMaskedLoraConfig, get_head_masks, set_head_masks
from peft_heads.cli.main import main
from peft_heads.convert.pruned import export_pruned
from peft_heads.heads import resolve_heads


pytestmark = pytest.mark.filterwarnings("ignore:ne=2. . group.s. with no more heads")


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
