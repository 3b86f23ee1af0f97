import warnings

import pytest
import tiny
import torch
from PIL import Image

from peft_heads import load_image_classifier
from peft_heads.cli import main as cli
from peft_heads.demo.run import Result, check_reloaded, demo_configs, format_table


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run `peft-heads demo --epochs 2`; return its output, its exit code and its folder."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        code = cli.main(["demo", "--epochs", "2", "--output_dir", str(folder)])
    return printed.getvalue(), code, folder


@pytest.mark.slow
def test_printed(demo):
    text, code, folder = demo
    assert code == 0
    rows = [line for line in text.splitlines() if line.startswith(("LoRA ", "head-masked LoRA, "))]
    assert [row.split("  ")[0] for row in rows] == [
        "LoRA", "head-masked LoRA, Taylor", "head-masked LoRA, random", "head-masked LoRA, front",
    ]  # fmt: skip
    assert all(0.5 < float(row.split()[-4]) < 1 for row in rows)  # accuracy: two epochs beat guessing by far
    assert "front: heads 0, 1, 2 of 12 in all 10 projections" in text
    assert "logits identical (largest difference 0 over 797 test images)" in text
    assert str(folder / "taylor" / "head_scores.png") in text and str(folder / "taylor" / "adapter") in text


@pytest.mark.slow
def test_what_it_leaves(demo):
    _, _, folder = demo
    assert (folder / "taylor" / "head_scores.png").read_bytes().startswith(b"\x89PNG")
    model, processor = load_image_classifier(folder / "taylor" / "adapter")
    assert model.config.id2label[7] == "7"
    with torch.inference_mode():
        logits = model(**processor(Image.new("RGB", (8, 8)), return_tensors="pt")).logits
    assert logits.shape == (1, 10)
    assert not list(folder.glob("**/*.bin"))  # safetensors only


@pytest.mark.slow
def test_a_reloaded_adapter_that_differs_is_reported(demo, capsys):
    _, _, folder = demo
    data = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}]
    result = Result("x", 1.0, 1, 1, 1.0, "-", folder / "taylor", torch.zeros(1, 10))
    assert not check_reloaded(result, data)
    assert "DIFFERENT" in capsys.readouterr().out


def test_methods_adapt_the_same_modules():
    configs = {name: config for name, (_, config) in demo_configs(3).items()}
    assert set(configs["lora"].target_modules) == tiny.now({"q_proj", "v_proj"})
    assert [configs[name].criterion for name in ("taylor", "random", "front")] == ["absolute", "random", "front"]
    assert {config.r for config in configs.values()} == {8}


def test_wrong_ne(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--ne", "12", "--output_dir", str(tmp_path)])
    assert exit_.value.code == 2
    assert "--ne: invalid choice: 12" in capsys.readouterr().err


def test_table():
    result = Result("LoRA", 0.5, 1234567, 10, 3.14159, "-", None, None)
    assert format_table([result]).splitlines()[-1].split() == ["LoRA", "0.5000", "1,234,567", "10", "3.1"]
