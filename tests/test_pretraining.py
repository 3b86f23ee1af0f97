"""The scripts that made the shipped ViT; they are not part of the package."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_heads.demo.model import DEMO_MODEL_PATH, load_demo_model


SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Import a script by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.mark.slow
def test_pretraining_beats_random_weights_by_10_points(script):
    result = script("probe").compare()
    assert len(result["random"]) == 3
    assert result["gap"] == pytest.approx(result["shipped"] - sum(result["random"]) / 3)
    assert result["shipped"] - max(result["random"]) >= 0.10


def test_stroke_batches_are_deterministic(script):
    StrokeBatches = script("strokes").StrokeBatches
    first, same, other = (StrokeBatches(num_classes=20, batch_size=8, seed=seed) for seed in (5, 5, 6))
    for _ in range(2):
        pixels, labels = next(first)
        assert pixels.shape == (8, 3, 32, 32)
        assert pixels.min() >= -1 and pixels.max() <= 1
        same_pixels, same_labels = next(same)
        assert pixels.numpy().tobytes() == same_pixels.numpy().tobytes()
        assert torch.equal(labels, same_labels)
        assert pixels.numpy().tobytes() != next(other)[0].numpy().tobytes()


def test_characters_do_not_depend_on_the_number_of_classes(script):
    make_classes = script("strokes").make_classes
    few, many = make_classes(5), make_classes(9)
    assert torch.equal(few[0], many[0][:5]) and torch.equal(few[1], many[1][:5])


def test_characters_are_centred_and_bright(script):
    strokes = script("strokes")
    control, mask = strokes.make_classes(50)
    images = strokes.render(control, mask, torch.Generator().manual_seed(0))[:, 0]
    ink = images / images.sum(dim=(1, 2), keepdim=True)
    grid = (torch.arange(32) + 0.5) / 16 - 1
    assert abs((ink.sum(dim=1) * grid).sum(dim=1).mean()) < 0.1
    assert abs((ink.sum(dim=2) * grid).sum(dim=1).mean()) < 0.1
    assert (images.amax(dim=(1, 2)) > 0.4).all()
    assert images.mean() < 0.5


@pytest.mark.slow
def test_pretrain_smoke(script, tmp_path, capsys):
    output = tmp_path / "vit"
    script("pretrain").main(["--output", str(output), "--steps", "2", "--batch-size", "16", "--classes", "10"])
    assert "step 2: loss" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {path.name for path in DEMO_MODEL_PATH.iterdir()}
    model = load_demo_model(path=output)
    # The saved weights are trained ones, not a fresh initialisation, and the shipped architecture.
    assert model.config.to_diff_dict() == load_demo_model().config.to_diff_dict()
    assert not torch.equal(model.vit.layernorm.weight, torch.ones(96))
    assert "logistic regression: pre-trained" in (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "probe"])
def test_they_run_from_the_checkout(name):
    done = subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {name}.py" in done.stdout, done.stderr
