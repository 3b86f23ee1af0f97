"""The README's Python blocks run, one after the other, with a tiny checkpoint and data set in place of the Hub's."""

import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from PIL import Image

from peft_heads import get_head_masks
from peft_heads.demo.model import load_demo_processor


README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def stand_ins(tmp_path):
    """Make local folders in place of the README's two names on the Hub."""
    checkpoint = tmp_path / "checkpoint"
    tiny.make("vit").save_pretrained(checkpoint)
    processor = load_demo_processor()
    processor.size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    processor.save_pretrained(checkpoint)

    data = tmp_path / "data"
    data.mkdir()
    colours = ["red", "green", "blue"]
    features = datasets.Features(
        {"image": datasets.Image(), "labels": datasets.ClassLabel(names=["angular", "rust", "healthy"])}
    )
    rows = {
        "image": [Image.new("RGB", (20, 20), colours[i % 3]) for i in range(24)],
        "labels": [i % 3 for i in range(24)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(data / "train.parquet")
    return {"google/vit-base-patch16-224-in21k": str(checkpoint), "AI-Lab-Makerere/beans": str(data)}


@pytest.mark.skipif(tiny.OLD_NAMES, reason="the README has the names of transformers 5.9 and later")
def test_code_blocks_run(stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:
        for name, folder in stand_ins.items():
            block = block.replace(name, folder)
        exec(compile(block, str(README), "exec"), namespace)

    assert (tmp_path / "beans" / "head_scores.json").exists() and (tmp_path / "beans" / "head_scores.png").exists()
    assert namespace["model"].active_adapter == "again"
    masks = get_head_masks(namespace["model"])
    assert {int((~mask).sum()) for mask in masks.values()} == {1}
    assert str(masks) == str(namespace["masks"])
    assert isinstance(
        namespace["image_processor"](Image.new("RGB", (9, 9)), return_tensors="pt")["pixel_values"], torch.Tensor
    )
    assert "tensor([" in capsys.readouterr().out


def test_length():
    """The README is short enough for a newcomer to read to the end."""
    assert len(README.read_text("utf-8").splitlines()) <= 172
