"""Folders whose files contradict each other, or the model: refused before anything is changed."""

import json
import time

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.config import VeloraConfig
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, get_head_masks, load_image_classifier, set_head_masks
from peft_heads.convert.inspect import inspect_adapter


HEAD = "base_model.model.classifier."


def save(folder, config):
    model = get_peft_model(tiny.make("vit"), config)
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if any(part in name for part in ("lora_", "rlrr_", "modules_to_save")) and "magnitude" not in name:
            param.data.normal_(std=0.3, generator=generator)
    if config.masks_heads:
        set_head_masks(model, {name: torch.arange(6) != 2 for name in get_head_masks(model)})
    model.save_pretrained(folder)
    return model.eval()


def edit(folder, tensors=None, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if tensors is not None:
        weights = load_file(folder / "adapter_model.safetensors")
        tensors(weights)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def state(model):
    """Return everything that loading could change."""
    tensors = {name: (param.data.clone(), param.requires_grad) for name, param in model.named_parameters()}
    return [type(m) for m in model.modules()], tensors, dict(model.config.id2label)


def assert_same_state(model, before):
    kinds, tensors, labels = state(model)
    assert kinds == before[0] and labels == before[2] and tensors.keys() == before[1].keys()
    assert all(torch.equal(t, before[1][n][0]) and g == before[1][n][1] for n, (t, g) in tensors.items())


CONTRADICTIONS = {
    "right": (RLRRConfig(), {"right": False}, None, "rlrr_right"),
    "left": (RLRRConfig(), {"left": False}, None, "rlrr_left"),
    "rescale_weight": (RLRRConfig(), {"rescale_weight": False}, None, "saved with rescale_weight"),
    "residual": (RLRRConfig(), {"residual": False}, None, "saved with residual"),
    "norms": (RLRRConfig(target_modules=tiny.now(["q_proj"])), {"target_modules": None}, None, "it has no "),
    "dora off": (HeadMaskedLoraConfig(use_dora=True), {"use_dora": False}, None, "lora_magnitude_vector"),
    "dora on": (HeadMaskedLoraConfig(), {"use_dora": True}, None, "it has no .*lora_magnitude_vector"),
    "bias of B off": (HeadMaskedLoraConfig(lora_bias=True), {"lora_bias": False}, None, "lora_B.bias"),
    "bias of B on": (HeadMaskedLoraConfig(), {"lora_bias": True}, None, "it has no .*lora_B.bias"),
    "rank": (
        HeadMaskedLoraConfig(),
        {"r": 4},
        None,
        r"has the shape \(8, 24\), but with these settings it has \(4, 24\)",
    ),
    "scope": (HeadMaskedLoraConfig(), {"mask_scope": "head"}, None, "saved without mask_scope=head"),
    "bits": (HeadMaskedLoraConfig(), {"adapter_bits": 2}, None, "saved without adapter_bits=2"),
    "frozen weight": (
        HeadMaskedLoraConfig(),
        {},
        lambda weights: weights.update({"base_model.model.vit.layernorm.weight": torch.zeros(24)}),
        "weights of the frozen base model .vit.layernorm.weight",
    ),
    "frozen weight of a target": (
        HeadMaskedLoraConfig(),
        {},
        lambda weights: weights.update(
            {tiny.now("base_model.model.vit.layers.0.attention.q_proj.base_layer.weight"): torch.zeros(24, 24)}
        ),
        "weights of the frozen base model",
    ),
    "integers": (
        HeadMaskedLoraConfig(),
        {},
        lambda weights: weights.update({HEAD + "weight": weights[HEAD + "weight"].int()}),
        "classifier.weight is a tensor of torch.int32",
    ),
    "no classifier": (HeadMaskedLoraConfig(), {}, lambda w: w.pop(HEAD + "bias"), "it has no classifier.bias"),
    "a classifier's bias": (
        HeadMaskedLoraConfig(),
        {},
        lambda weights: weights.update({HEAD + "bias": torch.zeros(5)}),
        r"classifier.bias has the shape \(5,\), but with these settings it has \(3,\)",
    ),
    "a module that is not there": (
        RLRRConfig(),
        {},
        lambda weights: weights.update({"base_model.model.vit.extra.rlrr_left": torch.zeros(24, 1)}),
        r"it has vit.extra.rlrr_left, for which .* no place in the model",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_nothing_is_changed(tmp_path, kind):
    config, settings, tensors, message = CONTRADICTIONS[kind]
    save(tmp_path / "right", config)
    save(tmp_path / "wrong", config)
    edit(tmp_path / "wrong", tensors, **settings)
    base = tiny.make("vit")
    before = state(base)
    with pytest.raises(ValueError, match=message) as caught:
        PeftModel.from_pretrained(base, tmp_path / "wrong")
    assert str(tmp_path / "wrong") in str(caught.value) and "\n" not in str(caught.value)
    assert_same_state(base, before)

    model = PeftModel.from_pretrained(base, tmp_path / "right")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "wrong", "other")
    if tensors is not None:  # into an existing adapter with the right settings
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path / "wrong", "default")
    assert list(model.peft_config) == ["default"]
    assert_same_state(model, before)


def test_a_huge_rank_takes_neither_memory_nor_time(tmp_path):
    save(tmp_path, HeadMaskedLoraConfig(r=2))
    edit(tmp_path, r=2_000_000)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"has the shape \(2, 24\), but with these settings it has \(2000000, 24\)"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("make_config", [HeadMaskedLoraConfig, RLRRConfig])
def test_an_adapter_saved_where_no_classifier_was_found(tmp_path, make_config):
    """It loads onto a model whose classifier is found, and does not change that classifier."""
    model = save(tmp_path, make_config(ne=1, modules_to_save=[]))
    edit(tmp_path, modules_to_save=None)
    x = tiny.images()
    wanted = model(x).logits
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    assert torch.equal(loaded(x).logits, wanted) and not loaded.peft_config["default"].modules_to_save
    for name in ("other", "default"):
        loaded.load_adapter(tmp_path, name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(x).logits, wanted)
    if make_config is HeadMaskedLoraConfig:
        hotswap_adapter(loaded, tmp_path, "default")
        assert torch.equal(loaded(x).logits, wanted)
    tiny.make("vit").save_pretrained(tmp_path / "base")
    inspect_adapter(tmp_path, base_model=tmp_path / "base")
    # of settings without weights a new adapter is made, which trains the classifier
    make_config(ne=1).save_pretrained(tmp_path / "settings")
    config = make_config.from_pretrained(tmp_path / "settings")
    get_peft_model(tiny.make("vit"), config)
    assert list(config.modules_to_save) == ["classifier"]


def test_a_part_of_the_weights_as_a_dict_is_peft_s(tmp_path):
    model = save(tmp_path, HeadMaskedLoraConfig())
    part = {
        key: value for key, value in get_peft_model_state_dict(model).items() if "layers.0" in key or "layer.0" in key
    }
    part |= {key: value for key, value in get_peft_model_state_dict(model).items() if "classifier" in key}
    other = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig())
    result = set_peft_model_state_dict(other, part)
    assert any("lora_A" in key for key in result.missing_keys)
    frozen = {"base_model.model.vit.layernorm.weight": torch.full((24,), 7.0)}
    set_peft_model_state_dict(other, part | frozen)
    assert other.get_base_model().vit.layernorm.weight[0] == 7


