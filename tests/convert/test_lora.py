"""Adapters written for tools that do not know this package, read by a process that cannot import it."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields

import backbones
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from peft_heads import (
    HeadMaskedLoraConfig,
    get_head_masks,
    get_neuron_masks,
    load_image_classifier,
    pack_adapter,
    set_head_masks,
    set_image_processor,
    set_neuron_masks,
)
from peft_heads.backbones.neurons import neuron_projections
from peft_heads.cli.main import main
from peft_heads.convert.lora import export_lora
from peft_heads.convert.merged import export_merged


pytestmark = [
    pytest.mark.filterwarnings("ignore:ne=1. . group.s. with no more heads"),  # Hiera's first stage
    pytest.mark.filterwarnings("ignore:these targets have no attention heads"),
]

CASES = {
    "vit": {},
    "vit dora": {"use_dora": True, "target_modules": tiny.now(["q_proj", "v_proj", "o_proj"])},
    "vit bias": {"lora_bias": True, "use_rslora": True},
    "swin": {"rank_pattern": {tiny.now("q_proj"): 3}},
    "hiera": {},  # one projection for q, k and v
    "hiera dora": {"use_dora": True},
    "vit packed": {"adapter_bits": 1, "classifier_bits": 4},
    "vit head": {"mask_scope": "head"},
    "hiera head": {"mask_scope": "head"},
    "vit stock": None,
}
AS_LORA = [name for name in CASES if name.split()[-1] not in ("head", "stock")]
LABELS = {0: "ant", 1: "bee", 2: "cat"}
PROCESSOR = tiny.ViTProcessor(size={"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}, image_mean=[0.1, 0.2, 0.3])
# Loads every export, and prints the logits. A key that stock PEFT does not know, or does not find, is an error.
STRANGER = """
import sys, warnings
sys.modules["peft_heads"] = None  # an import of it fails
import torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForImageClassification
warnings.filterwarnings("error", message="Unexpected keyword|Found missing|.*not used")
for path in sorted(Path(sys.argv[1]).glob("*/images.pt")):
    folder, images, logits = path.parent, torch.load(path), {}
    with torch.no_grad():
        if (folder / "lora").exists():
            base = AutoModelForImageClassification.from_pretrained(folder / "base")
            logits["lora"] = PeftModel.from_pretrained(base, folder / "lora").eval()(images).logits
        merged = AutoModelForImageClassification.from_pretrained(folder / "merged").eval()
        assert merged.config.id2label == {0: "ant", 1: "bee", 2: "cat"}, merged.config.id2label
        logits["merged"] = merged(images).logits
        if (folder / "pruned").exists():
            logits["pruned"] = AutoModelForImageClassification.from_pretrained(folder / "pruned").eval()(images).logits
    torch.save(logits, folder / "logits.pt")
