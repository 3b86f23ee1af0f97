import json
import socket

import tiny
import torch
from transformers.utils import logging

from peft_heads.demo.digits import load_digits_dataset
from peft_heads.demo.model import DEMO_MODEL_PATH, load_demo_model, load_demo_processor


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