@pytest.mark.parametrize("make_config", [HeadMaskedLoraConfig, RLRRConfig])
def test_a_bad_folder_with_a_configuration_of_the_user_s(tmp_path, make_config):
    model = save(tmp_path / "good", make_config(ne=1))
    base = tiny.make("vit")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "good"), config=make_config(ne=1))
    assert torch.equal(loaded(tiny.images()).logits, model(tiny.images()).logits)
    save(tmp_path / "bad", make_config(ne=1))
    edit(
        tmp_path / "bad",
        lambda weights: weights.pop(next(key for key in weights if ".lora_A" in key or ".rlrr_left" in key)),
    )
    base = tiny.make("vit")
    before, config = state(base), make_config(ne=1)
    with pytest.raises(ValueError, match="it has no ") as caught:
        PeftModel.from_pretrained(base, tmp_path / "bad", config=config)
    assert str(tmp_path / "bad") in str(caught.value)
    assert_same_state(base, before)
    assert config.target_modules is None and config.modules_to_save is None


def test_a_configuration_from_a_folder_may_be_changed_for_a_new_adapter(tmp_path):
    save(tmp_path, HeadMaskedLoraConfig())
    config = HeadMaskedLoraConfig.from_pretrained(tmp_path)
    config.r = 3
    assert get_peft_model(tiny.make("vit"), config).peft_config["default"].r == 3
    with pytest.raises(ValueError, match=r"it has \(3, 24\)"):  # its weights are another's
        config = HeadMaskedLoraConfig.from_pretrained(tmp_path)
        config.r = 3
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path, config=config)


