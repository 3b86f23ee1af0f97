import copy
import pickle

import pytest
import tiny
import torch
from peft import KasaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_heads import HeadMaskedLoraConfig


def test_defaults():
    config = HeadMaskedLoraConfig()
    assert (config.ne, config.ratio, config.granularity, config.joint) == (1, None, "global", True)
    assert (config.criterion, config.mask_scope, config.mask_seed, config.num_heads) == (
        "absolute",
        "adapter",
        0,
        None,
    )
    assert config.peft_type == "HEAD_MASKED_LORA"
    assert HeadMaskedLoraConfig(ratio=0.25).ne is None


def test_round_trip(tmp_path):
    config = HeadMaskedLoraConfig(
        ratio=0.25, granularity="layer", joint=False, criterion="negative", mask_scope="head", mask_seed=4,
        num_heads=tiny.now({"q_proj": 3}), r=4, lora_alpha=0.4, target_modules=tiny.now(["q_proj"]),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is HeadMaskedLoraConfig
    assert loaded == config
    assert HeadMaskedLoraConfig.from_pretrained(tmp_path) == config


def test_copies_and_pickles():
    config = HeadMaskedLoraConfig(ne=2)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(config)).peft_type is config.peft_type


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ne": -1}, "at least 0; got -1"),
        ({"ne": 1, "ratio": 0.5}, "not both; got ne=1 and ratio=0.5"),
        ({"ratio": 1}, r"in \[0, 1\); got 1"),
        ({"ratio": "0.5"}, r"in \[0, 1\); got '0.5'"),
        ({"ratio": float("nan")}, r"in \[0, 1\); got nan"),
        ({"criterion": "taylor"}, "criterion must be one of absolute, positive.*got 'taylor'"),
        ({"mask_scope": "q"}, "mask_scope must be one of adapter, head; got 'q'"),
        ({"granularity": "stage"}, "granularity must be one of global, layer; got 'stage'"),
        ({"num_heads": 0}, "positive integer.*got 0"),
        ({"adapter_bits": 3}, "adapter_bits must be one of 1, 2, 4, 8, 32; got 3"),
        ({"adapter_bits": True}, "adapter_bits must be one of 1, 2, 4, 8, 32; got True"),
        ({"classifier_bits": "1"}, "classifier_bits must be one of 1, 2, 4, 8, 32; got '1'"),
        ({"bottleneck_dropout": 1.0}, r"bottleneck_dropout must be in \[0, 1\); got 1.0"),
        (
            {"adapter_bits": 1, "use_dora": True},
            "use_dora cannot be combined with adapter_bits=1: it applies lora_A and lora_B by code of its own",
        ),
        ({"ne": 0, "bottleneck_dropout": 0.1, "use_dora": True}, "use_dora cannot .* bottleneck_dropout=0.1"),
        (
            {"ne": 0, "adapter_bits": 1, "init_lora_weights": "orthogonal"},
            "init_lora_weights='orthogonal' cannot be combined with adapter_bits=1: .* use True, 'gaussian' or False",
        ),
        ({"num_heads": {"q": 1.5}}, "positive integer"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' cannot be combined with head masks: it moves part",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "mica"}, "freezes lora_B"),
        ({"layer_replication": [(0, 2)]}, "the copies of a layer would carry no masks"),
        ({"kasa_config": KasaConfig()}, "kasa_config cannot be combined"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadMaskedLoraConfig(**arguments)


def test_plain_lora_takes_every_initialisation():
    HeadMaskedLoraConfig(ne=0, init_lora_weights="pissa")
    HeadMaskedLoraConfig(ratio=0.0, init_lora_weights="olora")


def test_init_weights_is_an_alias():
    config = HeadMaskedLoraConfig(init_lora_weights="gaussian")
    assert config.init_weights == "gaussian"
    config.init_weights = True
    assert config.init_lora_weights is True


def test_from_lora_without_a_classifier(tmp_path):
    stock = get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"])))
    tiny.randomize_lora(stock)
    stock.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny.make("vit"), tmp_path, config=HeadMaskedLoraConfig.from_lora(tmp_path))
    assert torch.equal(ours(tiny.images()).logits, stock.eval()(tiny.images()).logits)


def test_saving_a_configuration_alone_writes_nothing_else(tmp_path):
    HeadMaskedLoraConfig().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_from_lora(backbone, tmp_path):
    stock = get_peft_model(
        tiny.make(backbone),
        LoraConfig(r=4, target_modules=tiny.now(["q_proj", "v_proj"]), modules_to_save=["classifier"]),
    )
    tiny.randomize_lora(stock)
    stock.save_pretrained(tmp_path)
    config = HeadMaskedLoraConfig.from_lora(tmp_path)
    assert (config.ne, config.r, config.target_modules) == (0, 4, tiny.now({"q_proj", "v_proj"}))
    ours = PeftModel.from_pretrained(tiny.make(backbone), tmp_path, config=config)
    assert torch.equal(ours(tiny.images()).logits, stock.eval()(tiny.images()).logits)

    ours.peft_config["default"].save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="type HEAD_MASKED_LORA, not a LORA adapter"):
        HeadMaskedLoraConfig.from_lora(tmp_path / "ours")


def test_a_file_that_does_not_say_its_type(tmp_path):
    """PEFT accepts such a file if the class is known."""
    (tmp_path / "adapter_config.json").write_text('{"ne": 2}')
    assert HeadMaskedLoraConfig.from_pretrained(tmp_path).ne == 2
