import pytest
import tiny
import torch
from peft import get_peft_model
from peft.tuners.lora.layer import Linear

from peft_heads import HeadMaskedLoraConfig, set_head_masks
from peft_heads.heads import HeadMaskable
from peft_heads.tuners import HeadMaskedLinear


@pytest.fixture
def model():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    tiny.randomize_lora(model)
    return model.eval()


def layer_of(model):
    return next(m for m in model.modules() if isinstance(m, HeadMaskedLinear))


def test_follows_the_protocol_and_is_a_lora_layer(model):
    layer = layer_of(model)
    assert isinstance(layer, HeadMaskable) and isinstance(layer, Linear)
    assert "head_masked_lora.HeadMaskedLinear" in repr(layer)
    assert not isinstance(layer.base_layer, HeadMaskable)


def logits(model, adapter_name):
    model.set_adapter(adapter_name)
    return model.eval()(tiny.images()).logits


def test_compiled_forward_matches(model):
    set_head_masks(model, tiny.masks_off(model, 1))
    layer = layer_of(model)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(compiled(x), layer(x))
