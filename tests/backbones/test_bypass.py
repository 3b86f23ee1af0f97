"""What the code of a module shows of how it uses its children."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_heads.backbones.bypass import ChildUses, bypassed_modules, child_uses, has_fast_path


class Uses(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("read", "both", "called", "twice", "forwarded", "passed", "described", "filled", "folded"):
            setattr(self, name, nn.Linear(2, 2))

    def forward(self, x):
        x = F.linear(x, self.read.weight) + F.linear(x, self.both.weight) + self.both(x)
        x = self.called(x.to(self.described.weight.dtype))
        x = self.twice(self.twice(x))
        self.filled.weight = None
        return self.helper(self.forwarded.forward(x), self.passed)

    def fold(self):
        return self.folded.weight + 1

    def helper(self, x, module):
        return module(x)


class Calls(Uses):
    def helper(self, x, module):
        return self.read(x)


def test_child_uses():
    uses = child_uses(Uses)
    assert uses.read == {"read", "both"} and uses.only_read == {"read"}  # not by a method beside `forward`
    assert uses.called == {"both", "called", "twice", "helper"}
    assert uses.called_once == {"both", "called", "helper"}
    assert uses.forwarded == {"forwarded"}
    assert uses.passed == {"passed"}


def test_a_subclass_may_call_what_its_base_only_reads():
    assert child_uses(Calls).read == {"read", "both"} and child_uses(Calls).only_read == set()


def test_code_that_cannot_be_read_shows_nothing():
    scope = {"Uses": Uses}
    exec("class Made(Uses):\n    def fold(self):\n        return self.read(1)\n", scope)
    assert child_uses(scope["Made"]) == ChildUses()


def test_bypassed_modules():
    model = nn.Sequential(Uses(), Calls(), nn.MultiheadAttention(4, 2))
    names = ["0.read", "0.both", "0.called", "1.read", "2.out_proj"]
    assert bypassed_modules(model, names) == ["0.read", "2.out_proj"]
    model[0].forward = lambda x: x  # replaced on this module: its class shows nothing any more
    assert bypassed_modules(model, names) == ["2.out_proj"]


def test_a_bias_of_its_own_bypasses_the_fused_projection():
    model = nn.Module()
    model.qkv, model.q_bias = nn.Linear(2, 6), nn.Parameter(torch.zeros(2))
    owner = nn.ModuleDict({"attention": model})
    assert bypassed_modules(owner, ["attention.qkv"]) == ["attention.qkv"]
    model.qkv_bias_separate = True
    assert bypassed_modules(owner, ["attention.qkv"]) == []
    model.qkv_bias_separate, model.q_bias = False, None
    assert bypassed_modules(owner, ["attention.qkv"]) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"batch_first": False}, False), ({"activation": F.silu}, False)],
    ids=["default", "tokens-first", "silu"],
)
def test_fast_path(options, expected):
    layer = nn.TransformerEncoderLayer(4, 2, 8, **{"batch_first": True, **options})
    assert has_fast_path(layer) == expected
    assert bypassed_modules(nn.ModuleList([layer]), ["0.linear1"]) == ["0.linear1"] * expected
