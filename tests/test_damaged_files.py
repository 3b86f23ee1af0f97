"""Truncated, empty and foreign files raise an error that names the file; nothing on disk changes."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification

from peft_heads import (
    HeadMaskedLoraConfig,
    get_head_masks,
    load_image_classifier,
    set_head_masks,
    set_image_processor,
)
from peft_heads.cli.main import main


PROCESSOR = tiny.ViTProcessor(size={"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE})
FAULTS = {
    "truncated": lambda content, name: content[: len(content) // 2],
    "empty": lambda content, name: b"",
    "foreign": lambda content, name: b"[1, 2]" if name.endswith(".json") else b"PK\x03\x04 something else",
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Make a base checkpoint with an image processor, one of our adapters, a stock one, and images of two classes."""
    root = tmp_path_factory.mktemp("originals")
    base = tiny.make("vit")
    base.save_pretrained(root / "base")
    PROCESSOR.save_pretrained(root / "base")
    base = AutoModelForImageClassification.from_pretrained(root / "base")
    base.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    ours = get_peft_model(base, HeadMaskedLoraConfig(ne=1))
    set_head_masks(ours, tiny.masks_off(ours, 1))
    set_image_processor(ours, PROCESSOR)
    ours.save_pretrained(root / "ours")
    stock = LoraConfig(target_modules=tiny.now(["q_proj"]))
    get_peft_model(AutoModelForImageClassification.from_pretrained(root / "base"), stock).save_pretrained(
        root / "stock"
    )
    for label in ("ant", "bee"):
        (root / "images" / label).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (20, 20), (index * 40, 0, 0)).save(root / "images" / label / f"{index}.png")
    return root


@pytest.fixture
def damaged(originals, tmp_path):
    """Return `damaged(folder, file, fault)`, which copies a folder and damages one file of the copy."""

    def damage(folder, file, fault):
        copy = shutil.copytree(originals / folder, tmp_path / folder)
        path = copy / file
        path.write_bytes(FAULTS[fault](path.read_bytes(), path.name))
        return copy

    return damage


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_with_adapter():
    return get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))


OURS = {
    "load_image_classifier": load_image_classifier,
    "from_pretrained": lambda folder: PeftModel.from_pretrained(tiny.make("vit"), folder),
    "load_adapter": lambda folder: model_with_adapter().load_adapter(folder, "other"),
    "config": HeadMaskedLoraConfig.from_pretrained,
}
STOCK = {
    "from_lora": HeadMaskedLoraConfig.from_lora,
    "joins": lambda folder: PeftModel.from_pretrained(
        tiny.make("vit"), folder, config=HeadMaskedLoraConfig.from_lora(folder)
    ),
}
CASES = [
    *[("ours", "adapter_config.json", name) for name in ("load_image_classifier", "config")],
    *[("ours", "adapter_model.safetensors", name) for name in OURS if name != "config"],
    *[("ours", "labels.json", name) for name in OURS],
    ("ours", "preprocessor_config.json", "load_image_classifier"),
    *[("stock", "adapter_config.json", name) for name in STOCK],
    ("stock", "adapter_model.safetensors", "joins"),
    ("stock", "adapter_model.safetensors", "load_image_classifier"),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("folder", "file", "function"), CASES)
def test_functions(damaged, folder, file, function, fault):
    copy = damaged(folder, file, fault)
    before = contents(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=file):
        (OURS | STOCK)[function](str(copy))
    assert contents(copy) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loaded_model_is_left_as_it_was(damaged, fault):
    model = model_with_adapter()
    tiny.randomize_lora(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        model.load_adapter(str(damaged("ours", "adapter_model.safetensors", fault)), "default")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(mask.all() for mask in get_head_masks(model).values())


@pytest.mark.parametrize("fault", ["truncated", "foreign"])
def test_head_scores_of_another_run_are_not_shown(originals, tmp_path, fault):
    """If masks and scores cannot be compared, the scores are not read back, and the card has none."""
    copy = shutil.copytree(originals / "ours", tmp_path / "ours")
    (copy / "head_scores.json").write_bytes(FAULTS[fault](b'{"deactivated_heads": {}}', "head_scores.json"))
    (copy / "head_scores.png").write_bytes(b"no picture")
    model = PeftModel.from_pretrained(tiny.make("vit"), copy)
    model.save_pretrained(copy)
    assert "head_scores" not in (copy / "README.md").read_text()


# Commands


@pytest.fixture
def command(originals, tmp_path, capsys):
    """Return `command(*words)`, which runs a command that must fail, and returns the line that it prints."""

    def run(*words):
        before = contents(tmp_path)
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"peft-heads {words[0]}: error: ")
        after = contents(tmp_path)
        assert {path: after.get(path) for path in before} == before
        return error

    return run


def train(originals, tmp_path, **replaced):
    words = {
        "model_name_or_path": originals / "base",
        "train_dir": originals / "images",
        "cache_dir": tmp_path.parent / f"{tmp_path.name}-cache",
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "disable_tqdm": True,
        **({} if "method" in replaced else {"head_select_at": 2}),
        **replaced,
    }
    return ["train", "--use_cpu", *(f"--{key}={value}" for key, value in words.items())]


@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO")  # datasets leaves what it cannot decode open
@pytest.mark.parametrize("fault", FAULTS)
def test_train_on_a_damaged_image(originals, damaged, command, tmp_path, fault):
    images = damaged("images", "bee/2.png", fault)
    error = command(*train(originals, tmp_path, train_dir=images, train_val_split=0, per_device_train_batch_size=8))
    assert f"image {images / 'bee' / '2.png'} cannot be read" in error


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_train_from_a_damaged_checkpoint(originals, damaged, command, tmp_path, file, fault):
    base = damaged("base", file, fault)
    error = command(*train(originals, tmp_path, model_name_or_path=base))
    assert str(base) in error
    assert file in error


@pytest.mark.parametrize("name", ["settings.json", "settings.yaml"])
def test_train_with_a_damaged_config_file(command, tmp_path, name):
    path = tmp_path / name
    path.write_text('{"output_dir": "x", "ne":')
    assert f"{path} cannot be read" in command("train", path)
    path.write_text("[1, 2]")
    assert f"{path} holds no mapping" in command("train", path)


@pytest.mark.parametrize("content", ['{"peft_type": "LO', "[1, 2]", ""])
def test_train_with_a_damaged_peft_config(originals, command, tmp_path, content):
    path = tmp_path / "peft.json"
    path.write_text(content)
    error = command(*train(originals, tmp_path, method="peft", peft_config=path))
    assert f"--peft_config {path} " in error


def test_a_whole_adapter_still_loads(originals):
    model, processor = load_image_classifier(originals / "ours")
    assert model.config.id2label[2] == "cat" and processor.size["height"] == tiny.IMAGE_SIZE
    assert json.loads((originals / "ours" / "labels.json").read_text())["id2label"]["1"] == "bee"
