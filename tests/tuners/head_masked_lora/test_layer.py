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


@pytest.mark.parametrize("kind", ["pre-hook", "hook", "backward pre-hook", "backward hook", "wrapper", "forward"])
@pytest.mark.parametrize("scope", ["adapter", "head"])
def test_lora_B_is_called_where_something_waits_for_the_call(kind, scope):
    """FSDP gathers a unit's weight when the module is called, and layerwise casting casts it then."""
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, lora_bias=True, mask_scope=scope))
    tiny.randomize_lora(model)
    set_head_masks(model, tiny.masks_off(model, 1))
    layer = layer_of(model)
    x = torch.randn(3, layer.in_features)

    def run():
        model.zero_grad()
        output = layer(x)
        output.square().sum().backward()
        return output, *(p.grad.clone() for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters()))

    plain, calls = run(), []
    lora_B = layer.lora_B["default"]
    if kind == "pre-hook":
        lora_B.register_forward_pre_hook(lambda *_: calls.append(1))
    elif kind == "hook":
        lora_B.register_forward_hook(lambda *_: calls.append(1))
    elif kind == "backward pre-hook":
        lora_B.register_full_backward_pre_hook(lambda *_: calls.append(1))
    elif kind == "backward hook":
        lora_B.register_full_backward_hook(lambda *_: calls.append(1))
    elif kind == "forward":  # as Accelerate offloads weights
        forward = lora_B.forward
        lora_B.forward = lambda x: calls.append(1) or forward(x)
    else:
        layer.lora_B["default"] = Wrapper(lora_B, calls)
    called = run()
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, called, strict=True))
    rows = slice(4, 8)  # head 1
    assert called[-2][rows].count_nonzero() == called[-1][rows].count_nonzero() == 0 < called[-1].count_nonzero()


class Wrapper(torch.nn.Module):
    def __init__(self, module, calls):
        super().__init__()
        self.module, self.calls = module, calls

    def forward(self, x):
        self.calls.append(1)
        return self.module(x)


def test_base_parameters_under_vmap(model):
    """In an ensemble the layer's output has a dimension that the update lacks."""
    layer = layer_of(model)
    x, bias = torch.randn(3, layer.in_features), layer.base_layer.bias.detach()
    biases = torch.stack([bias, 2 * bias])
    outputs = torch.vmap(lambda b: torch.func.functional_call(layer, {"base_layer.bias": b}, (x,)))(biases)
    torch.testing.assert_close(outputs[1] - outputs[0], bias.expand(3, -1))
