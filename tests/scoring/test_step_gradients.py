"""The gradients of one optimizer step, from layers that follow the protocol and do not depend on PEFT."""

import gc

import pytest
import torch
from torch import nn

from peft_heads.heads import HeadLayout, HeadMaskable, ProjectionLayout, ScoredParameter
from peft_heads.heads.protocol import get_head_masks, set_head_masks
from peft_heads.scoring.step_gradients import StepGradients


class Projection(nn.Module):
    """A layer with exactly what it needs to be scored and masked."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.head_layout = {"default": ProjectionLayout(4, (HeadLayout("query", num_heads=2, head_dim=2),))}
        self.mask = torch.ones(2, dtype=torch.bool)

    def scored_parameters(self, adapter_name):
        return [ScoredParameter(self.up), ScoredParameter(self.bias)]

    def get_head_mask(self, adapter_name):
        return self.mask

    def set_head_mask(self, adapter_name, mask):
        self.mask = mask

    def active_rows(self, adapter_name):
        return self.head_layout[adapter_name].active_rows(self.mask)

    def forward(self, x):
        return nn.functional.linear(x, self.up, self.bias)


class Doubled(ScoredParameter):
    """A variant whose acting weight is twice its parameter."""

    def tensor(self):
        return 2 * self.param

    def on_gradient(self, call):
        return self.param.register_hook(lambda grad: call(grad / 2, False))


class DoubledProjection(Projection):
    def scored_parameters(self, adapter_name):
        return [Doubled(self.up), ScoredParameter(self.bias)]

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.up, self.bias)


@pytest.fixture(params=[Projection, DoubledProjection])
def layer(request):
    return request.param()


@pytest.fixture
def gradients(layer):
    gradients = StepGradients({"q": layer}, "default")
    gradients.listen()
    yield gradients
    gradients.stop()


def backward(layer, seed=0):
    """Run a backward pass; return the gradients of the acting weight and of the bias, side by side (4, 4)."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    slope = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed + 1))
    (layer(x) * slope).sum().backward()
    return torch.cat([slope.T @ x, slope.sum(dim=0, keepdim=True).T], dim=1)


def acting(layer):
    factor = 2 if isinstance(layer, DoubledProjection) else 1
    return torch.cat([factor * layer.up, layer.bias[:, None]], dim=1).detach().clone()


def test_the_layer_follows_the_protocol(layer):
    assert isinstance(layer, HeadMaskable)
    model = nn.ModuleDict({"q": layer})
    set_head_masks(model, {"q": torch.tensor([True, False])})
    assert get_head_masks(model)["q"].tolist() == [True, False]


def test_micro_batches_add_up(layer, gradients):
    expected = sum(backward(layer, seed) for seed in (0, 2, 4))
    grads, is_finite = gradients.over_processes(layer.parameters())
    assert is_finite and list(grads) == ["q"]
    torch.testing.assert_close(grads["q"], expected)


def test_values_are_those_of_the_backward_pass(layer, gradients):
    """DeepSpeed's engine takes the step itself, before the values are read."""
    before = acting(layer)
    assert torch.equal(gradients.values()["q"], before)  # as they are, as long as nothing was heard
    backward(layer)
    layer.up.data.add_(1)
    assert torch.equal(gradients.values()["q"], before)
    assert torch.equal(gradients.values(now=True)["q"], acting(layer)) and not torch.equal(acting(layer), before)


def test_the_next_step_begins_with_clear(layer, gradients):
    backward(layer)
    gradients.clear()
    layer.up.data.add_(1)
    expected = backward(layer, seed=2)
    grads, _ = gradients.over_processes([])
    torch.testing.assert_close(grads["q"], expected)
    assert torch.equal(gradients.values()["q"], acting(layer))


def test_after_stop_nothing_is_heard(layer, gradients):
    assert gradients.listening
    backward(layer)
    gradients.stop()
    assert not gradients.listening
    backward(layer)
    with pytest.raises(RuntimeError, match=r"no gradient has reached adapter 'default' .*\(q\)"):
        gradients.over_processes([])


def test_one_that_is_dropped_stops_listening(layer):
    calls = []

    class Counting(StepGradients):
        def _accumulate(self, *args):
            calls.append(1)
            super()._accumulate(*args)

    gradients = Counting({"q": layer}, "default")
    gradients.listen()
    backward(layer)
    assert len(calls) == 2
    del gradients
    gc.collect()
    backward(layer)
    assert len(calls) == 2


@pytest.mark.parametrize("where", ["own", "other"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite(layer, gradients, where, value):
    """A large finite number counts as finite even if its square is not."""
    other = nn.Parameter(torch.zeros(2))
    unreached = nn.Parameter(torch.zeros(2))
    other.grad = torch.tensor([0.0, value if where == "other" else 1.0])
    backward(layer)
    if where == "own":
        gradients._grads[layer.up][0, 0] = value
    _, is_finite = gradients.over_processes([other, unreached])
    assert is_finite == (value == 3e38)
