"""The files of Bi-LoRA's authors, against a plain reading of their bytes and explicitly edited weights."""

import json
import os
import re
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from peft_heads import HeadMaskedLoraConfig
from peft_heads.adapter_folder.labels import read_labels
from peft_heads.cli.main import main
from peft_heads.convert.bi_lora.convert import export_bi_lora, import_bi_lora
from peft_heads.convert.bi_lora.settings import BASE_MODEL, shortest_scale
from peft_heads.data.images import load_image_processor
from peft_heads.functional.packing import pack_module, unpack_module


PUBLISHED = Path(__file__).parents[1] / "fixtures" / "bi-lora"
# The authors' small files, unchanged, and others of the same format. Rank 3: the scale is no quotient of floats.
CASES = {
    "kitti": PUBLISHED / "lora-bihead" / "kitti-bit1-dim1.bin",
    "clevr_count": PUBLISHED / "lora" / "clevr_count-bit1-dim1.bin",
    "wide": {"bit": 1, "dim": 32, "num_class": 10, "method": "lora", "scale": 0.01},
    "wide bihead": {"bit": 1, "dim": 32, "num_class": 100, "method": "lora-bihead", "scale": 1.0},
    "two-bit": {"bit": 2, "dim": 2, "num_class": 2, "method": "lora-bihead", "scale": 1e-05},
    "four_bit": {"bit": 4, "dim": 3, "num_class": 3, "method": "lora", "scale": 0.1},
    "eight": {"bit": 8, "dim": 1, "num_class": 1, "method": "lora", "scale": 3.0},
}
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


class Plain(NamedTuple):
    """A file's plain contents; `updates` is ΔW of q and of v of every block."""

    updates: list[tuple[np.ndarray, np.ndarray]]
    head: np.ndarray
    bias: np.ndarray


def codes_of(bits):
    """Compute the code book, by the rounds of its definition."""
    normal, codes = NormalDist(), [0.0] * 2**bits
    for _ in range(500):
        mass = [0.0, *(normal.cdf((a + b) / 2) for a, b in pairwise(codes)), 1.0]
        codes = [normal.inv_cdf((a + b) / 2) for a, b in pairwise(mass)]
    return np.array(codes)


def read_plain(path):
    settings = yaml.safe_load(path.with_suffix(".yaml").read_text())
    data, at = path.read_bytes(), 0
    rank, num_class = settings["dim"], settings["num_class"]

    def matrix(rows, columns, bits):
        nonlocal at
        size = rows * columns * bits // 8
        packed = np.frombuffer(data, np.uint8, size, at)
        index = np.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], axis=1)
        mean, std = struct.unpack_from("<ff", data, at + size)
        at += size + 8
        return codes_of(bits)[index.reshape(rows, columns)] * std + mean

    def update():
        down, up = matrix(rank, 768, settings["bit"]), matrix(768, rank, settings["bit"])
        return settings["scale"] * up @ down

    updates = [(update(), update()) for _ in range(12)]
    if settings["method"] == "lora-bihead":
        head, bias = matrix(num_class, 768, 1), np.zeros(num_class)
    else:
        head = np.frombuffer(data, "<f4", num_class * 768, at).reshape(num_class, 768).copy()
        bias = np.frombuffer(data, "<f4", num_class, at + 4 * head.size).copy()
        at += 4 * (head.size + bias.size)
    assert at == len(data)
    return Plain(updates, head, bias)


