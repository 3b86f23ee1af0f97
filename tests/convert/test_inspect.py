"""What `inspect` reports about a saved adapter, compared with the adapter itself."""

import json
import shutil
from pathlib import Path

import backbones
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from peft_heads import (
    HeadMaskedLoraConfig,
    RLRRConfig,
    get_head_masks,
    get_neuron_masks,
    pack_adapter,
    set_head_masks,
    set_neuron_masks,
)
from peft_heads.cli.main import main
from peft_heads.convert.inspect import inspect_adapter


pytestmark = [
    pytest.mark.filterwarnings("ignore:ne=1. . group.s. with no more heads"),
    pytest.mark.filterwarnings("ignore:these targets have no attention heads"),
]
CONFIGS = {
    "vit": HeadMaskedLoraConfig(ne=1, use_rslora=True, alpha_pattern={tiny.now("v_proj"): 3}),
    "hiera": HeadMaskedLoraConfig(ne=1),  # one projection for q, k and v
    "vit 2 bits": HeadMaskedLoraConfig(ne=1, adapter_bits=2),
    "vit packed": HeadMaskedLoraConfig(ne=1, adapter_bits=1, classifier_bits=2),
    "hiera packed": HeadMaskedLoraConfig(ne=1, adapter_bits=4),
    "stock": LoraConfig(r=4, target_modules=tiny.now(["q_proj", "o_proj"]), modules_to_save=["classifier"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`{name: (model, folder of its adapter)}`"""
    adapters = {}
    for name, config in CONFIGS.items():
        root = tmp_path_factory.mktemp(name)
        (backbones.FAMILIES["hiera"].make() if "hiera" in name else tiny.make("vit")).save_pretrained(root / "base")
        model = get_peft_model(AutoModelForImageClassification.from_pretrained(root / "base"), config)
        tiny.randomize_lora(model)
        if name != "stock":
            masks = {key: mask for key, mask in get_head_masks(model).items() if len(mask) > 1}
            for mask in masks.values():
                mask[1] = False
            set_head_masks(model, masks)
        if name.endswith("packed"):
            pack_adapter(model)
        model.save_pretrained(root / "adapter")
        adapters[name] = model, root / "adapter"
    return adapters


@pytest.fixture
def copy_of(saved, tmp_path):
    return lambda name: shutil.copytree(saved[name][1], tmp_path / name)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_are_those_of_the_update(saved, name):
    model, folder = saved[name]
    report = inspect_adapter(folder)
    assert report.no_norms == ""
    seen = set()
    for module_name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A") or module_name.endswith(tiny.now("attention.o_proj")):
            continue
        layout = getattr(module, "head_layout", {}).get("default")
        if layout is None:  # stock
            parts = {module_name: slice(0, 24)}
        else:
            parts = {
                key: slice(p.first_row, p.first_row + p.num_rows) for key, p in layout.named_parts(module_name).items()
            }
        delta = module.get_delta_weight("default").detach().double()
        for key, rows in parts.items():
            heads = delta[rows].reshape(len(report.norms[key]), -1)
            torch.testing.assert_close(report.norms[key], heads.norm(dim=1), rtol=1e-5, atol=1e-7)
            seen.add(key)
    assert seen == set(report.norms)


@pytest.mark.parametrize("name", ["vit", "hiera", "vit packed", "hiera packed"])
def test_masks_are_those_of_the_adapter(saved, name):
    model, folder = saved[name]
    masks = inspect_adapter(folder).masks
    expected = get_head_masks(model)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_bytes(saved, name):
    model, folder = saved[name]
    report = inspect_adapter(folder)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(number for n, number in trained.items() if "lora_" not in n)
    assert report.parameters == {"adapter": sum(trained.values()) - head, "classification head": head}
    if name == "vit packed":
        # r = 8, q and v of two layers, one bit; the classifier's three rows of two bits and its bias
        in_adapter = 2 * 2 * (8 * 24 + 8 * 20) // 8
        assert in_adapter < report.bytes["adapter"] <= in_adapter + 4 * (4 + 1 + 2 * 16)
        assert report.bytes["classification head"] == 4 + 16 + 3 * 24 * 2 // 8 + 3 * 4
    elif name != "hiera packed":
        assert report.bytes["adapter"] == 4 * report.parameters["adapter"]
        assert report.bytes["classification head"] == 4 * head
    assert sum(report.bytes.values()) == (folder / "adapter_model.safetensors").stat().st_size
    stored_apart = name != "stock" and "packed" not in name
    in_masks = sum(mask.numel() for mask in get_head_masks(model).values()) if stored_apart else 0
    assert report.bytes["masks and header"] > in_masks
    others = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "adapter_model.safetensors"}
    assert report.other_files == others


@pytest.mark.skipif(tiny.OLD_NAMES, reason="is about names of 4.57 under later versions")
def test_names_of_another_transformers():
    fixtures = Path(__file__).parents[1] / "fixtures"
    report = inspect_adapter(fixtures / "adapters" / "4.57.6" / "vit" / "ours", base_model=fixtures / "base" / "vit")
    assert report.norms.keys() == report.masks.keys()
    assert "vit.encoder.layer.0.attention.attention.query" in report.norms


def test_command(saved, capsys, tmp_path):
    folder = saved["vit"][1]
    before = contents(folder)
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "heads.png")]) == 0
    output = capsys.readouterr().out
    assert "HEAD_MASKED_LORA" in output and "ne=1, granularity=global" in output
    assert f"  {tiny.now('vit.layers.1.attention.v_proj')}: 1 of 6\n" in output
    assert f"{inspect_adapter(folder).bytes['adapter']:,} adapter\n" in output
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert contents(folder) == before
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "heads.png")]) == 2
    assert "heads.png exists already" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "heads.png"), "--overwrite"]) == 0
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "heads.jpg")]) == 2


def test_stock_lora(saved, capsys):
    assert main(["inspect", str(saved["stock"][1])]) == 0
    output = capsys.readouterr().out
    assert "LORA\n" in output and "none: the file has no head masks" in output
    norms = next(line for line in output.splitlines() if tiny.now("vit.layers.0.attention.q_proj") in line)
    assert len(norms.partition(": ")[2].split()) == 6
    assert tiny.now("o_proj") not in output.partition("norm of the update")[2]  # not made of heads


def test_without_the_base_model(copy_of, saved, capsys, tmp_path):
    folder = copy_of("hiera")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/gone"}))
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "norm of the update   not known: " in output and "'/gone'" in output
    assert "qkv: 1, " in output  # the heads of both parts, one after the other
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "heads.png")]) == 2
    assert "nothing to plot" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--base_model", "/also/gone"]) == 2
    assert "'/also/gone'" in capsys.readouterr().err
    report = inspect_adapter(folder, base_model=saved["hiera"][1].parent / "base")
    assert report.norms and all(name.endswith((".q", ".v")) for name in report.masks)


def test_packed_without_the_base_model(copy_of, capsys):
    for name in ("vit packed", "hiera packed"):
        path = copy_of(name) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/gone"}))
    assert main(["inspect", str(path.parents[1] / "vit packed")]) == 0
    output = capsys.readouterr().out
    assert f"  {tiny.now('vit.layers.1.attention.v_proj')}: 1 of 6\n" in output
    assert "adapter_bits=1, classifier_bits=2, packed=True" in output
    assert main(["inspect", str(path.parent)]) == 2  # which rows of a fused projection are there, only the model says
    assert "rows belong to heads is guessed: --base_model" in capsys.readouterr().err


FILES = ["adapter_config.json", "adapter_model.safetensors", "labels.json", "head_scores.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", [b"", b"[1, 2]", None], ids=["empty", "foreign", "truncated"])
def test_damaged_files(copy_of, capsys, file, fault):
    folder = copy_of("vit")
    if file == "head_scores.json":  # what it says is of no interest
        fault = b"{" if fault != b"" else fault
        (folder / file).touch()
    (folder / file).write_bytes((folder / file).read_bytes()[:30] if fault is None else fault)
    before = contents(folder)
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("peft-heads inspect: error: ") and error.count("\n") == 1 and str(folder / file) in error
    assert contents(folder) == before


def test_files_that_contradict_themselves(copy_of):
    folder = copy_of("vit")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_head_mask" in key)
    save_file({**tensors, key: torch.tensor([True, False, False, True, True, True])}, path)
    with pytest.raises(ValueError, match=r"contradicts itself: the mask of .* deactivates heads \[2\], whose update"):
        inspect_adapter(folder)
    save_file({**tensors, key: torch.ones(4, dtype=torch.bool)}, path)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: the head mask .* shape \(6,\)"):
        inspect_adapter(folder)
    save_file({**tensors, key: torch.ones(6)}, path)
    with pytest.raises(ValueError, match="must be a bool tensor"):
        inspect_adapter(folder)


def test_bits_that_the_settings_do_not_say(copy_of):
    path = copy_of("vit packed") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter_bits": 2}))
    with pytest.raises(ValueError, match=r"lora_packed is packed with 1 bits, but the settings say adapter_bits=2"):
        inspect_adapter(path.parent)


def test_other_methods_are_refused(copy_of):
    path = copy_of("stock") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="adapter of type IA3; expected"):
        inspect_adapter(path.parent)


@pytest.fixture(scope="module", params=["vit", "hiera"])
def rlrr(request, tmp_path_factory):
    """An RLRR adapter with deactivated heads, and its model; of hiera, one projection for q, k and v."""
    root = tmp_path_factory.mktemp("rlrr")
    (backbones.FAMILIES["hiera"].make() if request.param == "hiera" else tiny.make("vit")).save_pretrained(
        root / "base"
    )
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(root / "base"), RLRRConfig(ne=1))
    masks = {key: mask for key, mask in get_head_masks(model).items() if len(mask) > 1}
    for mask in masks.values():
        mask[1] = False
    set_head_masks(model, masks)
    model.save_pretrained(root / "adapter")
    return model, root / "adapter"


def test_rlrr(rlrr, tmp_path, capsys):
    model, folder = rlrr
    report = inspect_adapter(folder)
    expected = get_head_masks(model)
    assert report.masks.keys() == expected.keys()
    assert all(torch.equal(report.masks[key], expected[key]) for key in expected)
    assert report.norms == {} and "depends on the frozen weights" in report.no_norms
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    head = sum(number for n, number in trained.items() if "rlrr_" not in n)
    assert report.parameters == {"adapter": sum(trained.values()) - head, "classification head": head}
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "x.png")]) == 2
    assert "there is nothing to plot: the update of RLRR" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["rlrr_left", "rlrr_shift"])
def test_rlrr_whose_rows_were_edited(rlrr, part, tmp_path):
    folder = shutil.copytree(rlrr[1], tmp_path / "edited")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(k.replace("rlrr_head_mask.mask", part) for k in tensors if k.endswith("mask") and not tensors[k].all())
    save_file(tensors | {key: torch.ones_like(tensors[key])}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"contradicts itself: .* heads .1., whose rows of {part} are not zero"):
        inspect_adapter(folder)


def test_a_guess_needs_heads_of_equal_size(copy_of):
    """Without the base model a packed mask is spread evenly over the rows."""
    path = copy_of("vit packed") / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("lora_packed"))
    tensors[name][2] = 5  # heads
    save_file(tensors, path)
    config = path.parent / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/gone"}))
    with pytest.raises(ValueError, match="it has 5 heads in 24 rows, which is not the same number for every head"):
        inspect_adapter(path.parent)


@pytest.mark.parametrize("form", ["full", "2 bits", "packed"])
def test_neurons(form, tmp_path, capsys):
    """Their number is shown, layers with the same number together; none of them counts as a head."""
    tiny.make("vit").save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    bits = {} if form == "full" else {"adapter_bits": 2}
    model = get_peft_model(base, HeadMaskedLoraConfig(neuron_ratio=0.25, ne=2, **bits))
    tiny.randomize_lora(model)
    set_head_masks(model, tiny.masks_off(model, 0, 3))
    set_neuron_masks(model, {name: torch.arange(32) > 7 for name in get_neuron_masks(model)})
    if form == "packed":
        pack_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    report = inspect_adapter(tmp_path / "adapter")
    masks = {"masks": get_head_masks(model), "neuron_masks": get_neuron_masks(model)}
    for kind, expected in masks.items():
        found = getattr(report, kind)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not report.norms.keys() & masks["neuron_masks"].keys() and report.norms
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    shown = capsys.readouterr().out
    first = tiny.now("vit.layers.*.mlp.fc1")
    assert f"deactivated neurons\n  8 of 32 neurons in {first} (2 layers)\n" in shown
    assert "neuron_ratio=0.25, neuron_criterion=gate" in shown and len(shown) < 4000
    # what it refuses to load, it refuses to describe
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    key = next((key for key in stored if key.endswith("lora_neuron_mask.mask")), None)
    if key is not None:
        save_file(stored | {key: torch.arange(32) < 24}, path)
        with pytest.raises(ValueError, match=r"contradicts itself: .*deactivates neurons \[24, 25"):
            inspect_adapter(tmp_path / "adapter")


def test_neurons_are_not_mentioned_where_none_are_pruned(saved, capsys):
    assert main(["inspect", str(saved["vit"][1])]) == 0
    assert "neuron" not in capsys.readouterr().out
