"""`peft-heads predict` with every kind of model, and what it refuses."""

import json

import pytest
import tiny
import torch
from peft import get_peft_model
from PIL import Image
from tiny import ViTProcessor

from peft_heads import HeadMaskedLoraConfig, get_head_masks, set_head_masks
from peft_heads.adapter_folder.contents import set_image_processor
from peft_heads.cli.main import main
from peft_heads.convert.merged import export_merged
from peft_heads.convert.pruned import export_pruned


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base model, an adapter on it with two heads off, the merged model, and coloured images."""
    root = tmp_path_factory.mktemp("predict")
    base = tiny.make("vit")
    for param in base.parameters():
        param.data += 0.2 * torch.randn_like(param)
    base.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    base.save_pretrained(root / "base")
    base = type(base).from_pretrained(root / "base")
    model = get_peft_model(base, HeadMaskedLoraConfig(ne=2, mask_scope="head")).eval()
    tiny.randomize_lora(model)
    masks = get_head_masks(model)
    for mask in masks.values():
        mask[:2] = False
    set_head_masks(model, masks)
    set_image_processor(model, ViTProcessor(size={"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}))
    model.save_pretrained(root / "adapter")
    export_merged(root / "adapter", root / "merged")
    (root / "images" / "deep").mkdir(parents=True)
    for index, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (20, 30), colour).save(root / "images" / ("deep" if index % 2 else ".") / f"{index}.png")
    return root


@pytest.fixture
def predict(home, capsys):
    def run(model, *words, code=0):
        capsys.readouterr()
        images = [] if any("images" in word for word in words) else [str(home / "images")]
        assert main(["predict", str(home / model), *images, "--device=cpu", *words]) == code
        return capsys.readouterr()

    return run


def test_adapter_and_merged(home, predict):
    """File, label, probability, in the order of the files; both models say the same."""
    printed = predict("adapter")
    rows = [line.split("\t") for line in printed.out.splitlines()]
    names = ["0.png", "2.png", "deep/1.png", "deep/3.png"]
    assert [file for file, _ in rows] == [str(home / "images" / name) for name in names] and printed.err == ""
    assert all(label.split()[0] in ("ant", "bee", "cat") and 0 < float(label.split()[1]) < 1 for _, label in rows)
    same(probabilities(predict, "adapter"), probabilities(predict, "merged", "--batch_size=3"))


@pytest.mark.slow
def test_pruned_and_onnx(home, predict):
    """The ONNX file is alone in a folder: its metadata suffices."""
    pytest.importorskip("onnxruntime")
    export_pruned(home / "adapter", home / "pruned")
    (home / "alone").mkdir()
    for source, file in (("adapter", "a.onnx"), ("pruned", "p.onnx")):
        assert main(["export", str(home / source), "--to", "onnx", str(home / "alone" / file)]) == 0
    expected = probabilities(predict, "adapter")
    for model in ("pruned", "alone/a.onnx", "alone/p.onnx"):
        same(probabilities(predict, model), expected)
    error = predict("alone/a.onnx", "--device=tpu", code=2).err
    assert "--device tpu: ONNX Runtime has no such execution provider here; there is" in error and "cpu" in error


def probabilities(predict, model, *words):
    found = json.loads(predict(model, "--format=json", "--top_k=3", *words).out)
    return [{x["label"]: x["probability"] for x in entry["predictions"]} for entry in found]


def same(found, expected):
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert abs(expected[0]["ant"] - expected[1]["ant"]) > 1e-3  # the images differ for the model


def test_an_unreadable_image(home, predict, tmp_path):
    """It is named, the others are predicted, and the exit code is 1."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (9, 9)).save(images / "good.png")
    (images / "bad.png").write_bytes(b"\x89PNG")
    printed = predict("merged", str(images), code=1)
    assert printed.out.startswith(str(images / "good.png")) and printed.out.count("\n") == 1
    first, second = printed.err.splitlines()
    assert first.startswith(f"peft-heads predict: image {images / 'bad.png'} cannot be read")
    assert second == "peft-heads predict: 1 of 2 images could not be read"


def test_output_file(predict, tmp_path, monkeypatch):
    file = tmp_path / "out.csv"
    words = ("--format=csv", f"--output={file}")
    assert predict("merged", *words).out == ""
    assert file.read_text().startswith("file,rank,label,probability\n") and file.read_text().count("\n") == 5
    assert "exists already and nothing was changed" in predict("merged", *words, code=2).err
    file.write_text("old")
    with monkeypatch.context() as patch:

        def crash(*args):
            raise OSError(28, "No space left on device")

        patch.setattr("os.replace", crash)
        predict("merged", *words, "--overwrite", code=1)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    predict("merged", *words, "--overwrite")
    assert file.read_text().startswith("file,")


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("merged", ["--top_k=0"], "--top_k 0 must be at least 1"),
        ("merged", ["--batch_size=-1"], "--batch_size -1 must be at least 1"),
        ("merged", ["--device=nonsense"], "--device nonsense cannot be used: "),
        ("merged", ["no/images"], "there is no file or folder no/images"),
        ("images", [], "images holds neither an adapter (adapter_config.json) nor a checkpoint of transformers"),
        ("images/0.png", [], "0.png is a file; expected the folder of an adapter or of a checkpoint"),
        ("none", [], "no adapter"),
        ("none.onnx", [], "there is no file"),
    ],
)
def test_refused(model, words, message, predict):
    if model.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    error = predict(model, *words, code=2).err
    assert message in error and error.count("\n") == 1 and error.startswith("peft-heads predict: error: ")
