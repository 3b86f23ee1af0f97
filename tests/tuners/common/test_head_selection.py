import dataclasses
import json

import pytest
from peft import LoraConfig

from peft_heads import HeadMaskedLoraConfig, RLRRConfig
from peft_heads.tuners.common.folder_config import AdapterFolderConfig
from peft_heads.tuners.common.head_selection import HEAD_SELECTION, HeadSelectionConfig


CONFIGS = [HeadMaskedLoraConfig, RLRRConfig]


def names_of(config_class, **of_parameters):
    return [
        f.name
        for f in dataclasses.fields(config_class)
        if all(getattr(f, key) == value for key, value in of_parameters.items())
    ]


def test_the_seven_settings():
    assert HEAD_SELECTION == ("ne", "ratio", "granularity", "joint", "criterion", "mask_seed", "num_heads")
    assert all(f.metadata["help"].endswith(".") for f in dataclasses.fields(HeadSelectionConfig))


@pytest.mark.parametrize("config_class", CONFIGS)
def test_they_are_fields_of_the_method_and_saved(config_class, tmp_path):
    assert issubclass(config_class, HeadSelectionConfig) and issubclass(config_class, AdapterFolderConfig)
    config_class(ratio=0.5, criterion="random", mask_seed=3, num_heads={"qkv": 4}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(saved) == sorted(saved)  # so that callers cannot depend on the order of the fields
    settings = {name: saved[name] for name in HEAD_SELECTION}
    assert settings == {
        "ne": None,
        "ratio": 0.5,
        "granularity": "global",
        "joint": True,
        "criterion": "random",
        "mask_seed": 3,
        "num_heads": {"qkv": 4},
    }
    again = config_class.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in HEAD_SELECTION} == settings


def test_no_field_of_a_method_or_of_peft_moves():
    """Arguments that could be passed by position before our fields existed still can."""
    positional = names_of(HeadMaskedLoraConfig, kw_only=False, init=True)
    assert positional == names_of(LoraConfig, init=True)
    positional = names_of(RLRRConfig, kw_only=False, init=True)
    assert positional[-14:-9] == ["r", "left", "right", "residual", "rescale_weight"]
    assert not set(positional) & set(HEAD_SELECTION)


@pytest.mark.parametrize(("config_class", "ne"), [(HeadMaskedLoraConfig, 1), (RLRRConfig, 0)])
def test_the_default_is_the_methods(config_class, ne):
    assert config_class().ne == ne and config_class().masks_heads == bool(ne)
    assert config_class(ratio=0.25).ne is None and config_class(ratio=0.25).masks_heads
    assert not config_class(ratio=0).masks_heads


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ne": -1}, "ne is the number of heads to deactivate, an integer of at least 0; got -1"),
        ({"ne": 1, "ratio": 0.1}, "give ne or ratio, not both"),
        ({"granularity": "model"}, "granularity must be one of global, layer; got 'model'"),
        ({"criterion": "fisher"}, "criterion must be one of .*; got 'fisher'"),
        ({"num_heads": 0}, "num_heads must be a positive integer"),
    ],
)
def test_checks(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**settings)


def test_what_a_report_of_scores_notes():
    settings = HeadMaskedLoraConfig(ne=2, mask_scope="head", num_heads=6).selection_settings
    assert settings == {
        "ne": 2,
        "ratio": None,
        "granularity": "global",
        "joint": True,
        "criterion": "absolute",
        "mask_seed": 0,
        "mask_scope": "head",
    }
    assert RLRRConfig().selection_settings["mask_scope"] == "adapter"
