import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.utils import PeftType, hotswap
from safetensors.torch import load_file, save_file
from transformers.utils import PushToHubMixin

import peft_heads
from peft_heads import (
    HeadMaskedLoraConfig,
    HeadMaskedLoraModel,
    RLRRConfig,
    RLRRModel,
    get_head_masks,
    set_head_masks,
)
from peft_heads._compat.hotswap import allow_hotswap, extend_hotswap_check
from peft_heads._compat.overrides import check_hooks
from peft_heads._compat.peft import expand_all_linear, extend_model_card, is_own, register_tuner
from peft_heads.adapter_folder.card import SECTION_BEGIN
from peft_heads.tuners.common.method_registry import update_model_card


def test_peft_type_is_a_true_member():
    member = PeftType.HEAD_MASKED_LORA
    assert member is PeftType("HEAD_MASKED_LORA") is PeftType["HEAD_MASKED_LORA"]
    assert member == "HEAD_MASKED_LORA" and member.value == member.name == "HEAD_MASKED_LORA"
    assert member in list(PeftType) and isinstance(member, PeftType)
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert len({m.value for m in PeftType}) == len(list(PeftType))


def test_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["HEAD_MASKED_LORA"] is HeadMaskedLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["HEAD_MASKED_LORA"] is HeadMaskedLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["HEAD_MASKED_LORA"] == "lora_"
    assert isinstance(PeftConfig.from_peft_type(peft_type="HEAD_MASKED_LORA", ne=2), HeadMaskedLoraConfig)


def test_importing_twice_is_harmless():
    before = list(PeftType)
    importlib.reload(peft_heads)
    importlib.reload(peft_heads.tuners.head_masked_lora)
    assert list(PeftType) == before
    test_registered()


def test_a_real_conflict_is_reported():
    with pytest.raises(KeyError, match="head_masked_lora"):
        register_tuner(name="head_masked_lora", config_cls=PeftConfig, model_cls=HeadMaskedLoraModel)


def test_shared_prefix_refused_one_day(monkeypatch):
    """If PEFT should one day refuse a prefix that is taken, registration still works."""

    def refuse(**kwargs):
        raise KeyError("There is already a prefix called 'lora_'")

    monkeypatch.setattr("peft_heads._compat.peft.register_peft_method", refuse)
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        monkeypatch.delitem(table, "HEAD_MASKED_LORA")
    register_tuner(name="head_masked_lora", config_cls=HeadMaskedLoraConfig, model_cls=HeadMaskedLoraModel)
    test_registered()


def test_importing_survives_the_loss_of_a_private_method(monkeypatch):
    written = []
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: written.append(folder))
    monkeypatch.delattr(PeftModel, "_upload_modified_files")
    monkeypatch.delattr(PushToHubMixin, "_upload_modified_files")
    extend_model_card(lambda model, folder: written.append(f"section in {folder}"))
    PeftModel.create_or_update_model_card(None, "here")
    assert written == ["here", "section in here"]


class ForeignConfig(LoraConfig):
    """A configuration of another plugin, say, with a `from_pretrained` that PEFT does not call."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise AssertionError("PEFT would not have called this")


def test_configurations_of_others_are_loaded_as_peft_does(tmp_path, monkeypatch):
    LoraConfig(r=3).save_pretrained(tmp_path)
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "LORA", ForeignConfig)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is ForeignConfig and config.r == 3
    assert not is_own(config) and is_own(HeadMaskedLoraConfig(ne=1))


def test_hotswap_of_others_is_checked_as_peft_does(monkeypatch):
    """Our check reads our own fields, but a configuration of another type may have one of the same name."""
    old, new = LoraConfig(target_modules=["q"]), LoraConfig(target_modules=["v"])
    new.mask_scope, new.packed = "head", True
    hotswap.check_hotswap_configs_compatible(old, new)
    with pytest.raises(ValueError, match="needs two adapters that carry head masks, or two that do not"):
        hotswap.check_hotswap_configs_compatible(HeadMaskedLoraConfig(ne=1), HeadMaskedLoraConfig(ne=0))


def test_hotswapping_is_extended_once():
    inner = hotswap.hotswap_adapter_from_state_dict.__wrapped__
    assert inner.__module__ == "peft.utils.hotswap" and not hasattr(inner, "__wrapped__")


@pytest.fixture
def uploaded(monkeypatch):
    """Return what `push_to_hub` would upload, by file name; the Hub's template then replaces the card."""
    files = {}

    def upload(self, working_dir, *args, **kwargs):
        files.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir() if path.is_file()})

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.delattr(PeftModel, "_upload_modified_files")
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", PeftModel.create_or_update_model_card.__wrapped__)
    extend_model_card(update_model_card)
    return files


TEMPLATE = "---\nlibrary_name: transformers\n---\n# Model Card\n" + "[More Information Needed]\n" * 30


