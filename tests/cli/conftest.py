"""A tiny checkpoint, folders of images, and `peft-heads train` on them."""

import sys

import pytest
import tiny
import torch
from coloured_pictures import LABELS, pictures
from transformers import ViTConfig, ViTForImageClassification

from peft_heads.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny ViT for five classes with its image processor."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5)
    ViTForImageClassification(config).save_pretrained(folder)
    tiny.ViTProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("validation", 4)):
        for name in LABELS:
            (root / split / name).mkdir(parents=True)
        for index, (label, image) in enumerate(pictures(count, seed=count)):
            image.save(root / split / LABELS[label] / f"{index}.png")
    return root


@pytest.fixture
def train(checkpoint, folders, tmp_path, monkeypatch):
    """Return `train(*words, data=…)`, which runs `peft-heads train` with short settings that the words override."""
    monkeypatch.setattr(sys, "argv", ["peft-heads"])
    cache = ["--cache_dir", str(folders / "cache")]
    folder_data = ["--train_dir", str(folders / "train"), "--validation_dir", str(folders / "validation")]

    def run(*words, data=folder_data, config=()):
        settings = ["--model_name_or_path", checkpoint, "--output_dir", str(tmp_path / "out"), "--use_cpu", *cache]
        settings += ["--num_train_epochs=4", "--learning_rate=1e-2", "--per_device_train_batch_size=4"]
        settings += ["--head_select_at=0.5"] if not any("--method" in str(word) for word in words) else []
        return main(["train", *config, *settings, *data, *map(str, words)])

    return run
