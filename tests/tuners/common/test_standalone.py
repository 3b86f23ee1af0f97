"""What a short method without heads inherits: a gain for every output of some linear layers."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from throwaway import registered
from torch import nn

from peft_heads import Method, set_image_processor
from peft_heads._compat.peft import add_peft_type
from peft_heads.adapter_folder.card import CardText
from peft_heads.adapter_folder.contents import folder_contents
from peft_heads.adapter_folder.labels import read_labels
from peft_heads.tuners.common.folder_config import AdapterFolderConfig
from peft_heads.tuners.common.model import VisionTuner
from peft_heads.tuners.common.standalone import StandaloneTuner


@dataclass
class GainConfig(AdapterFolderConfig, PeftConfig):
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    start: float = 0.0

    card = CardText(title="Gain", method="A gain on outputs of {base}.", settings=("start",), tags=("gain",))

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("TEST_GAIN")


class GainLayer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("gain_delta",)

    def __init__(self, base_layer, adapter_name, config):
        super().__init__()
        self.base_layer = base_layer
        self.gain_delta = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name, config):
        self.gain_delta[adapter_name] = nn.Parameter(torch.full((self.base_layer.out_features,), config.start))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def gain(self, name):
        return 1 + self.gain_delta[name] if name in self.gain_delta else torch.ones(self.base_layer.out_features)

    def forward(self, x, adapter_names=None):
        y = self.base_layer(x)
        if adapter_names is not None:  # one for each image
            return y * torch.stack([self.gain(name) for name in adapter_names]).unsqueeze(1)
        return y if self.disable_adapters else y * self.gain(self.active_adapters[0])


class GainModel(StandaloneTuner):
    prefix = "gain_"
    tuner_layer_cls = GainLayer

    def default_modules(self, peft_config):
        return tiny.now(["fc1"])

    def create_layer(self, peft_config, adapter_name, target, name):
        if isinstance(target, GainLayer):
            target.update_layer(adapter_name, peft_config)
            return target
        return GainLayer(target, adapter_name, peft_config)


@pytest.fixture(autouse=True)
def known_method():
    with registered(Method(name="test-gain", help="a gain", config=GainConfig, model=GainModel)):
        yield


def labelled(names):
    model = tiny.make("vit", num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.images()).logits


def trained(names=("cat", "dog", "eel")):
    model = get_peft_model(labelled(names), GainConfig(start=0.5))
    tiny.train(model, steps=1)
    return model


def test_it_is_a_vision_tuner_without_heads():
    model = trained()
    assert isinstance(model.base_model, VisionTuner)
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    gains = [layer for layer in model.modules() if isinstance(layer, GainLayer)]
    assert len(gains) == 2  # one in each block
    assert all((layer.gain_delta["default"] != 0.5).any() for layer in gains)  # a step was taken
    assert model.base_model.adapter_states["default"].head_layouts == {}


def test_saved_and_loaded_with_labels_and_card(tmp_path):
    names = ("cat", "dog", "eel")
    model = trained(names)
    set_image_processor(model, tiny.ViTProcessor())
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "Gain adapter for" in card.text and "| `start` | 0.5 |" in card.text
    assert "eads" not in card.text.replace("peft_heads", "").replace("peft-heads", "")
    assert {"gain", "peft_heads"} <= set(card.data.tags)
    assert read_labels(tmp_path) == dict(enumerate(names))
    assert (tmp_path / "preprocessor_config.json").is_file()

    again = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.get_base_model().config.id2label == dict(enumerate(names))


def test_labels_follow_the_active_adapter(tmp_path):
    expected = {}
    for names in (("cat", "dog", "eel"), ("oak", "pea", "rye", "fig")):
        model = trained(names)
        model.save_pretrained(tmp_path / names[0])
        expected[names] = logits(model)
    model = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "cat", adapter_name="cat")
    model.load_adapter(tmp_path / "oak", "oak")
    for names in (*expected, *expected):
        model.set_adapter(names[0])
        assert torch.equal(logits(model), expected[names])
        assert model.get_base_model().config.id2label == dict(enumerate(names))


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    other = tiny.make("swin")
    before = logits(other)
    with pytest.raises(ValueError, match="has no place|Found missing adapter keys|has the shape"):
        PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(logits(other), before)


def test_a_mixed_batch():
    model = trained()
    model.add_adapter("second", GainConfig(start=-0.5))
    both = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        both[name] = logits(model)
    with torch.no_grad():
        mixed = model(tiny.images(), adapter_names=["default", "second", "default", "second"]).logits
    torch.testing.assert_close(mixed[0::2], both["default"][0::2])
    torch.testing.assert_close(mixed[1::2], both["second"][1::2])
    assert folder_contents(model, "second") is not folder_contents(model, "default")
