"""The run-time state of an adapter lies on the tuner, by adapter name, and not in its configuration."""

import copy
import pickle

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, set_head_masks, set_image_processor
from peft_heads.adapter_folder.contents import folder_contents
from peft_heads.tuners.common.folder_config import Carried
from peft_heads.tuners.common.state import AdapterState


CONFIGS = {
    "head-masked": HeadMaskedLoraConfig,
    "k bit": lambda **options: HeadMaskedLoraConfig(adapter_bits=2, classifier_bits=4, **options),
    "rlrr": RLRRConfig,
}


@pytest.fixture(params=CONFIGS)
def make(request):
    return lambda **options: CONFIGS[request.param](**{"ne": 1, **options})


def attributes(config):
    """Return the attributes of a configuration that are no fields."""
    return set(vars(config)) - set(type(config).__dataclass_fields__)


def test_a_configuration_carries_one_thing(make):
    config = make()
    model = get_peft_model(tiny.make("vit"), config)
    model(tiny.images())
    assert attributes(config) - attributes(LoraConfig()) == {"carried"}
    assert isinstance(config.carried, Carried)


def test_adapters_have_states_of_their_own(make):
    config = make()
    model = get_peft_model(tiny.make("vit"), config)
    model.add_adapter("second", config)  # the same object
    states = model.base_model.adapter_states
    assert list(states) == ["default", "second"] and all(isinstance(state, AdapterState) for state in states.values())
    assert states["default"].head_layouts.keys() == states["second"].head_layouts.keys() > set()
    set_image_processor(model, tiny.ViTProcessor(), "second")
    assert folder_contents(model, "default").image_processor is None
    assert folder_contents(model, "second").image_processor is not None
    model.delete_adapter("second")
    assert list(states) == ["default"]


def test_two_models_with_one_configuration_save_what_is_their_own(make, tmp_path):
    config = make()
    one, two = get_peft_model(tiny.make("vit"), config), get_peft_model(tiny.make("vit", seed=1), config)
    set_image_processor(one, tiny.ViTProcessor())
    for model, name in ((one, "one"), (two, "two")):
        set_head_masks(model, tiny.masks_off(model, 0))
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "one" / "preprocessor_config.json").exists()
    assert not (tmp_path / "two" / "preprocessor_config.json").exists()


def test_an_adapter_that_cannot_be_added_leaves_no_state(make):
    model = get_peft_model(tiny.make("vit"), make())
    with pytest.raises(ValueError):
        model.add_adapter("second", make(target_modules=["nowhere"]))
    assert list(model.base_model.adapter_states) == ["default"]
    model.add_adapter("second", make())
    assert list(model.base_model.adapter_states) == ["default", "second"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_states_of_their_own(make, copied):
    model = get_peft_model(tiny.make("vit"), make())
    other = copied(model)
    assert other.base_model.adapter_states["default"] is not model.base_model.adapter_states["default"]
    set_image_processor(other, tiny.ViTProcessor())
    assert folder_contents(model).image_processor is None and folder_contents(other).image_processor is not None
    other.add_adapter("second", make())
    assert list(model.base_model.adapter_states) == ["default"]


def test_a_copy_forgets_the_codes_of_its_own_layers():
    """The quantiser that the state names is the one that the layers of the copy share."""
    config = HeadMaskedLoraConfig(adapter_bits=2)
    model = copy.deepcopy(get_peft_model(tiny.make("vit"), config))
    shared = model.base_model.adapter_states["default"].quantizer
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_quantizer")]
    assert layers and all(layer.lora_quantizer["default"] is shared for layer in layers)
    with pytest.raises(ValueError, match="there is no adapter 'other'; the model has default"):
        model.forget_codes("other")


def test_injected_without_a_tuner_that_stays(make, tmp_path):
    model = inject_adapter_in_model(make(), tiny.make("vit"))
    set_head_masks(model, tiny.masks_off(model, 0))
    set_image_processor(model, tiny.ViTProcessor())
    state_dict = get_peft_model_state_dict(model)
    contents = folder_contents(model)
    assert contents is model.peft_config["default"].carried.contents
    assert contents.image_processor is not None and contents.model_class == type(model).__name__
    assert contents.masks.keys() == tiny.masks_off(model).keys() and state_dict
    model.peft_config["default"].save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()


def test_loading_reads_labels_once(make, tmp_path):
    base = tiny.make("vit")
    base.config.id2label = {0: "cat", 1: "dog", 2: "eel"}
    model = get_peft_model(base, make())
    set_head_masks(model, tiny.masks_off(model, 0))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    assert again.get_base_model().config.id2label == base.config.id2label
    carried = again.peft_config["default"].carried
    assert carried.source is None and carried.contents.labels_in_file is None
    with torch.no_grad():
        assert torch.equal(again.eval()(tiny.images()).logits, model.eval()(tiny.images()).logits)
