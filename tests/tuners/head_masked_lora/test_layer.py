import copy
import pickle

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


def test_delete_adapter_removes_the_mask(model):
    model.add_adapter("other", HeadMaskedLoraConfig(ne=2, modules_to_save=[]))
    layer = layer_of(model)
    assert set(layer.lora_head_mask) == set(layer.head_layout) == {"default", "other"}
    model.delete_adapter("other")
    assert set(layer.lora_head_mask) == set(layer.head_layout) == {"default"}
    assert not any("other" in name for name in model.state_dict())


def test_each_adapter_has_its_own_mask(model):
    model.add_adapter("other", HeadMaskedLoraConfig(ne=2, modules_to_save=[]))
    tiny.randomize_lora(model, seed=4)
    before = {name: logits(model, name) for name in ("default", "other")}
    set_head_masks(model, tiny.masks_off(model, 1), "other")
    assert torch.equal(logits(model, "default"), before["default"])
    assert not torch.equal(logits(model, "other"), before["other"])


def logits(model, adapter_name):
    model.set_adapter(adapter_name)
    return model.eval()(tiny.images()).logits


def test_copy_and_pickle(model):
    set_head_masks(model, tiny.masks_off(model, 1))
    expected = model(tiny.images()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tiny.images()).logits, expected)


def test_moves_and_casts_with_the_model(model):
    set_head_masks(model, tiny.masks_off(model, 1))
    model.to(torch.bfloat16)
    assert layer_of(model).get_head_mask("default").dtype == torch.bool
    assert model(tiny.images().bfloat16()).logits.isfinite().all()


def test_compiled_forward_matches(model):
    set_head_masks(model, tiny.masks_off(model, 1))
    layer = layer_of(model)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(compiled(x), layer(x))


def test_disabled_adapter_gives_the_base_model(model):
    set_head_masks(model, tiny.masks_off(model, 1))
    with model.disable_adapter():
        actual = model(tiny.images()).logits
    assert torch.equal(actual, tiny.make("vit").eval()(tiny.images()).logits)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    set_head_masks(model, tiny.masks_off(model, 1))
    other = copy.deepcopy(model)
    base = other.get_base_model()
    # transformers renames it in v6
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    for each in (model, other):
        each.train()(**tiny.batch()).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), name
