import json
import socket

import pytest
import tiny
import torch
from transformers.utils import logging

from peft_heads.demo import pretrain, probe
from peft_heads.demo.digits import load_digits_dataset
from peft_heads.demo.model import DEMO_MODEL_PATH, load_demo_model, load_demo_processor
from peft_heads.demo.strokes import StrokeBatches, make_classes, render


def tensors_equal(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_shipped_files_are_small_and_name_no_local_path():
    files = {path.name: path for path in DEMO_MODEL_PATH.iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert files["model.safetensors"].stat().st_size <= 2_000_000
    for name in ("README.md", "config.json", "preprocessor_config.json"):
        text = files[name].read_text(encoding="utf-8")
        assert not any(part in text for part in ("/home", "/work", "/tmp", "/opt", "_name_or_path")), name


def test_config_has_12_heads_and_no_stroke_classes():
    config = json.loads((DEMO_MODEL_PATH / "config.json").read_text(encoding="utf-8"))
    assert config["num_attention_heads"] == 12
    assert config["hidden_size"] % 12 == 0
    assert "id2label" not in config


def test_model_loads_quietly_without_network(monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("network access")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        model = load_demo_model()
        load_demo_processor()
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(verbosity)
    assert capfd.readouterr() == ("", "")
    assert model.config.id2label == {i: str(i) for i in range(10)}
    assert model.config.label2id == {str(i): i for i in range(10)}
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_num_labels_and_forward_shape():
    model = load_demo_model(num_labels=7)
    with torch.no_grad():
        assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape == (2, 7)


def test_seed_fixes_the_new_weights_and_leaves_the_global_random_state():
    state = torch.random.get_rng_state()
    first, same, other = load_demo_model(seed=3), load_demo_model(seed=3), load_demo_model(seed=4)
    assert tensors_equal(first, same)
    assert tensors_equal(first.vit, other.vit)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    random = load_demo_model(random_weights=True, seed=3)
    assert tensors_equal(random, load_demo_model(random_weights=True, seed=3))
    assert random.config.num_attention_heads == 12 and not random.training
    query = tiny.now("vit.layers.0.attention.q_proj.weight")
    assert not torch.equal(random.get_parameter(query), first.get_parameter(query))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_processor_enlarges_and_normalises():
    images = load_digits_dataset()["test"][:4]["image"]
    pixels = load_demo_processor()(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1.0
    assert 0.5 < pixels.max() <= 1.0


@pytest.mark.slow
def test_pretraining_beats_random_weights_by_10_points():
    result = probe.compare()
    assert len(result["random"]) == 3
    assert result["gap"] == pytest.approx(result["shipped"] - sum(result["random"]) / 3)
    assert result["shipped"] - max(result["random"]) >= 0.10


def test_stroke_batches_are_deterministic():
    first, same, other = (StrokeBatches(num_classes=20, batch_size=8, seed=seed) for seed in (5, 5, 6))
    for _ in range(2):
        pixels, labels = next(first)
        assert pixels.shape == (8, 3, 32, 32)
        assert pixels.min() >= -1 and pixels.max() <= 1
        same_pixels, same_labels = next(same)
        assert pixels.numpy().tobytes() == same_pixels.numpy().tobytes()
        assert torch.equal(labels, same_labels)
        assert pixels.numpy().tobytes() != next(other)[0].numpy().tobytes()


def test_characters_do_not_depend_on_the_number_of_classes():
    few, many = make_classes(5), make_classes(9)
    assert torch.equal(few[0], many[0][:5]) and torch.equal(few[1], many[1][:5])


def test_characters_are_centred_and_bright():
    control, mask = make_classes(50)
    images = render(control, mask, torch.Generator().manual_seed(0))[:, 0]
    ink = images / images.sum(dim=(1, 2), keepdim=True)
    grid = (torch.arange(32) + 0.5) / 16 - 1
    assert abs((ink.sum(dim=1) * grid).sum(dim=1).mean()) < 0.1
    assert abs((ink.sum(dim=2) * grid).sum(dim=1).mean()) < 0.1
    assert (images.amax(dim=(1, 2)) > 0.4).all()
    assert images.mean() < 0.5


@pytest.mark.slow
def test_pretrain_smoke(tmp_path, capsys):
    output = tmp_path / "vit"
    pretrain.main(["--output", str(output), "--steps", "2", "--batch-size", "16", "--classes", "10"])
    assert "step 2: loss" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {path.name for path in DEMO_MODEL_PATH.iterdir()}
    model = load_demo_model(path=output)
    # The saved weights are trained ones, not a fresh initialisation, and the shipped architecture.
    assert model.config.to_diff_dict() == load_demo_model().config.to_diff_dict()
    assert not torch.equal(model.vit.layernorm.weight, torch.ones(96))
    assert "logistic regression: pre-trained" in (output / "README.md").read_text(encoding="utf-8")
