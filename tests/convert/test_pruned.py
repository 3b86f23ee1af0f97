"""Checkpoints without the deactivated heads and neurons of an adapter, compared with the adapter."""

import json
import subprocess
import sys
import warnings

import backbones
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from silenced import BOTH, FAMILIES, HAS_BIAS, IMAGES, NEURONS_ALONE, OLD, logits, make
from transformers import AutoModelForImageClassification

from peft_heads import (
    HeadMaskedLoraConfig,
    get_head_masks,
    get_neuron_masks,
    set_head_masks,
    set_image_processor,
    set_neuron_masks,
)
from peft_heads.backbones.units import count_units
from peft_heads.cli.main import main
from peft_heads.convert.pruned import export_pruned
from peft_heads.heads import resolve_heads


pytestmark = pytest.mark.filterwarnings("ignore:ne=2. . group.s. with no more heads")

LABELS = {0: "ant", 1: "bee", 2: "cat"}
PROCESSOR = tiny.ViTProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
# Loads every checkpoint without this package, and keeps the logits.
STRANGER = """
import sys
sys.modules["peft_heads"] = None  # an import of it fails
import torch
from pathlib import Path
from transformers import AutoImageProcessor, AutoModelForImageClassification
images = torch.load(Path(sys.argv[1], "images.pt"))
for folder in sorted(path.parent for path in Path(sys.argv[1]).glob("*/pruned")):
    model, info = AutoModelForImageClassification.from_pretrained(folder / "pruned", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}, model.config.id2label
    assert model.dtype == torch.float32
    assert list(AutoImageProcessor.from_pretrained(folder / "pruned").image_mean) == [0.1, 0.2, 0.3]
    with torch.no_grad():
        torch.save(model.eval()(images).logits, folder / "logits.pt")
"""


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


def loses_heads(name):
    return name not in NEURONS_ALONE and not (OLD and name in HAS_BIAS)


def save_pruning_adapter(root, name, heads=True, off=0.5, different=True, **settings):
    """Save an adapter on every layer with half of the neurons off, and two heads where the family can lose them."""
    model = make(name)
    model.config.id2label, model.config.label2id = LABELS, {label: i for i, label in LABELS.items()}
    model.save_pretrained(root / "base")
    heads = heads and loses_heads(name)
    config = HeadMaskedLoraConfig(**{"ne": 2 if heads else 0, "neuron_ratio": 0.5, **settings})
    peft_model = get_peft_model(type(model).from_pretrained(root / "base"), config).eval()
    tiny.randomize_lora(peft_model, std=0.1)
    if heads:
        masks = get_head_masks(peft_model)
        for index, mask in enumerate(masks.values()):
            mask[[index // 2, index // 2 + 2]] = False
        set_head_masks(peft_model, masks)
    masks = get_neuron_masks(peft_model)
    for index, mask in enumerate(masks.values()):
        rotated = torch.arange(len(mask)).roll(3 * index if different else 0)
        mask[rotated[: int(off * len(mask))]] = False
    set_neuron_masks(peft_model, masks)
    set_image_processor(peft_model, PROCESSOR)
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


@pytest.mark.parametrize(("name", "heads"), [("vit", True), ("dinov2", False), ("siglip classifier", False)])
def test_heads_and_neurons_of_an_adapter(name, heads, tmp_path):
    """With heads off, and with neurons alone; LoRA stands on every layer."""
    model = save_pruning_adapter(tmp_path, name, heads)
    expected, before = logits(model), count_units(model)
    export_pruned(tmp_path / "adapter", tmp_path / "pruned")
    pruned = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-5)
    units = count_units(pruned)
    assert (units.num_heads, units.num_neurons) == (4 if heads else 6, before.num_neurons // 2)
    whole = AutoModelForImageClassification.from_pretrained(tmp_path / "base").eval()
    assert (logits(whole) - expected).norm() > 0.05 * expected.norm()
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    vision = config.get("vision_config", config)
    said = {"vit": {"intermediate_size": 8}, "dinov2": {"mlp_ratio": 2}}.get(
        name, {"intermediate_size": 8, "vision_use_head": False}
    )
    assert said.items() <= vision.items()


def test_query_and_value_alone(tmp_path):
    """With LoRA on query and value alone, the masks of the neurons stand by themselves."""
    model = save_pruning_adapter(tmp_path, "vit", target_modules=tiny.now(["q_proj", "v_proj"]))
    export_pruned(tmp_path / "adapter", tmp_path / "pruned")
    pruned = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(logits(pruned), logits(model), rtol=0, atol=1e-5)
    assert count_units(pruned).num_neurons == 8


@pytest.mark.slow
def test_transformers_alone(tmp_path):
    """All families, loaded by a process that cannot import this package."""
    expected = {}
    for name in (*BOTH, *NEURONS_ALONE):
        folder = tmp_path / name.replace(" ", "-")
        expected[folder] = logits(save_pruning_adapter(folder, name))
        assert main(["export", str(folder / "adapter"), "--to", "pruned", str(folder / "pruned")]) == 0
    torch.save(IMAGES, tmp_path / "images.pt")
    done = subprocess.run([sys.executable, "-c", STRANGER, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, whole in expected.items():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), whole, rtol=0, atol=1e-5)


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


def test_numbers_that_differ_or_cannot_be_said(tmp_path, refused):
    model = save_pruning_adapter(tmp_path, "vit")
    masks = get_neuron_masks(model)
    masks[first := next(iter(masks))][:] = True
    set_neuron_masks(model, masks)
    model.save_pretrained(tmp_path / "adapter")
    assert f"in the MLPs of all layers, and at least one; found 0 in {first}, 8 in " in refused()


def test_a_number_that_dinov2_cannot_say(tmp_path, refused):
    save_pruning_adapter(tmp_path, "dinov2", off=0.25 + 1 / 96)
    assert "cannot say 71 of 96 neurons (mlp_ratio); it can say 72, 48, 24" in refused()


def test_heads_of_two_towers(tmp_path, refused):
    """Neurons could go, heads cannot; an adapter that has both off is refused."""
    model = make("clip classifier")
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        type(model).from_pretrained(tmp_path / "base"), HeadMaskedLoraConfig(ne=3, neuron_ratio=0.5)
    )
    for get, set_masks in ((get_head_masks, set_head_masks), (get_neuron_masks, set_neuron_masks)):
        set_masks(model, {name: torch.arange(len(mask)) % 2 == 0 for name, mask in get(model).items()})
    model.save_pretrained(tmp_path / "adapter")
    assert "with 3 heads of 4 rows" in refused()


@pytest.mark.filterwarnings("ignore:the adapter saved to .* is to switch neurons off")
def test_nothing_is_off(tmp_path, refused):
    save_pruning_adapter(tmp_path, "vit", heads=False, off=0)
    assert "no head and no neuron is deactivated; use --to merged" in refused()


def test_heads_that_go_on_working_beside_neurons(tmp_path, refused):
    """Settings that the configuration refuses, written by hand."""
    save_pruning_adapter(tmp_path, "vit")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_scope": "adapter"}))
    assert "mask_scope='adapter' cannot be combined with neuron_ratio=0.5" in refused()
