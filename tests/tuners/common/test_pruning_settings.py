"""The settings of an adapter that makes its model smaller, and what they decide."""

import dataclasses
import json

import pytest
import tiny
from peft import PeftConfig, get_peft_model

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, get_head_masks
from peft_heads.methods import MethodSettings, check_method, effective_settings


def config(**settings):
    return HeadMaskedLoraConfig(**settings)


def test_what_is_left_out_follows_from_the_rest():
    found = {
        name: (c.ne, c.mask_scope, c.masks_heads, c.prunes_neurons, c.prunes)
        for name, c in {
            "default": config(),
            "head": config(ne=2, mask_scope="head"),
            "neurons": config(neuron_ratio=0.5),
            "neurons alone": config(neuron_ratio=0.5, ne=0),
            "none off": config(neuron_ratio=0, ne=0, mask_scope="adapter"),
            "ratio": config(neuron_ratio=0.5, ratio=0.25),
            "speed": config(target_speed=2),
        }.items()
    }
    assert found == {
        "default": (1, "adapter", True, False, False),
        "head": (2, "head", True, False, True),
        "neurons": (1, "head", True, True, True),
        "neurons alone": (0, "head", False, True, True),
        "none off": (0, "adapter", False, True, True),
        "ratio": (None, "head", True, True, True),
        "speed": (None, "head", True, True, True),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neuron_ratio": 1.0}, r"neuron_ratio is the share of MLP neurons to switch off, in \[0, 1\); got 1.0"),
        ({"neuron_ratio": "half"}, "neuron_ratio is the share"),
        ({"neuron_ratio": True}, "neuron_ratio is the share"),
        ({"target_speed": 1.0}, "target_speed says how many times fewer operations, a number above 1; got 1.0"),
        ({"target_speed": float("inf")}, "a number above 1; got inf"),
        (
            {"target_speed": 2.0, "ne": 3},
            "target_speed=2.0 chooses the numbers of heads and neurons; got ne=3 as well",
        ),
        ({"target_speed": 2.0, "ratio": 0.5, "neuron_ratio": 0.5}, "got ratio=0.5, neuron_ratio=0.5 as well"),
        (
            {"neuron_ratio": 0.5, "mask_scope": "adapter"},
            "cannot be combined with neuron_ratio=0.5: .*leave mask_scope out",
        ),
        ({"target_speed": 2.0, "mask_scope": "adapter"}, "cannot be combined with target_speed=2.0"),
        ({"mask_scope": "all"}, "mask_scope must be one of adapter, head; got 'all'"),
        ({"neuron_criterion": "absolute"}, "neuron_criterion must be one of gate, gate_signed, .*; got 'absolute'"),
        ({"neuron_ratio": 0.5, "ne": 0, "bias": "all"}, "bias='all' cannot be combined with neuron masks"),
        ({"neuron_ratio": 0.5, "init_lora_weights": "pissa"}, "'pissa' cannot be combined with neuron masks"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("settings", [{}, {"neuron_ratio": 0.5, "ne": 2}, {"target_speed": 1.5}])
def test_saved_and_read(settings, tmp_path):
    saved = config(**settings)
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["mask_scope"] == (
        "head" if settings else "adapter"
    )
    read = PeftConfig.from_pretrained(str(tmp_path))
    fields = ("ne", "ratio", "mask_scope", "neuron_ratio", "neuron_criterion", "target_speed")
    assert [getattr(read, name) for name in fields] == [getattr(saved, name) for name in fields]
    assert dataclasses.replace(read, r=2).mask_scope == saved.mask_scope


def test_settings_of_earlier_versions(tmp_path):
    """They say nothing of neurons, and mean what they meant."""
    config(ne=2, mask_scope="head").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for name in ("neuron_ratio", "neuron_criterion", "target_speed"):
        del settings[name]
    path.write_text(json.dumps(settings))
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert (read.ne, read.mask_scope, read.prunes_neurons) == (2, "head", False)
    assert "neuron_ratio" not in read.selection_settings


def test_settings_of_the_selection():
    assert (
        config(neuron_ratio=0.5).selection_settings.items()
        >= {"neuron_ratio": 0.5, "neuron_criterion": "gate"}.items()
    )
    assert not {"neuron_ratio", "target_speed"} & config().selection_settings.keys()
    assert RLRRConfig(ne=1).masks_heads and not hasattr(RLRRConfig(ne=1), "prunes_neurons")


def test_heads_are_masked_on_q_and_v_alone():
    model = get_peft_model(tiny.make("vit"), config(neuron_ratio=0.5, ne=1))
    ends = {name.rpartition(".")[2] for name in get_head_masks(model)}
    assert ends == set(tiny.now(["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match="no attention heads"):
        model = get_peft_model(tiny.make("vit"), config(ne=1, target_modules="all-linear"))
    assert tiny.now("k_proj") in {name.rpartition(".")[2] for name in get_head_masks(model)}


def test_a_speed_leaves_the_numbers_open():
    model = get_peft_model(tiny.make("vit"), config(target_speed=2.0))
    assert all(mask.all() for mask in get_head_masks(model).values())


def test_options():
    """What is in effect, and what would do nothing."""
    of = MethodSettings
    assert "neuron_criterion" not in effective_settings(of("head-masked-lora", {"ne": 1}))
    found = effective_settings(of("head-masked-lora", {"ne": 0, "neuron_ratio": 0.5}))
    assert found["neuron_criterion"] == "gate" and "head_select_at" in found and "criterion" not in found
    found = effective_settings(of("head-masked-lora", {"target_speed": 2.0}))
    assert (
        found["target_speed"] == 2.0
        and found["mask_scope"] == "head"
        and not {"ne", "ratio", "neuron_ratio"} & found.keys()
    )
    with pytest.raises(ValueError, match="--ne and --target_speed say the same thing"):
        check_method(of("head-masked-lora", {"ne": 1, "target_speed": 2.0}))
    with pytest.raises(ValueError, match="--neuron_criterion does not apply without --neuron_ratio or --target_speed"):
        check_method(of("head-masked-lora", {"neuron_criterion": "random"}))