@pytest.mark.parametrize("base", ["", "/nowhere/vit", "./vit", "me/vit"])
def test_upload_of_an_adapter_of_another_type_is_left_alone(uploaded, tmp_path, base):
    vit = tiny.make("vit")
    vit.name_or_path = vit.config._name_or_path = base
    model = get_peft_model(vit, LoraConfig(target_modules=tiny.now(["q_proj"])))
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # without asking the Hub for the base model
    (tmp_path / "README.md").write_text(TEMPLATE)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model._upload_modified_files(tmp_path, "me/stock", {})
    assert uploaded == files
    (tmp_path / "README.md").unlink()
    model._upload_modified_files(tmp_path, "me/stock", {})


@pytest.mark.parametrize("make_config", [lambda: HeadMaskedLoraConfig(ne=0), lambda: RLRRConfig(ne=0)])
@pytest.mark.parametrize(
    ("base", "named", "expected"),
    [
        ("", None, None),
        ("/nowhere/vit", None, None),
        ("./vit", None, None),
        ("C:\\vit", None, None),
        ("me/vit", None, "me/vit"),
        ("/nowhere/vit", "me/vit", "me/vit"),  # a copy of the Hub's
    ],
)
def test_upload_of_ours_names_no_folder_as_the_base_model(uploaded, tmp_path, make_config, base, named, expected):
    """The Hub refuses a card whose base model has a name that no repository can have."""
    vit = tiny.make("vit")
    vit.name_or_path = vit.config._name_or_path = base
    config = make_config()
    model = get_peft_model(vit, config)
    config.base_model_name_or_path = named or config.base_model_name_or_path
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # without asking the Hub for the base model
    (tmp_path / "README.md").write_text(TEMPLATE)
    model._upload_modified_files(tmp_path, "me/ours", {})
    card = ModelCard(uploaded["README.md"].decode())
    assert card.data.base_model == expected
    assert not [tag for tag in card.data.tags if tag.startswith("base_model:") and not tag.endswith("me/vit")]
    assert "## Settings" in card.text and "[More Information Needed]" not in card.text


def test_a_card_of_ours_loses_its_section_under_an_adapter_of_another_type(uploaded, tmp_path):
    get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0)).save_pretrained(tmp_path)
    assert SECTION_BEGIN in (tmp_path / "README.md").read_text("utf-8")
    stock = get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"])))
    stock._upload_modified_files(tmp_path, "me/was-ours", {})
    assert SECTION_BEGIN not in uploaded["README.md"].decode() and uploaded["README.md"]


TUNERS = pytest.mark.parametrize("tuner", [HeadMaskedLoraModel, RLRRModel])


@TUNERS
@pytest.mark.parametrize("hook", ["_get_adapter_state_dict", "_create_and_replace"])
def test_a_hook_that_peft_has_no_longer_is_missed_at_once(tuner, hook, monkeypatch):
    """PEFT would not call our override either: masks would silently be neither saved nor applied."""
    check_hooks(tuner)
    for cls in tuner.__mro__:
        if cls.__module__.startswith("peft.") and hook in vars(cls):
            monkeypatch.delattr(cls, hook)
    with pytest.raises(ImportError, match=f"{tuner.__name__} extends {hook}, which peft .* no longer has"):
        check_hooks(tuner)


def test_without_the_helper_for_all_linear_only_that_is_refused(monkeypatch):
    monkeypatch.delattr(tuners_utils, "_maybe_include_all_linear_layers")
    config = HeadMaskedLoraConfig(ne=1, target_modules=["q_proj"])
    expand_all_linear(config, tiny.make("vit"))
    assert config.target_modules == {"q_proj"}
    config.target_modules = "all-linear"
    with pytest.raises(ValueError, match="name the modules"):
        expand_all_linear(config, tiny.make("vit"))


@pytest.mark.parametrize("name", ["CONFIG_KEYS_TO_CHECK", "check_hotswap_configs_compatible"])
def test_without_a_check_of_hotswaps_none_is_registered(name, monkeypatch):
    """PEFT would swap adapters whose masks or bits differ."""
    table = {PeftType.LORA: []}
    monkeypatch.setattr(hotswap, "CONFIG_KEYS_TO_CHECK", table)
    monkeypatch.delattr(hotswap, name)
    allow_hotswap("head_masked_lora", "mask_scope")
    extend_hotswap_check(None)
    assert table == {PeftType.LORA: []} and not hasattr(hotswap, name)