def write_plain(path, bit, dim, num_class, method, scale):
    rng, parts = np.random.default_rng(0), []

    def matrix(rows, columns, bits):
        index = rng.integers(2**bits, size=(rows * columns * bits // 8, 8 // bits))
        parts.append((index << np.arange(0, 8, bits)).sum(axis=1).astype(np.uint8).tobytes())
        parts.append(struct.pack("<ff", rng.normal(scale=0.01), rng.uniform(0.05, 0.2)))

    for _ in range(24):
        matrix(dim, 768, bit)
        matrix(768, dim, bit)
    if method == "lora-bihead":
        matrix(num_class, 768, 1)
    else:
        parts.append(rng.normal(scale=0.1, size=num_class * 769).astype("<f4").tobytes())
    path.write_bytes(b"".join(parts))
    settings = {"backbone": "vit_base_patch16_224_in21k", "bit": bit, "dataset": path.name.partition("-bit")[0]}
    settings |= {"dim": dim, "method": method, "num_class": num_class, "scale": scale}
    path.with_suffix(".yaml").write_text(yaml.dump(settings))


@pytest.fixture(scope="module")
def vit():
    """A randomly initialised ViT-B/16, for small images."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=48)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("bi-lora")
    paths = {}
    for name, case in CASES.items():
        paths[name] = case
        if isinstance(case, dict):
            paths[name] = root / f"{name}-bit{case['bit']}-dim{case['dim']}.bin"
            write_plain(paths[name], **case)
    return paths


def names(projection):
    return [tiny.now(f"vit.layers.{block}.attention.{projection}") for block in range(12)]


def both(file):
    return file.read_bytes(), file.with_suffix(".yaml").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_same_updates_and_logits_as_a_plain_reading(vit, files, tmp_path, name):
    expected = read_plain(files[name])
    folder = import_bi_lora(files[name], tmp_path / "adapter")
    with torch.no_grad():
        weights = [vit.get_submodule(layer).weight for role in ("q_proj", "v_proj") for layer in names(role)]
        before = [weight.clone() for weight in weights]
        frozen = vit.vit(IMAGES).last_hidden_state[:, 0]
        for weight, update in zip(
            weights, [q for q, _ in expected.updates] + [v for _, v in expected.updates], strict=True
        ):
            weight += torch.from_numpy(update)
        features = vit.vit(IMAGES).last_hidden_state[:, 0]
        head, bias = torch.from_numpy(expected.head).float(), torch.from_numpy(expected.bias).float()
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    assert (features - frozen).abs().max() > 1e-3 or name == "two-bit"  # its scale is small

    model = PeftModel.from_pretrained(vit, folder).eval()
    for role, index in (("q_proj", 0), ("v_proj", 1)):
        for layer, update in zip(names(role), expected.updates, strict=True):
            delta = vit.get_submodule(layer).get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(delta, update[index], rtol=1e-5, atol=2e-6 * np.abs(update[index]).max())
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).logits, features @ head.T + bias, rtol=1e-5, atol=2e-5)
    assert list(model.config.id2label.values()) == [f"LABEL_{index}" for index in range(len(expected.bias))]
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    model.unload()

    for adapter in (folder, tmp_path / "again"):
        again = tmp_path / f"of {adapter.name}" / files[name].name
        assert export_bi_lora(adapter, again) == again and both(again) == both(files[name])


def test_what_the_folder_holds(files, tmp_path):
    folder = import_bi_lora(files["kitti"], tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
        "preprocessor_config.json",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(tiny.now(["q_proj", "v_proj"]))
    assert config["auto_mapping"]["base_model_class"] == "ViTForImageClassification"
    expected = {"ne": 0, "r": 1, "lora_alpha": 100, "adapter_bits": 1, "classifier_bits": 1, "packed": True}
    expected |= {"bottleneck_dropout": 0.1, "modules_to_save": ["classifier"], "inference_mode": True}
    expected["base_model_name_or_path"] = "google/vit-base-patch16-224-in21k"
    assert {name: config[name] for name in expected} == expected
    assert read_labels(folder) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2", 3: "LABEL_3"}
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = [f"base_model.model.{name}.lora_packed" for role in ("q_proj", "v_proj") for name in names(role)]
    assert set(tensors) == {*modules, "base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert sum(tensor.nbytes for tensor in tensors.values()) < 6400  # the file has 5,384


def test_images_are_not_normalised(files, tmp_path):
    """The image processor follows the authors, not the base model."""
    folder = import_bi_lora(files["kitti"], tmp_path / "adapter")
    pixels = np.random.default_rng(0).integers(256, size=(100, 60, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    values = load_image_processor(folder)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(values.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_names_of_another_transformers(files, tmp_path):
    folder = import_bi_lora(files["clevr_count"], tmp_path / "adapter")
    layer, query, value = "encoder.layer", "attention.attention.query", "attention.attention.value"
    if tiny.OLD_NAMES:
        layer, query, value = "layers", "attention.q_proj", "attention.v_proj"

    def rename(tensors):
        for key in list(tensors):
            new = key.replace(tiny.now("vit.layers"), f"vit.{layer}")
            new = new.replace(tiny.now("attention.q_proj"), query).replace(tiny.now("attention.v_proj"), value)
            tensors[new] = tensors.pop(key)

    edit(folder, rename)
    assert f"base_model.model.vit.{layer}.11.{value}.lora_packed" in load_file(folder / "adapter_model.safetensors")
    again = export_bi_lora(folder, tmp_path / "clevr_count-bit1-dim1.bin")
    assert both(again) == both(files["clevr_count"])


def test_an_adapter_that_is_not_packed(vit, tmp_path, monkeypatch):
    """It was trained with this package and saved in full precision; its masks keep all heads active."""
    config = HeadMaskedLoraConfig(ne=1, r=4, lora_alpha=2, use_rslora=True, adapter_bits=2)
    model = get_peft_model(vit, config, autocast_adapter_dtype=False).eval()
    updates = {
        role: [vit.get_submodule(layer).get_delta_weight("default").detach() for layer in names(role)]
        for role in ("q_proj", "v_proj")
    }
    with pytest.warns(UserWarning, match="none has been selected"):
        model.save_pretrained(tmp_path / "adapter")
    model.unload()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    def load(source, base_model):  # what would lie on the disk is 340 MB
        assert (source, base_model) == (tmp_path / "adapter", BASE_MODEL)
        return PeftModel.from_pretrained(vit, source).eval(), []

    monkeypatch.setattr("peft_heads.convert.bi_lora.convert.load_complete_adapter", load)
    file = export_bi_lora(tmp_path / "adapter", tmp_path / "mine.bin", base_model=BASE_MODEL)
    settings = yaml.safe_load(file.with_suffix(".yaml").read_text())
    assert settings == {
        "backbone": "vit_base_patch16_224_in21k",
        "bit": 2,
        "dataset": "mine",
        "dim": 4,
        "method": "lora",
        "num_class": len(saved["base_model.model.classifier.bias"]),
        "scale": 1.0,  # 2/√4
    }
    found = read_plain(file)
    for role, index in (("q_proj", 0), ("v_proj", 1)):
        for update, pair in zip(updates[role], found.updates, strict=True):
            np.testing.assert_allclose(pair[index], update, rtol=1e-4, atol=1e-6 * float(update.abs().max()))
    np.testing.assert_array_equal(found.head, saved["base_model.model.classifier.weight"])
    np.testing.assert_array_equal(found.bias, saved["base_model.model.classifier.bias"])


def test_the_scale_of_fewest_digits():
    assert shortest_scale(0.1 * 3, 3) == 0.1 and 0.1 * 3 / 3 != 0.1
    assert shortest_scale(32, 32) == 1 and shortest_scale(1, 3) * 3 == 1


# What is refused: one line, and nothing is written


@pytest.fixture
def refused(tmp_path, capsys):
    def run(*words):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"peft-heads {words[0]}: error: ") and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


@pytest.fixture
def kitti(files, tmp_path):
    """A copy of the authors' files."""
    for path in (files["kitti"], files["kitti"].with_suffix(".yaml")):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / files["kitti"].name


@pytest.fixture
def adapter(kitti, tmp_path):
    return import_bi_lora(kitti, tmp_path / "adapter")


def edit(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_settings(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


DAMAGES = {
    "cut short": (lambda data: data[:-1], "has 5,383 bytes, but .* make 5,384: the file is cut short"),
    "too long": (lambda data: data + b"\0", "has 5,385 bytes, but .* make 5,384: the file is too long"),
    "empty": (lambda data: b"", "has 0 bytes"),
    "nan": (lambda data: data[:96] + struct.pack("<f", np.nan) + data[100:], "lora_q down of block 0 has mean nan"),
    "negative": (lambda data: data[:-4] + struct.pack("<f", -1), "the head has mean .* deviation -1.0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bin(kitti, refused, tmp_path, name):
    damage, message = DAMAGES[name]
    kitti.write_bytes(damage(kitti.read_bytes()))
    error = refused("import", "bi-lora", kitti, tmp_path / "adapter")
    assert str(kitti) in error and re.search(message, error)


def test_a_float_head_that_is_not_finite(files, refused, tmp_path):
    file = tmp_path / "a.bin"
    shutil.copyfile(files["clevr_count"].with_suffix(".yaml"), tmp_path / "a.yaml")
    file.write_bytes(files["clevr_count"].read_bytes()[:-4] + struct.pack("<f", np.inf))
    assert "entries that are not finite" in refused("import", "bi-lora", file, tmp_path / "adapter")


SETTINGS = {
    "dim": ("dim: 1", "dim: 2", "dim 2 .* of kitti-bit1-dim1.yaml make"),
    "classes": ("num_class: 4", "num_class: 5", "num_class 5 .* make 5,480"),
    "method": ("lora-bihead", "lora", "method lora, .* make 17,296"),
    "bit": ("bit: 1", "bit: 2", "bit 2, .* make"),
    "huge": ("dim: 1", "dim: 2000000000", "make 9,216,000,000,776"),
    "too large": ("dim: 1", "dim: 0x" + 1900 * "f", "dim must be a positive integer"),
    "no dim": ("dim: 1", "dim: 0", "dim must be a positive integer; got 0"),
    "true": ("num_class: 4", "num_class: true", "num_class must be a positive integer; got True"),
    "bits": ("bit: 1", "bit: 3", "bit must be one of 1, 2, 4, 8; got 3"),
    "backbone": ("patch16", "patch32", "backbone must be vit_base_patch16_224_in21k; got 'vit_base_patch32"),
    "other method": ("lora-bihead", "adaptformer", "method must be lora or lora-bihead; got 'adaptformer'"),
    "scale": ("100.0", "1e-5", "scale must be a positive number .*; got '1e-5'"),
    "true scale": ("100.0", "true", "scale must be a positive number .*; got True"),
    "no scale": ("100.0", ".nan", "scale must be a positive number .*; got nan"),
    "missing": ("scale: 100.0\n", "", "must have the keys backbone, bit, .*; got backbone, bit, dataset, dim, method"),
    "more": ("bit: 1", "bit: 1\nseed: 1", "must have the keys .*; got .*, seed"),
    "list": ("backbone:", "- backbone:", "is damaged, or no YAML"),
    "code": ("kitti", "!!python/object/apply:os.getcwd []", "no YAML: could not determine a constructor"),
    "references": ("kitti", "[&a [x, x], &b [*a, *a], [*b, *b]]", "dataset must be a name; got a list"),
    "brackets": ("kitti", 1500 * "[", "is damaged, or no YAML"),
    "no date": ("kitti", "2001-99-99", "is damaged, or no YAML"),
    "large": ("kitti", 5000 * "k", "no settings of an adapter"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_do_not_fit(kitti, refused, tmp_path, name):
    old, new, message = SETTINGS[name]
    path = kitti.with_suffix(".yaml")
    path.write_text(path.read_text().replace(old, new, 1))
    error = refused("import", "bi-lora", kitti, tmp_path / "adapter")
    assert path.name in error and re.search(message, error)


def test_settings_that_are_none(kitti, refused, tmp_path):
    kitti.with_suffix(".yaml").write_text("5")
    assert "must have the keys backbone, bit, " in refused("import", "bi-lora", kitti, tmp_path / "adapter")


def test_a_scale_without_a_point(kitti, tmp_path):
    path = kitti.with_suffix(".yaml")
    path.write_text(path.read_text().replace("100.0", "100"))
    export_bi_lora(import_bi_lora(kitti, tmp_path / "adapter"), tmp_path / "new" / kitti.name)
    assert (tmp_path / "new" / path.name).read_text() == path.read_text().replace("100", "100.0")


def test_sizes_are_looked_at_before_anything_is_read(kitti, refused, tmp_path):
    with open(kitti, "r+b") as file:
        file.truncate(2**37)  # takes no room on the disk
    assert "has 137,438,953,472 bytes" in refused("import", "bi-lora", kitti, tmp_path / "adapter")


def test_a_file_of_zeros_that_fits_its_settings(kitti, refused, tmp_path):
    path = kitti.with_suffix(".yaml")
    path.write_text(path.read_text().replace("num_class: 4", "num_class: 1000000000"))
    with open(kitti, "r+b") as file:
        file.truncate(48 * (96 + 8) + 1_000_000_000 * 96 + 8)
    assert "has rank 1 and 1,000,000,000 classes" in refused("import", "bi-lora", kitti, tmp_path / "adapter")


def test_a_key_twice(kitti, refused, tmp_path):
    path = kitti.with_suffix(".yaml")
    path.write_text(path.read_text() + "scale: 1.0\n")
    assert "no YAML: scale is there twice" in refused("import", "bi-lora", kitti, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["kitti-bit2-dim1", "kitti-bit1-dim8"])
def test_a_name_that_says_something_else(kitti, refused, tmp_path, name):
    file = tmp_path / f"{name}.bin"
    shutil.copyfile(kitti, file)
    shutil.copyfile(kitti.with_suffix(".yaml"), file.with_suffix(".yaml"))
    error = refused("import", "bi-lora", file, tmp_path / "adapter")
    assert f"{file}: the name says bit" in error and "but the adapter has 1 bits and rank 1" in error


@pytest.mark.parametrize("suffix", [".bin", ".yaml"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_no_ordinary_file(kitti, refused, tmp_path, suffix, make):
    kitti.with_suffix(suffix).unlink()
    make(kitti.with_suffix(suffix))
    assert str(kitti.with_suffix(suffix)) in refused("import", "bi-lora", kitti, tmp_path / "adapter")


@pytest.mark.parametrize("suffix", [".bin", ".yaml"])
def test_a_missing_file(kitti, refused, tmp_path, suffix):
    kitti.with_suffix(suffix).unlink()
    error = refused("import", "bi-lora", kitti, tmp_path / "adapter")
    assert f"there is no file {kitti.with_suffix(suffix)}" in error


def test_other_names_and_targets(kitti, refused, tmp_path):
    settings = kitti.with_suffix(".yaml")
    assert "called NAME-bitB-dimR.bin" in refused("import", "bi-lora", settings, tmp_path / "adapter")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "exists already" in refused("import", "bi-lora", kitti, tmp_path / "adapter")
    assert "must be another folder" in refused("import", "bi-lora", kitti, tmp_path, "--overwrite")
    assert main(["import", "bi-lora", str(kitti), str(tmp_path / "adapter"), "--overwrite"]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_base_model_of_its_own(kitti, refused, tmp_path):
    """A folder is checked; other names are taken unchecked, because the file says nothing about them."""
    ViTConfig().save_pretrained(tmp_path / "vit")
    ViTConfig(patch_size=32).save_pretrained(tmp_path / "other")
    for base in (tmp_path / "vit", "my/copy"):
        import_bi_lora(kitti, tmp_path / "adapter", base_model=base, overwrite=True)
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(base)
        if base != "my/copy":
            export_bi_lora(tmp_path / "adapter", tmp_path / "a" / kitti.name)
    error = refused("import", "bi-lora", kitti, tmp_path / "target", "--base_model", tmp_path / "other")
    assert "is no ViT-B/16" in error and "'patch_size': 32" in error
    export = ("export", tmp_path / "adapter", "--to", "bi-lora", tmp_path / "b.bin")
    assert "is no ViT-B/16" in refused(*export, "--base_model", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{")
    assert "cannot be read" in refused(*export, "--base_model", tmp_path / "other")
    error = refused(*export)
    assert "its base model is 'my/copy'" in error and f"say --base_model {BASE_MODEL}" in error
    assert main([*map(str, export), "--base_model", BASE_MODEL]) == 0


def mask(tensors):
    key = f"base_model.model.{names('v_proj')[3]}.lora_packed"
    matrices, _ = unpack_module(tensors[key], 2)
    active = torch.ones(12, dtype=torch.bool)
    active[[2, 5]] = False
    up = matrices[1]._replace(rows=active.repeat_interleave(64))
    tensors[key] = pack_module([matrices[0], up], active)


def cut(tensors):
    key = f"base_model.model.{names('q_proj')[0]}.lora_packed"
    tensors[key] = tensors[key][:-1].clone()


CLASSIFIER = "base_model.model.classifier"
OTHER = {
    "masks": (mask, {}, "attention.v.*: heads \\[2, 5\\] are deactivated, .*--to packed, --to lora"),
    "k": (
        lambda t: t.update({f"base_model.model.{names('k_proj')[0]}.lora_packed": t[next(iter(t))].clone()}),
        {},
        "q and v of all 12 blocks of a ViT-B/16 .*besides it has .*k",
    ),
    "norm": (
        lambda t: t.update({"base_model.model.vit.layernorm.weight": torch.ones(768)}),
        {},
        "besides it has .*layernorm",
    ),
    "a block": (lambda t: t.pop(f"base_model.model.{names('v_proj')[11]}.lora_packed"), {}, "it has no .*11"),
    "no head": (lambda t: t.pop(f"{CLASSIFIER}.weight"), {}, "it has no .*classifier.weight"),
    "bias": (lambda t: t[f"{CLASSIFIER}.bias"].add_(1), {}, "has a bias, .*classifier_bits=32"),
    "head": (lambda t: t.update({f"{CLASSIFIER}.bias": torch.zeros(5)}), {}, "shape \\(4, 768\\) .* \\(5, 768\\)"),
    "damage": (cut, {}, "attention.*: 96 bytes were to follow at byte .*, but only 95 are left"),
    "float head": (
        lambda t: t.update({f"{CLASSIFIER}.weight": torch.ones(4, 768)}),
        {},
        "the classifier: a packed module is a flat uint8 tensor",
    ),
    "nan head": (
        lambda t: t.update({f"{CLASSIFIER}.weight": torch.full((4, 768), torch.nan)}),
        {"classifier_bits": 32},
        "not finite",
    ),
    "rank": (None, {"r": 2}, "factors of shape \\(1, 768\\) and .* expected \\(2, 768\\)"),
    "bits": (None, {"adapter_bits": 2}, "with 1 bits; expected .* with 2"),
    "32 bits": (None, {"adapter_bits": 32}, "no k-bit weights; train with adapter_bits of 1, 2, 4, 8"),
    "head of 4": (None, {"classifier_bits": 4}, "classifier has 4 bits, but the form has heads of 1 or 32"),
    "patterns": (None, {"rank_pattern": {"q": 2}}, "it has rank_pattern, .*--to packed"),
    "scales": (None, {"alpha_pattern": {"q": 2}}, "it has alpha_pattern"),
    "lora_bias": (None, {"lora_bias": True}, "it has lora_bias"),
    "scope": (None, {"mask_scope": "head", "ne": 1}, "mask_scope='head' .*--to merged"),
    "scale": (None, {"lora_alpha": 0}, "scale must be a positive number"),
    "no scale": (None, {"lora_alpha": None}, "lora_alpha=None"),
    "no rank": (None, {"r": None}, "r=None"),
    "type": (None, {"peft_type": "IA3"}, "type IA3"),
}


@pytest.mark.parametrize("name", OTHER)
def test_adapters_for_which_there_is_no_place(adapter, refused, tmp_path, name):
    change, settings, message = OTHER[name]
    if change:
        edit(adapter, change)
    edit_settings(adapter, **settings)
    error = refused("export", adapter, "--to", "bi-lora", tmp_path / "a" / "b.bin")
    assert str(adapter) in error and re.search(message, error)


def test_a_stock_adapter(refused, tmp_path):
    model = get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj", "v_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    assert "no k-bit weights" in refused("export", tmp_path / "adapter", "--to", "bi-lora", tmp_path / "b.bin")


@pytest.mark.parametrize("there", [".bin", ".yaml"])
def test_existing_files(adapter, refused, tmp_path, there):
    file = tmp_path / "a-bit1-dim1.bin"
    file.with_suffix(there).write_text("mine")
    assert "exists already and nothing was changed; --overwrite" in refused("export", adapter, "--to", "bi-lora", file)
    assert file.with_suffix(there).read_text() == "mine"
    assert main(["export", str(adapter), "--to", "bi-lora", str(file), "--overwrite"]) == 0
    assert yaml.safe_load(file.with_suffix(".yaml").read_text())["dataset"] == "a" and len(read_plain(file).bias) == 4
    file.unlink()
    file.mkdir()
    assert "is a folder" in refused("export", adapter, "--to", "bi-lora", file, "--overwrite")


def test_both_files_or_none(adapter, tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    for path in (file, file.with_suffix(".yaml")):
        path.write_text("mine")
    replace, calls = os.replace, []

    def crash(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(*args)

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        export_bi_lora(adapter, file, overwrite=True)
    assert both(file) == (b"mine", b"mine")


def test_a_name_that_is_wrong(adapter, refused, tmp_path):
    error = refused("export", adapter, "--to", "bi-lora", tmp_path / "kitti-bit1-dim32.bin")
    assert "says bit 1 and dim 32, but the adapter has 1 bits and rank 1; call it kitti-bit1-dim1.bin" in error
    assert "called NAME-bitB-dimR.bin" in refused("export", adapter, "--to", "bi-lora", tmp_path / "folder")


def test_what_the_commands_say(kitti, tmp_path, capsys):
    adapter, file = tmp_path / "adapter", tmp_path / "new" / kitti.name
    assert main(["import", "bi-lora", str(kitti), str(adapter)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{kitti} -> {adapter} (bi-lora)" and len(lines) == 5
    assert main(["export", str(adapter), "--to", "bi-lora", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{adapter} -> {file} (bi-lora)"
    assert [line.split() for line in lines[1:]] == [
        ["5,384", "bytes", file.name],
        ["112", "bytes", "kitti-bit1-dim1.yaml"],
    ]
