import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.tuners.common.saved_keys import (
    follow_file,
    follow_renames,
    is_adapter_key,
    module_of,
    rename_modules,
    renamed_keys,
    saved_keys,
)


BASE = "base_model.model."
NEW = [f"vit.layers.{i}.attention.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
OLD = [f"vit.encoder.layer.{i}.attention.attention.{name}" for i in range(2) for name in ("query", "value")]
# the names in this model, and those of the same modules in the other version of transformers
HERE, THERE = (OLD, NEW) if tiny.OLD_NAMES else (NEW, OLD)
QUERY = HERE[0].rpartition(".")[2]


@pytest.mark.parametrize(
    "end",
    [
        "lora_A.weight",
        "lora_B.bias",
        "lora_magnitude_vector",
        "lora_head_mask.mask",
        "lora_packed.codes",
        "rlrr_left",
        "rlrr_head_mask.mask",
        "base_layer.bias",
        "modules_to_save.weight",
        "weight",
    ],
)
def test_module_of(end):
    assert module_of(f"{BASE}{NEW[0]}.{end}") == module_of(f"{NEW[0]}.{end}") == NEW[0]
    assert is_adapter_key(f"{BASE}{NEW[0]}.{end}") == end.startswith(("lora_", "rlrr_"))


@pytest.mark.parametrize("config", [HeadMaskedLoraConfig(ne=0, r=2), RLRRConfig()], ids=["head-masked", "rlrr"])
def test_keys_of_a_file(config, tmp_path):
    get_peft_model(tiny.make("vit"), config).save_pretrained(tmp_path)
    keys = saved_keys(tmp_path)
    modules = dict(tiny.make("vit").named_modules())
    assert keys and all(module_of(key) in modules for key in keys)
    trained = {module_of(key) for key in keys if not is_adapter_key(key)}
    assert trained == {"classifier"} and set(HERE) <= {module_of(key) for key in keys if is_adapter_key(key)}
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"{BASE}lora_settings": torch.ones(3, dtype=torch.bool)}, file)
    assert saved_keys(tmp_path) == keys  # a setting is no weight
    file.unlink()
    assert saved_keys(tmp_path) == []


def test_renamed_keys():
    keys = [f"{BASE}{name}.lora_A.weight" for name in THERE] + [f"{BASE}classifier.weight"]
    present = [name for name, _ in tiny.make("vit").named_modules()]
    expected = [f"{BASE}{name}.lora_A.weight" for name in HERE] + [f"{BASE}classifier.weight"]
    assert renamed_keys(keys, present) == dict(zip(keys, expected, strict=True))
    assert renamed_keys(expected, present) == {key: key for key in expected}


def test_modules_that_the_model_has_not_are_warned_of():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0))
    state_dict = {f"{BASE}{name}.lora_A.weight": torch.ones(1) for name in (THERE[0], "nowhere.at_all")}
    with pytest.warns(UserWarning, match="under no known name, which are ignored: nowhere.at_all"):
        renamed = rename_modules(model, state_dict)
    assert list(renamed) == [f"{BASE}{HERE[0]}.lora_A.weight", f"{BASE}nowhere.at_all.lora_A.weight"]


def test_a_configuration_follows_its_modules():
    ends = [name.rpartition(".")[2] for name in THERE[:2]]
    config = HeadMaskedLoraConfig(
        target_modules=ends,
        exclude_modules=[THERE[2]],
        rank_pattern={ends[0]: 3, THERE[1]: 5},
        num_heads={ends[1]: 6},
    )
    adapted = [THERE[0], THERE[1], THERE[3]]
    renamed = follow_renames(config, adapted, ["classifier"], tiny.make("vit"))
    assert renamed == {THERE[0]: HERE[0], THERE[1]: HERE[1], THERE[3]: HERE[3]}
    assert config.target_modules == {HERE[0], HERE[1], HERE[3]}  # one by one, instead of what is excluded
    assert config.exclude_modules is None
    assert config.rank_pattern == {HERE[0]: 3, HERE[1]: 5}
    assert config.num_heads == {HERE[1]: 6, HERE[3]: 6}


def test_a_configuration_of_the_same_names_is_left_alone():
    config = HeadMaskedLoraConfig(target_modules=[QUERY], modules_to_save=["classifier"], rank_pattern={QUERY: 3})
    before = config.to_dict()
    assert follow_renames(config, HERE[::2], ["classifier"], tiny.make("vit")) == {}
    assert config.to_dict() == before


def test_modules_trained_in_full_follow(tmp_path):
    """A configuration is renamed; a file is refused, because PEFT looks them up before they can be renamed."""
    end = THERE[0].rpartition(".")[2]
    config = HeadMaskedLoraConfig(modules_to_save=["classifier", end])
    follow_renames(config, THERE[1:2], ["classifier", THERE[0]], tiny.make("vit"))
    assert config.modules_to_save == ["classifier", HERE[0]]

    save_file({f"{BASE}{THERE[0]}.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    config = HeadMaskedLoraConfig(modules_to_save=[end])
    config.carried.source = {"path_or_repo": str(tmp_path)}
    with pytest.raises(ValueError, match=f"(?s)whose names transformers has changed.*peft-heads migrate {tmp_path}"):
        follow_file(config, tiny.make("vit"))
