"""Int8 files: what they hold and predict, and the comparison that is printed beside."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from coloured_pictures import LABELS, pictures
from tiny import ViTProcessor
from transformers import ViTConfig, ViTForImageClassification

from peft_heads.cli.main import main
from peft_heads.convert import int8
from peft_heads.convert import onnx as convert_onnx
from peft_heads.convert.int8 import Int8Report, LabelledImages, find_labelled
from peft_heads.convert.onnx import export_onnx
from peft_heads.data.images import ImageTransform
from peft_heads.metrics.timing import ratio


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A classifier that has learned three colours, and folders of images: labelled, and not."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    root = tmp_path_factory.mktemp("int8")
    for name, image in pictures(8, seed=1):
        (root / "train" / LABELS[name]).mkdir(parents=True, exist_ok=True)
        (root / "unsorted").mkdir(exist_ok=True)
        for place in (root / "train" / LABELS[name], root / "unsorted"):
            image.save(place / f"{len(list(place.iterdir()))}.png")
    processor = ViTProcessor(size={"height": 16, "width": 16})
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 384}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))
    model.config.id2label = dict(enumerate(LABELS))
    labels, images = zip(*pictures(8, seed=2), strict=True)
    pixels, right = ImageTransform(processor).pixel_values(list(images)), torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        torch.nn.functional.cross_entropy(model(pixels).logits, right).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--int8=dynamic", "--eval_dir={home}/train"],
        ["--int8=static", "--calibration={home}/unsorted", "--eval_dir={home}/train"],
        ["--int8=static", "--calibration={home}/train"],
        ["--int8=static", "--calibration={home}/unsorted"],
        ["--int8=dynamic"],
    ],
)
def test_what_is_written_and_printed(words, home, tmp_path, capsys):
    words = [word.format(home=home) for word in words]
    assert main(["export", str(home / "model"), "--to", "onnx", str(tmp_path / "a.onnx"), *words]) == 0
    printed = capsys.readouterr().out
    assert os.listdir(tmp_path) == ["a.onnx"]
    size = (tmp_path / "a.onnx").stat().st_size
    floats = int(printed.partition("\nbytes ")[2].split()[0].replace(",", ""))
    assert f"{size:>13,} bytes  a.onnx" in printed and f"{floats:>13,} {size:>13,}" in printed
    assert size < 0.45 * floats
    for batch in (1, 8):
        assert f"times as fast here in batches of {batch} (95 % of the median: " in printed
    has_labels = any(word.endswith("train") for word in words)
    assert ("accuracy        100.00%       100.00%\n" in printed) == has_labels
    assert ("accuracy not measured: give labelled images" in printed) == (words == ["--int8=dynamic"])
    seen = " (those of the calibration)" if len(words) == 2 and "static" in words[0] else ""
    where = words[-1].partition("=")[2]
    if len(words) > 1:
        assert f"same class for 100.00% of the 24 images in {where}{seen}\n" in printed
    # its metadata is that of the float32 file
    assert main(["predict", str(tmp_path / "a.onnx"), str(home / "train" / "green")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("\tgreen 0." in line for line in lines)


@pytest.mark.slow
def test_a_second_file(home, tmp_path, monkeypatch):
    """Int8 weights may fit into one file where float32 ones do not."""
    weights = (home / "model" / "model.safetensors").stat().st_size
    monkeypatch.setattr(convert_onnx, "ONE_FILE", weights // 2)
    assert len(export_onnx(home / "model", tmp_path / "f.onnx").files) == 2
    assert export_onnx(home / "model", tmp_path / "i.onnx", int8="dynamic").files == [tmp_path / "i.onnx"]
    monkeypatch.setattr(convert_onnx, "ONE_FILE", weights // 8)
    assert len(export_onnx(home / "model", tmp_path / "j.onnx", int8="dynamic").files) == 2
    names = ["f.onnx", "f.onnx.data", "i.onnx", "j.onnx", "j.onnx.data"]
    assert sorted(os.listdir(tmp_path)) == names
    for name in ("i.onnx", "j.onnx"):
        assert main(["predict", str(tmp_path / name), str(home / "train" / "red")]) == 0


@pytest.mark.slow
def test_an_unreadable_calibration_image(home, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    words = ["--int8=static", f"--calibration={tmp_path / 'images'}"]
    capsys.readouterr()
    assert main(["export", str(home / "model"), "--to", "onnx", str(tmp_path / "a.onnx"), *words]) == 2
    error = capsys.readouterr().err
    assert "a.png cannot be read" in error and error.count("\n") == 1 and os.listdir(tmp_path) == ["images"]


def test_classes_by_folder():
    images = LabelledImages("x", ["x/ant/1.png", "x/bee/2.png"])
    assert find_labelled(images, {0: "bee", 1: "ant", 2: "cat"}, strict=True).classes == [1, 0]
    assert find_labelled(images, {0: "ant"}, strict=False).classes is None
    with pytest.raises(ValueError, match=r"--eval_dir x: expected one folder per class \(ant\) .* images lie in bee"):
        find_labelled(images, {0: "ant"}, strict=True)


class Constant:
    """A classifier that predicts one class, and takes its time."""

    image_processor = ViTProcessor(size={"height": 16, "width": 16})

    def __init__(self, index, seconds):
        self.index, self.seconds, self.session = index, seconds, self

    def get_inputs(self):
        return [SimpleNamespace(shape=["batch", 3, 16, 16])]

    def logits(self, pixel_values):
        time.sleep(self.seconds)
        return torch.eye(3)[[self.index] * len(pixel_values)]


def test_which_side_is_which(tmp_path, monkeypatch):
    sides = {"f.onnx": Constant(0, 2e-3), "i.onnx": Constant(1, 0.0)}
    for number, name in enumerate(sides):
        (tmp_path / name).write_bytes(b"x" * (number + 1))
    monkeypatch.setattr(int8, "open_classifier", lambda path: sides[path.name])
    files = []
    for index, (_, image) in enumerate(pictures(1, seed=0)):
        files.append(str(tmp_path / f"{index}.png"))
        image.save(files[-1])
    images = LabelledImages("x", files, classes=[0, 0, 1])
    report = int8.compare(tmp_path / "f.onnx", tmp_path / "i.onnx", images)
    assert report.accuracy == pytest.approx((2 / 3, 1 / 3)) and report.agreement == 0 and report.bytes == (1, 2)
    assert report.speed.keys() == {1, 8} and all(speed.median > 2 for speed in report.speed.values())
    sides["i.onnx"].index, sides["i.onnx"].logits = 1, lambda pixel_values: torch.full((1, 3), torch.nan)
    with pytest.raises(ValueError, match="the int8 file's logits are not finite"):
        int8.compare(tmp_path / "f.onnx", tmp_path / "i.onnx", None)


def test_report():
    twice = ratio([2.0] * 10, [1.0] * 10)
    seen = LabelledImages("dir", ["a", "b"], seen=True)
    lines = Int8Report((4_000, 1_000), {1: twice}, seen, (0.5, 1.0), 0.5).lines()
    assert [line.split() for line in lines[1:3]] == [["bytes", "4,000", "1,000"], ["accuracy", "50.00%", "100.00%"]]
    assert lines[3:] == [
        "same class for 50.00% of the 2 images in dir (those of the calibration)",
        "int8 is 2.00 times as fast here in batches of 1 (95 % of the median: 2.000 to 2.000)",
    ]
    assert any(line.startswith("accuracy not measured") for line in Int8Report((4, 1), {1: twice}).lines())