@pytest.fixture
def without_version_check(monkeypatch):
    """transformers 5.22 and later ask for peft 0.22 before its methods for adapters do what they did in 5.21."""
    integration = importlib.import_module("transformers.integrations.peft")
    if Version(integration.MIN_PEFT_VERSION) > Version(peft.__version__):
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", peft.__version__)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("make_config", [HeadMaskedLoraConfig, RLRRConfig])
def test_mixin_of_transformers(make_config, without_version_check, tmp_path):
    """transformers' own `add_adapter`, `load_adapter` and the rest have the same results as PEFT's model."""
    model = tiny.make("vit")
    model.add_adapter(make_config(ne=1), adapter_name="pets")
    peft_model = get_peft_model(tiny.make("vit"), make_config(ne=1), adapter_name="pets")
    images, base_logits = tiny.images(), tiny.make("vit").eval()(tiny.images()).logits
    expected = None
    for one in (model, peft_model):
        generator = torch.Generator().manual_seed(1)
        for param in one.parameters():
            if param.requires_grad:
                param.data.normal_(std=0.3, generator=generator)
        set_head_masks(one, {k: torch.arange(6) != 2 for k in get_head_masks(one, "pets")}, "pets")
        logits = one.eval()(images).logits
        assert expected is None or torch.equal(logits, expected)
        expected = logits
    assert not torch.allclose(expected, base_logits, atol=1e-2)

    model.save_pretrained(tmp_path)
    loaded = tiny.make("vit")
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    assert torch.equal(loaded.eval()(images).logits, expected)
    assert {tuple(mask.tolist()) for mask in get_head_masks(loaded, "again").values()} == {
        (True, True, False, True, True, True)
    }
    loaded.disable_adapters()  # its enable_adapters forgets the trained classifier, of stock adapters as well
    assert torch.equal(loaded(images).logits, base_logits)
    model.delete_adapter("pets")
    assert torch.equal(model(images).logits, base_logits)


MASK_END = "_head_mask.mask"


def without_masks(folder, chosen=lambda key: True):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    gone = [key for key in weights if key.endswith(MASK_END) and chosen(key)]
    save_file({key: value for key, value in weights.items() if key not in gone}, path, metadata={"format": "pt"})
    return gone


@pytest.mark.filterwarnings("ignore:the adapter saved to")  # no heads are selected
@pytest.mark.parametrize("make_config", [HeadMaskedLoraConfig, RLRRConfig])
def test_missing_masks_are_no_weights_that_need_training(make_config, tmp_path):
    model = get_peft_model(tiny.make("vit"), make_config(ne=1, modules_to_save=[]))
    model.save_pretrained(tmp_path)
    assert len(without_masks(tmp_path)) == 4
    loaded = tiny.make("vit")
    info = loaded.load_adapter(str(tmp_path))
    assert not getattr(info, "missing_keys", None) and not getattr(info, "unexpected_keys", None)  # 4 returns nothing
    assert all(mask.all() for mask in get_head_masks(loaded).values())


def test_a_missing_mask_of_silent_heads_is_refused_by_transformers_loading(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, mask_scope="head", modules_to_save=[]))
    tiny.randomize_lora(model)
    set_head_masks(model, {key: torch.arange(6) != 2 for key in get_head_masks(model)})
    model.save_pretrained(tmp_path)
    loaded = tiny.make("vit")
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded.eval()(tiny.images()).logits, model.eval()(tiny.images()).logits)
    (_,) = without_masks(tmp_path, lambda key: ".1." in key and key.split(".")[-3].startswith("v"))
    loaded = tiny.make("vit")
    with pytest.raises(ValueError, match=r"no head mask for .*1\..*, but its rows of lora_B are zero for heads \[2\]"):
        loaded.load_adapter(str(tmp_path))
    assert not any("lora" in name for name, _ in loaded.named_modules())


@pytest.mark.filterwarnings("ignore:the adapter saved to")  # no heads are selected
@pytest.mark.parametrize("make_config", [HeadMaskedLoraConfig, LoraConfig])
def test_transformers_loading_leaves_the_model_s_patterns_alone(make_config, tmp_path):
    config = make_config(target_modules=tiny.now(["q_proj"]))
    get_peft_model(tiny.make("vit"), config).save_pretrained(tmp_path, save_embedding_layers=False)
    model = tiny.make("vit")
    for option in ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"):
        vars(model).pop(option, None)
    before = set(vars(model))
    model.load_adapter(str(tmp_path))
    added = set(vars(model)) - before
    assert not [name for name in added if "ignore" in name]


def test_of_a_stock_adapter_transformers_reports_everything(tmp_path):
    """It also reports our settings, which stock LoRA would overlook."""
    model = get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"])))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        load_file(path) | {"base_model.model.lora_settings": torch.ones(3, dtype=torch.bool)}, path, {"format": "pt"}
    )
    info = tiny.make("vit").load_adapter(str(tmp_path))
    assert info is None or any("lora_settings" in key for key in info.unexpected_keys)  # 4 returns nothing


def test_import_adds_nothing_heavy():
    script = """
import sys, peft
before = set(sys.modules)
import peft_heads
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new), len([n for n in set(sys.modules) - before if not n.startswith("peft_heads")]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    packages, _, others = done.stdout.strip().rpartition(" ")
    assert packages == "['peft', 'peft_heads', 'transformers']" and int(others) <= 8


def test_mixed_models_are_not_supported():
    with pytest.raises(ValueError, match="HEAD_MASKED_LORA"):
        PeftMixedModel(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
