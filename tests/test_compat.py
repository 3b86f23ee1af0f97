import copy
import importlib
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from transformers.utils import PushToHubMixin

import peft_heads
from peft_heads import HeadMaskedLoraConfig, HeadMaskedLoraModel, _compat


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
        _compat.register_tuner(name="head_masked_lora", config_cls=PeftConfig, model_cls=HeadMaskedLoraModel)


def test_shared_prefix_refused_one_day(monkeypatch):
    """Should PEFT come to refuse a prefix that is taken, registration still works."""

    def refuse(**kwargs):
        raise KeyError("There is already a prefix called 'lora_'")

    monkeypatch.setattr(_compat, "register_peft_method", refuse)
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        monkeypatch.delitem(table, "HEAD_MASKED_LORA")
    _compat.register_tuner(name="head_masked_lora", config_cls=HeadMaskedLoraConfig, model_cls=HeadMaskedLoraModel)
    test_registered()


def test_importing_survives_the_loss_of_a_private_method(monkeypatch):
    written = []
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: written.append(folder))
    monkeypatch.delattr(PeftModel, "_upload_modified_files")
    monkeypatch.delattr(PushToHubMixin, "_upload_modified_files")
    _compat.extend_model_card(lambda model, folder: written.append(f"section in {folder}"))
    PeftModel.create_or_update_model_card(None, "here")
    assert written == ["here", "section in here"]


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
    import tiny

    with pytest.raises(ValueError, match="HEAD_MASKED_LORA"):
        PeftMixedModel(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
