"""The commands, with an RLRR adapter."""

import json

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from peft_heads import RLRRConfig, set_head_masks
from peft_heads.cli.main import main


OLD = [
    ("vit.layers.", "vit.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
]


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.images()).logits


@pytest.fixture
def adapter(tmp_path):
    """Save an adapter with deactivated heads; return its folder and its model."""
    tiny.make("vit").save_pretrained(tmp_path / "base")
    tiny.ViTProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(tmp_path / "base"), RLRRConfig(ne=1))
    for name, param in model.named_parameters():
        if "rlrr_" in name:
            param.data += 0.2 * torch.randn_like(param)
    set_head_masks(model, tiny.masks_off(model, 2))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def rename(folder):
    """Rewrite weights and configuration with the names of transformers before 5.9 (or after, under an old one)."""
    tensors, renamed = load_file(folder / "adapter_model.safetensors"), {}
    for key, value in tensors.items():
        for pair in OLD:
            now, other = reversed(pair) if tiny.OLD_NAMES else pair
            key = key.replace(now, other)
        renamed[key] = value
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = {key.removeprefix("base_model.model.").partition(".rlrr_")[0] for key in renamed if "rlrr_" in key}
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": sorted(modules)}))


def test_other_module_names(adapter):
    folder, model = adapter
    rename(folder)
    loaded = PeftModel.from_pretrained(tiny.make("vit"), folder)
    assert torch.equal(logits(loaded), logits(model))


def test_migrate(adapter, capsys):
    folder, model = adapter
    before = load_file(folder / "adapter_model.safetensors")
    assert main(["migrate", str(folder)]) == 0
    rename(folder)
    assert main(["migrate", str(folder)]) == 0
    assert load_file(folder / "adapter_model.safetensors").keys() == before.keys()
    loaded = PeftModel.from_pretrained(tiny.make("vit"), folder)
    assert torch.equal(logits(loaded), logits(model))


def test_export_merged(adapter, tmp_path):
    """The export is an ordinary checkpoint, for readers that do not know adapters."""
    folder, model = adapter
    assert main(["export", str(folder), "--to", "merged", str(tmp_path / "merged")]) == 0
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()
    assert "rlrr" not in (tmp_path / "merged" / "config.json").read_text()


@pytest.mark.parametrize("to", ["lora", "pruned", "packed"])
def test_export_of_what_it_is_not(adapter, tmp_path, capsys, to):
    assert main(["export", str(adapter[0]), "--to", to, str(tmp_path / "target")]) == 2
    assert "holds an adapter of type RLRR" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_migrate_without_weights(adapter, capsys):
    folder, _ = adapter
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert main(["migrate", str(folder)]) == 2
    assert "has no RLRR weights in adapter_model.safetensors" in capsys.readouterr().err
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "RLRR"
