"""Adapters made by older and newer versions of transformers (tests/fixtures), loaded by the installed one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from peft_heads import HeadMaskedLoraConfig, get_head_masks, load_image_classifier
from peft_heads.adapter_folder.atomic import write_atomically
from peft_heads.cli.main import main
from peft_heads.convert import migrate as migration
from peft_heads.convert.migrate import migrate_adapter


pytestmark = pytest.mark.filterwarnings("ignore:these targets have no attention heads")  # of "all-linear"

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTERS = sorted(str(path.parent.relative_to(FIXTURES / "adapters")) for path in FIXTURES.rglob("expected.json"))
OLD_NAMES = Version(transformers.__version__) < Version("5.9")
# These train a norm in full, whose path 5.9 has changed: PEFT looks it up before we can rename it.
MOVED = [n for n in ADAPTERS if n.endswith("-saved_norms") and n.startswith("5.23" if OLD_NAMES else "4.57")]
OURS = [name for name in ADAPTERS if "/ours" in name and name not in MOVED]
STOCK = [name for name in ADAPTERS if "/stock" in name and name not in MOVED]
OLD = "4.57.6/vit/stock"
needs_new_names = pytest.mark.skipif(OLD_NAMES, reason="is about names of 4.57 under transformers 5.9 and later")


def base(name):
    return AutoModelForImageClassification.from_pretrained(FIXTURES / "base" / name.split("/")[1])


def expected(name):
    return torch.tensor(json.loads((FIXTURES / "adapters" / name / "expected.json").read_text())["logits"])


def logits(model):
    with torch.no_grad():
        return model.eval()(load_file(FIXTURES / "base" / "images.safetensors")["pixel_values"]).logits


@pytest.fixture
def copy_of(tmp_path):
    def copy(name):
        folder = shutil.copytree(FIXTURES / "adapters" / name, tmp_path / "adapter")
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = str(FIXTURES / "base" / name.split("/")[1])
        path.write_text(json.dumps(config))
        return folder

    return copy


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fixtures_are_there():
    versions = {name.split("/")[0].rpartition(".")[0] for name in ADAPTERS}
    assert versions == {"4.57", "5.8", "5.9", "5.17", "5.23"}
    assert {name.split("/")[1] for name in ADAPTERS} == {"vit", "deit", "beit", "swin", "dinov2"}
    assert len(OURS) == len(STOCK) >= 25 and len(MOVED) == 2


@pytest.mark.parametrize("name", MOVED)
def test_modules_trained_in_full_need_migration(name):
    folder = FIXTURES / "adapters" / name
    config = HeadMaskedLoraConfig.from_lora(folder) if "/stock" in name else None
    message = r"vit.*\*.layernorm_after \(now vit.*layernorm_after\); rewrite .*`peft-heads migrate"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base(name), folder, config=config)


@pytest.mark.parametrize("name", OURS)
def test_ours_load_under_any_name(name, tmp_path):
    folder = FIXTURES / "adapters" / name
    model = PeftModel.from_pretrained(base(name), folder)
    assert torch.allclose(logits(model), expected(name), atol=1e-5)
    assert {tuple(mask.tolist()).index(False) for mask in get_head_masks(model).values()} == {1}
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    assert torch.allclose(logits(model), expected(name), atol=1e-5)
    # saved again, it has the names of this version and needs nothing more
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(base(name), tmp_path)
    again.peft_config["default"].carried.source = None
    assert torch.equal(logits(again), logits(model))
    assert migrate_names(tmp_path, name) == {}


def migrate_names(folder, name):
    return migrate_adapter(folder, base_model=FIXTURES / "base" / name.split("/")[1])


@pytest.mark.parametrize("name", OURS)
def test_ours_resume_under_any_name(name):
    """Weights are loaded into an existing adapter, as Trainer does on resuming."""
    model = PeftModel.from_pretrained(base(name), FIXTURES / "adapters" / name, is_trainable=True)
    for param in model.parameters():
        if param.requires_grad:
            param.data.zero_()
    model.load_adapter(FIXTURES / "adapters" / name, "default", is_trainable=True)
    assert torch.allclose(logits(model), expected(name), atol=1e-5)


@pytest.mark.parametrize("name", STOCK)
def test_stock_adapters_join_under_any_name(name):
    folder = FIXTURES / "adapters" / name
    model = PeftModel.from_pretrained(base(name), folder, config=HeadMaskedLoraConfig.from_lora(folder))
    assert torch.allclose(logits(model), expected(name), atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_migrate(name, copy_of):
    folder = copy_of(name)
    before = contents(folder)
    names = migrate_adapter(folder)
    assert bool(names) == (contents(folder) != before)
    model = PeftModel.from_pretrained(base(name), folder)  # stock LoRA: by PEFT alone
    assert torch.allclose(logits(model), expected(name), atol=1e-5)
    after = contents(folder)
    assert migrate_adapter(folder) == {} and contents(folder) == after
    assert set(after) == set(before)


@pytest.mark.parametrize("name", ADAPTERS)
def test_interrupted_migration(name, copy_of, monkeypatch):
    """A migration that was killed between its two files does the rest when it is run again."""
    folder = copy_of(name)
    before = contents(folder)
    migrate_adapter(folder)
    after = contents(folder)
    for file, content in before.items():
        (folder / file).write_bytes(content)

    def write_and_die(path, content):
        write_atomically(path, content)
        raise KeyboardInterrupt

    if before != after:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(migration, "write_atomically", write_and_die)
            migrate_adapter(folder)
        assert contents(folder) != before and contents(folder) != after
        if "/stock" in name:  # meanwhile no reader gets a mixture
            with pytest.raises(Exception, match="adapter_model|No modules were targeted|Can't find weights|Repo id"):
                PeftModel.from_pretrained(base(name), folder)
    migrate_adapter(folder)
    assert contents(folder) == after


@needs_new_names
def test_what_migration_is_for():
    """Stock PEFT fails on these files. Delete the migration once this control test fails."""
    with pytest.raises(ValueError, match="No modules were targeted"):
        PeftModel.from_pretrained(base(OLD), FIXTURES / "adapters" / OLD)


@needs_new_names
def test_command(copy_of, capsys):
    folder = copy_of(OLD)
    assert main(["migrate", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "4 modules renamed for transformers" in out
    assert "  vit.encoder.layer.*.attention.attention.query -> vit.layers.*.attention.q_proj\n" in out
    assert main(["migrate", str(folder)]) == 0
    assert "nothing was changed" in capsys.readouterr().out


def damage(folder, kind):
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings = json.loads(config.read_text())
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:200])
    elif kind == "no weights":
        weights.rename(folder / "adapter_model.bin")
    elif kind == "truncated configuration":
        config.write_text(config.read_text()[:50])
    elif kind == "no configuration":
        config.unlink()
    elif kind == "another type":
        config.write_text(json.dumps({**settings, "peft_type": "VERA"}))
    elif kind == "no base model":
        config.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    elif kind == "missing base model":
        config.write_text(json.dumps({**settings, "base_model_name_or_path": str(folder / "nowhere")}))
    else:
        tensors = load_file(weights)
        key = next(key for key in tensors if "layer.1" in key)
        new = "layer.7" if kind == "too many layers" else "block.1"
        tensors[key.replace("layer.1", new).replace("query", "qq" if new == "block.1" else "query")] = tensors.pop(key)
        if kind == "unknown head":
            tensors["base_model.model.scorer.weight"] = torch.zeros(2)
        save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated weights", "adapter_model.safetensors is damaged"),
        ("no weights", "no LoRA weights in adapter_model.safetensors; other formats are not read"),
        ("truncated configuration", "adapter_config.json is damaged"),
        ("no configuration", "there is no adapter in"),
        ("another type", "an adapter of type VERA"),
        ("no base model", "--base_model"),
        ("missing base model", "the base model's configuration cannot be read from"),
        ("too many layers", "vit.encoder.layer.7.* belongs to no module of ViTForImageClassification"),
        ("unknown module", "vit.encoder.block.1.* belongs to no module"),
        ("unknown head", "belongs to no module"),
    ],
)
def test_what_is_not_understood_stays_as_it_is(copy_of, capsys, kind, message):
    folder = copy_of(OLD)
    damage(folder, kind)
    before = contents(folder)
    assert main(["migrate", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("peft-heads migrate: error: ") and error.count("\n") == 1
    assert re.search(message, error) and str(folder) in error
    assert contents(folder) == before


def test_a_new_adapter_of_the_same_configuration(copy_of):
    """A configuration read from a file of an older version serves for a new adapter as well."""
    config = HeadMaskedLoraConfig.from_pretrained(FIXTURES / "adapters" / "4.57.6/vit/ours")
    with pytest.warns(UserWarning, match="base_model_name_or_path` was renamed"):
        model = get_peft_model(base(OLD), config)
    assert len(get_head_masks(model)) == 4


@needs_new_names
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_of_the_base_model(tmp_path, bias):
    """Their keys name the modules in another way; the test writes them with the names of 4.57."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias=bias, init_lora_weights=False)
    model = get_peft_model(base(OLD), lora)
    for name, param in model.named_parameters():
        if param.requires_grad and name.endswith("bias"):
            param.data += 0.3
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert migrate_names(tmp_path, OLD) == {}
    weights = tmp_path / "adapter_model.safetensors"
    old = {}
    for key, tensor in load_file(weights).items():
        for new_name, old_name in (("vit.layers", "vit.encoder.layer"), ("attention.q_proj", "attention.attention.query"),
                                   ("attention.k_proj", "attention.attention.key"), ("mlp.fc1", "intermediate.dense"),
                                   ("attention.v_proj", "attention.attention.value"), ("mlp.fc2", "output.dense"),
                                   ("attention.o_proj", "attention.output.dense")):  # fmt: skip
            key = key.replace(new_name, old_name)
        old[key] = tensor
    save_file(old, weights, metadata={"format": "pt"})
    joined = PeftModel.from_pretrained(base(OLD), tmp_path, config=HeadMaskedLoraConfig.from_lora(tmp_path))
    assert torch.allclose(logits(joined), wanted, atol=1e-5)
    assert migrate_names(tmp_path, OLD)
    assert torch.allclose(logits(PeftModel.from_pretrained(base(OLD), tmp_path)), wanted, atol=1e-5)


def test_weights_without_a_module_are_not_dropped_in_silence(tmp_path):
    folder = shutil.copytree(FIXTURES / "adapters" / OLD, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    extra = {key.replace("layer.1", "layer.5"): value.clone() for key, value in tensors.items() if "layer.1" in key}
    save_file({**tensors, **extra}, weights, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"under no known name, which are ignored: vit.encoder.layer.\*.attention"):
        PeftModel.from_pretrained(base(OLD), folder, config=HeadMaskedLoraConfig.from_lora(folder))


@pytest.mark.parametrize("name", ["4.57.6/vit/ours", "5.23.0/vit/ours", "4.57.6/swin/ours", "4.57.6/dinov2/ours"])
def test_every_way_of_loading_follows_the_names(name, copy_of):
    folder = copy_of(name)
    tiny.ViTProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    before = contents(folder)
    model, _ = load_image_classifier(folder)
    assert torch.allclose(logits(model), expected(name), atol=1e-5)
    model = PeftModel.from_pretrained(base(name), folder, config=PeftConfig.from_pretrained(folder))
    assert torch.allclose(logits(model), expected(name), atol=1e-5)
    assert contents(folder) == before