def test_what_the_user_says_of_loading_is_heard(tmp_path):
    model = save(tmp_path, HeadMaskedLoraConfig())
    x = tiny.images()
    wanted = model(x).logits
    edit(tmp_path, lambda weights: weights.update({k.replace("vit.", "tiv."): weights.pop(k) for k in list(weights)}))
    with pytest.raises(ValueError, match="is it an adapter of another model"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path, key_mapping={r"^tiv\.": "vit."})
    assert torch.equal(loaded(x).logits, wanted)
    loaded.load_adapter(tmp_path, "other", key_mapping={r"^tiv\.": "vit."})
    wider = tiny.make("vit", num_labels=5)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(
            wider, tmp_path, ignore_mismatched_sizes=True, key_mapping={r"^tiv\.": "vit."}
        )
    assert loaded(x).logits.shape == (4, 5)


def test_hotswapping_a_folder(tmp_path):
    options = {"modules_to_save": []}
    model = save(tmp_path / "one", HeadMaskedLoraConfig(**options))
    wanted = model(tiny.images()).logits
    save(tmp_path / "two", HeadMaskedLoraConfig(**options))
    for param in model.parameters():
        if param.requires_grad:
            param.data.mul_(2)
    hotswap_adapter(model, tmp_path / "two", "default")
    assert torch.equal(model(tiny.images()).logits, wanted)
    before = state(model)
    edit(tmp_path / "two", lambda weights: weights.pop(next(key for key in weights if "lora_A" in key)))
    with pytest.raises(ValueError, match="it has no .*lora_A.weight"):
        hotswap_adapter(model, tmp_path / "two", "default")
    assert_same_state(model, before)


def test_transformers_own_loading(tmp_path):
    model = save(tmp_path, RLRRConfig())
    base = tiny.make("vit")
    base.load_adapter(tmp_path)
    assert torch.equal(base.eval()(tiny.images()).logits, model(tiny.images()).logits)
    edit(tmp_path, right=False)
    base = tiny.make("vit")
    before = state(base)
    with pytest.raises(ValueError, match="rlrr_right"):
        base.load_adapter(tmp_path)
    assert_same_state(base, before)


def test_no_weights(tmp_path):
    save(tmp_path, RLRRConfig())
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights of an adapter"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)


@pytest.mark.parametrize("option", ["r", "ne", "use_rslora", "lora_dropout", "rank_pattern", "joint", "num_heads"])
def test_settings_of_the_wrong_type(tmp_path, option):
    save(tmp_path, HeadMaskedLoraConfig())
    edit(tmp_path, **{option: "eight"})
    with pytest.raises(ValueError, match=f"adapter_config.json: {option} is 'eight' of type str"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)


@pytest.mark.parametrize("config", [HeadMaskedLoraConfig, RLRRConfig])
def test_long_patterns(config):
    with pytest.raises(ValueError, match=r"target_modules has a pattern of 1,001 characters"):
        config(target_modules="a" * 1001)
    with pytest.raises(ValueError, match=r"num_heads has a pattern of 1,001 characters"):
        config(num_heads={"a" * 1001: 2})
    config(target_modules="a" * 1000)