"""


def images(name):
    size = backbones.IMAGE_SIZE if name.startswith("hiera") else tiny.IMAGE_SIZE
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def save_adapter(root, name):
    """Save a base model in `root/base` and an adapter with head 0 off in `root/adapter`; return its model."""
    family, settings = name.split()[0], CASES[name]
    base = tiny.make(family) if family in ("vit", "swin") else backbones.FAMILIES[family].make()
    base.save_pretrained(root / "base")
    base = AutoModelForImageClassification.from_pretrained(root / "base")
    base.config.id2label, base.config.label2id = LABELS, {label: i for i, label in LABELS.items()}
    if settings is None:
        config = LoraConfig(target_modules=tiny.now(["q_proj", "v_proj"]), modules_to_save=["classifier"])
    else:
        config = HeadMaskedLoraConfig(ne=1, **settings)
    model = get_peft_model(base, config)
    tiny.randomize_lora(model)
    for parameter_name, param in model.named_parameters():
        if "magnitude" in parameter_name:
            param.data *= 1.5
        if "modules_to_save" in parameter_name:
            param.data += 0.1
    if settings is not None:
        set_head_masks(model, masks_off(model))
        set_image_processor(model, PROCESSOR)
    if name.endswith("packed"):
        pack_adapter(model)
    model.save_pretrained(root / "adapter")
    if settings is None:  # as `peft-heads train --method lora` does
        (root / "adapter" / "labels.json").write_text(json.dumps({"id2label": LABELS}))
    return model.eval()


def masks_off(model):
    masks = {name: mask for name, mask in get_head_masks(model).items() if len(mask) > 1}
    for mask in masks.values():
        mask[0] = False
    return masks


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export every case on the command line, and read it in a stranger: `{case: (folder, expected, logits)}`."""
    root = tmp_path_factory.mktemp("exported")
    expected = {}
    for name in CASES:
        folder = root / name.replace(" ", "-")
        model = save_adapter(folder, name)
        torch.save(images(name), folder / "images.pt")
        with torch.no_grad():
            expected[name] = model(images(name)).logits
        forms = {"lora": name in AS_LORA, "merged": True, "pruned": name == "vit head"}
        for form in [form for form, possible in forms.items() if possible]:
            assert main(["export", str(folder / "adapter"), "--to", form, str(folder / form)]) == 0
    done = subprocess.run([sys.executable, "-c", STRANGER, root], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    folders = {name: root / name.replace(" ", "-") for name in CASES}
    return {name: (folder, expected[name], torch.load(folder / "logits.pt")) for name, folder in folders.items()}


@pytest.mark.parametrize("name", AS_LORA)
def test_lora_has_the_same_logits_without_this_package(exported, name):
    folder, expected, logits = exported[name]
    torch.testing.assert_close(logits["lora"], expected, rtol=1e-6, atol=1e-6)
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(folder / "base")
    assert set(config) <= {field.name for field in fields(LoraConfig)}
    assert not [key for key in load_file(folder / "lora" / "adapter_model.safetensors") if "mask" in key]


@pytest.mark.parametrize("name", CASES)
def test_merged_and_pruned_have_the_same_logits_without_this_package(exported, name):
    folder, expected, logits = exported[name]
    torch.testing.assert_close(logits["merged"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits.get("pruned", expected), expected, rtol=0, atol=1e-5)
    assert ("pruned" in logits) == (name == "vit head")
    has_processor = name != "vit stock"  # neither adapter nor base model brings one
    assert (folder / "merged" / "preprocessor_config.json").exists() == has_processor


def test_labels_and_image_processor_come_along(exported):
    folder, expected, _ = exported["vit"]
    model, processor = load_image_classifier(folder / "lora")
    assert torch.equal(model(images("vit")).logits, expected)
    assert model.config.id2label == LABELS and list(processor.image_mean) == [0.1, 0.2, 0.3]
    settings = json.loads((folder / "merged" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.1, 0.2, 0.3]


def test_image_processor_of_the_base_model(exported, tmp_path):
    folder, _, _ = exported["vit stock"]
    base = shutil.copytree(folder / "base", tmp_path / "base")
    PROCESSOR.save_pretrained(base)
    export_merged(folder / "adapter", tmp_path / "merged", base_model=base)
    assert json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    (base / "preprocessor_config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json is missing or cannot be read"):
        export_merged(folder / "adapter", tmp_path / "other", base_model=base)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_by_the_functions_of_peft(exported, name, tmp_path):
    folder, expected, _ = exported[name]
    model, _ = load_image_classifier(folder / "adapter")
    save_as_lora(tmp_path, model, rank=8)

    def base():  # the stranger's way, with the classifier of the adapter
        return AutoModelForImageClassification.from_pretrained(folder / "base", id2label=LABELS)

    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(images(name)).logits, expected, rtol=1e-5, atol=1e-5)
    config, state_dict = convert_to_lora(model, rank=8)
    other = get_peft_model(base(), config).eval()
    set_peft_model_state_dict(other, state_dict)
    torch.testing.assert_close(other(images(name)).logits, expected, rtol=1e-5, atol=1e-5)


# What is refused: one line, and nothing is written


@pytest.fixture
def refused(tmp_path, capsys):
    def run(adapter, *words, to="lora", target=None):
        target = tmp_path / "target" if target is None else target
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(["export", str(adapter), "--to", to, str(target), *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("peft-heads export: error: ") and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


@pytest.fixture
def adapter(exported, tmp_path):
    return shutil.copytree(exported["vit"][0] / "adapter", tmp_path / "adapter")


def edit(adapter, change):
    """Change the weights in an adapter's file."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_settings(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_no_lora_says_mask_scope_head(exported, refused):
    error = refused(exported["vit head"][0] / "adapter")
    assert "mask_scope='head'" in error and "--to merged" in error and "--to pruned" in error


def test_other_types(exported, adapter, refused):
    assert "is a stock LoRA adapter already" in refused(exported["vit stock"][0] / "adapter")
    edit_settings(adapter, peft_type="IA3")
    assert "type IA3; expected LORA or HEAD_MASKED_LORA" in refused(adapter)
    assert "type IA3; expected LORA or HEAD_MASKED_LORA" in refused(adapter, to="merged")
    assert "no adapter" in refused("/no/such/folder")


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_masks_that_disagree_with_the_weights(adapter, refused, to):
    def unmask(tensors):
        key = next(
            key for key in tensors if key.endswith("v_proj.lora_B.weight") or key.endswith("value.lora_B.weight")
        )
        tensors[key][0] = 1

    edit(adapter, unmask)
    error = refused(adapter, to=to)
    assert str(adapter) in error and "contradicts itself" in error and "heads [0]" in error


@pytest.mark.filterwarnings("ignore")  # as in a user's process, where these are no errors
def test_weights_that_are_missing_or_left_over(adapter, refused):
    def drop(tensors):
        del tensors[next(key for key in tensors if "lora_A" in key)]

    def add(tensors):
        key = next(key for key in tensors if "lora_A" in key)
        tensors["base_model.model.vit.elsewhere.lora_A.weight"] = tensors[key].clone()

    original = (adapter / "adapter_model.safetensors").read_bytes()
    edit(adapter, drop)
    assert "Found missing adapter keys" in refused(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(original)
    edit(adapter, add)
    assert "vit.elsewhere" in refused(adapter)


def test_nan_is_not_merged(adapter, refused):
    def break_it(tensors):
        tensors[next(key for key in tensors if "lora_A" in key)][:] = float("nan")

    edit(adapter, break_it)
    assert f"{adapter} cannot be merged: NaNs detected" in refused(adapter, to="merged")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "labels.json"])
def test_damaged_adapter(adapter, refused, file):
    (adapter / file).write_bytes((adapter / file).read_bytes()[:20])
    assert file in refused(adapter, to="merged")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_base_model(exported, adapter, refused, tmp_path, file):
    base = shutil.copytree(exported["vit"][0] / "base", tmp_path / "base")
    (base / file).write_bytes((base / file).read_bytes()[:20])
    error = refused(adapter, "--base_model", base)
    assert str(base / file) in error and str(adapter) in error


def test_base_model_of_another_name(exported, adapter, refused, tmp_path):
    base = shutil.copytree(exported["vit"][0] / "base", tmp_path / "base")
    edit_settings(adapter, base_model_name_or_path=None)
    assert "--base_model" in refused(adapter)
    edit_settings(adapter, base_model_name_or_path="/gone")
    assert "'/gone'" in refused(adapter)
    assert "cannot be put on its base model" in refused(adapter, "--base_model", exported["swin"][0] / "base")
    assert export_lora(adapter, tmp_path / "target", base_model=base) == tmp_path / "target"


def test_a_checkpoint_without_random_parts(exported, adapter, refused, tmp_path):
    """Without the adapter's classifier, a base model that has none would get an untrained one."""
    base = AutoModelForImageClassification.from_pretrained(exported["vit"][0] / "base").base_model
    base.save_pretrained(tmp_path / "headless")
    export_merged(adapter, tmp_path / "merged", base_model=tmp_path / "headless")

    def drop(tensors):
        for key in [key for key in tensors if "classifier" in key]:
            del tensors[key]

    edit(adapter, drop)
    edit_settings(adapter, modules_to_save=[])
    error = refused(adapter, "--base_model", tmp_path / "headless", to="merged")
    assert "holds classifier.bias, classifier.weight: they would be random" in error


def test_an_existing_target(exported, adapter, refused, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    assert "exists already" in refused(adapter)
    assert "neither an adapter nor a checkpoint" in refused(adapter, "--overwrite")
    (target / "config.json").write_text("{}")
    assert "exists already" in refused(adapter)
    assert "must be another folder" in refused(adapter, "--overwrite", target=adapter)
    assert "must be another folder" in refused(adapter, "--overwrite", target=exported["vit"][0] / "base")
    edit_settings(adapter, base_model_name_or_path="/gone")
    assert "would be lost: notes.txt" in refused(adapter, "--overwrite")
    (target / "notes.txt").unlink()
    (target / "checkpoint-5").mkdir()
    assert "would be lost: checkpoint-5" in refused(adapter, "--overwrite")
    (target / "checkpoint-5").rmdir()
    refused(adapter, "--overwrite")  # it could not be written: the old folder is as it was
    edit_settings(adapter, base_model_name_or_path=str(exported["vit"][0] / "base"))
    assert main(["export", str(adapter), "--to", "merged", str(target), "--overwrite"]) == 0
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "target"]


@pytest.mark.parametrize("form", ["lora", "merged", "packed"])
def test_a_base_model_in_16_bits(tmp_path, form):
    """The adapter was trained beside float32 weights, and none of it is rounded."""
    tiny.make("vit").bfloat16().save_pretrained(tmp_path / "base")
    load = AutoModelForImageClassification.from_pretrained
    model = get_peft_model(load(tmp_path / "base", dtype=torch.float32), HeadMaskedLoraConfig(ne=0, adapter_bits=1))
    tiny.train(model)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--to", form, str(tmp_path / form)]) == 0
    if form == "merged":
        exported = load(tmp_path / form)
    else:
        exported = PeftModel.from_pretrained(load(tmp_path / "base", dtype=torch.float32), tmp_path / form)
    with torch.no_grad():
        expected = model.eval()(images("vit")).logits
        torch.testing.assert_close(exported.eval()(images("vit")).logits, expected, rtol=1e-6, atol=1e-6)


def test_entries_that_are_not_finite(adapter, refused):
    edit(adapter, lambda tensors: tensors["base_model.model.classifier.bias"].fill_(float("nan")))
    assert "classifier.bias has entries that are not finite" in refused(adapter)


def test_the_base_model_that_was_named(exported, adapter, tmp_path):
    base = str(exported["vit"][0] / "base")
    edit_settings(adapter, base_model_name_or_path="/gone")
    assert main(["export", str(adapter), "--to", "lora", str(tmp_path / "lora"), "--base_model", base]) == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == base


def test_what_the_command_says(adapter, tmp_path, capsys):
    assert main(["export", str(adapter), "--to", "lora", str(tmp_path / "deep" / "lora")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{adapter} -> {tmp_path / 'deep' / 'lora'} (lora)"
    size = (tmp_path / "deep" / "lora" / "adapter_model.safetensors").stat().st_size
    assert any(line.split() == [f"{size:,}", "bytes", "adapter_model.safetensors"] for line in lines)


@pytest.fixture
def pruned(tmp_path):
    """An adapter with a quarter of the neurons off, and its logits."""
    tiny.make("vit").save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, HeadMaskedLoraConfig(neuron_ratio=0.25, ne=0))
    tiny.randomize_lora(model)
    set_neuron_masks(model, {name: torch.arange(32) > 7 for name in get_neuron_masks(model)})
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", model.eval()(tiny.images()).logits


def test_neuron_masks_are_no_lora(pruned, tmp_path):
    with pytest.raises(ValueError, match=r"has neuron masks \(neuron_ratio=0.25\), .*use --to merged, or --to pruned"):
        export_lora(pruned[0], tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_merging_zeroes_the_rows_of_neurons(pruned, tmp_path):
    adapter, expected = pruned
    model = AutoModelForImageClassification.from_pretrained(export_merged(adapter, tmp_path / "merged"))
    for name in neuron_projections(model):
        layer = model.get_submodule(name)
        assert not layer.weight[:8].any() and not layer.bias[:8].any() and layer.weight[8:].any(dim=1).all()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tiny.images()).logits, expected, atol=1e-5, rtol=1e-4)