def test_k_bit_adapters_of_every_width_are_the_first_thing_loaded(tmp_path, monkeypatch):
    """The trial on a skeleton leaves nothing behind that the adapter itself would use."""
    wanted = {}
    for bits in (1, 2, 4, 8):
        model = save(tmp_path / str(bits), HeadMaskedLoraConfig(ne=0, adapter_bits=bits, classifier_bits=bits))
        wanted[bits] = model(tiny.images()).logits
    monkeypatch.setattr("peft_heads.functional.quantization._CODE_BOOKS", {})
    for bits, logits in wanted.items():
        loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / str(bits))
        assert torch.equal(loaded(tiny.images()).logits, logits)


@pytest.mark.parametrize(
    "config",
    [
        HeadMaskedLoraConfig(ne=1, adapter_bits=2, classifier_bits=1),
        HeadMaskedLoraConfig(ne=0, adapter_bits=1),
        HeadMaskedLoraConfig(ne=0, classifier_bits=8),
    ],
)
def test_k_bit_files_from_before_bits_were_noted_are_believed(tmp_path, config):
    model = save(tmp_path, config)
    wanted = model(tiny.images()).logits
    edit(tmp_path, lambda weights: weights.pop(next(key for key in weights if "settings" in key)))
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    assert torch.equal(loaded(tiny.images()).logits, wanted)
    loaded.load_adapter(tmp_path, "other")
    loaded.load_adapter(tmp_path, "default")
    assert torch.equal(loaded(tiny.images()).logits, wanted)
    inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    "config", [HeadMaskedLoraConfig(mask_scope="head"), HeadMaskedLoraConfig(adapter_bits=2), RLRRConfig()]
)
def test_said_to_be_stock_lora(tmp_path, config):
    save(tmp_path, config)
    edit(tmp_path, peft_type="LORA")
    with pytest.raises(ValueError, match="which no adapter of type LORA has"):
        load_image_classifier(tmp_path)


class Embedded(nn.Module):
    """A model with a token embedding under the name that PEFT knows."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lin0 = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.lin0(self.embed_tokens(tokens))


def test_embeddings_that_peft_saves_with_the_adapter(tmp_path):
    """`save_embedding_layers=True` always writes them, targeted or not; loading puts them into the model."""
    model = get_peft_model(Embedded(), HeadMaskedLoraConfig(ne=0, target_modules=["lin0"], modules_to_save=[]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = torch.ones(10, 8)
    edit(tmp_path, lambda weights: weights.update({"base_model.model.embed_tokens.weight": saved}))
    loaded = PeftModel.from_pretrained(Embedded(), tmp_path)
    assert torch.equal(loaded.base_model.model.embed_tokens.weight, saved)


def test_the_random_start_of_velora(tmp_path):
    """It normalises numbers, but the skeleton on which a folder is checked has none."""
    config = HeadMaskedLoraConfig(velora_config=VeloraConfig(num_groups=4, init_type="random"))
    model = save(tmp_path, config)
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert any("velora" in key for key in ours)


@pytest.mark.parametrize("init", ["lora_ga", "pissa_niter_4", "Gaussian"])
def test_initialisations_that_peft_s_annotation_does_not_list(tmp_path, init):
    """PEFT takes them for `init_lora_weights`, whatever the field's type says."""
    save(tmp_path, HeadMaskedLoraConfig(ne=0))
    edit(tmp_path, init_lora_weights=init)
    PeftModel.from_pretrained(tiny.make("vit"), tmp_path)


def test_a_word_that_peft_does_not_know_either(tmp_path):
    save(tmp_path, HeadMaskedLoraConfig(ne=0))
    edit(tmp_path, init_lora_weights="other")
    with pytest.raises(ValueError, match="init_lora_weights is 'other' of type str: a wrong type"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
