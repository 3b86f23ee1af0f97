"""Ordinary and offloaded parameters, and DTensors on a mesh of one process. For several: tests/test_distributed.py."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_heads.functional import sharding
from peft_heads.functional.sharding import (
    is_dtensor,
    on_gradient,
    whole,
    whole_entry,
    whole_shape,
    whole_value,
    zero_rows,
)


ACTIVE = torch.tensor([True, False, True])


@pytest.fixture(params=["ordinary", "DTensor"])
def make(request):
    """Make a parameter of a tensor."""
    if request.param == "ordinary":
        yield nn.Parameter
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(3, 4), (3,), (3, 2, 2)])
def test_zero_rows(make, shape):
    """Rows of the parameter and of its optimizer state become zero, even if they are not finite."""
    param = make(torch.randn(shape))
    optimizer = torch.optim.AdamW([param], lr=0.1)
    param.square().sum().backward()
    optimizer.step()
    tensors = [param, *(state for state in optimizer.state[param].values() if state.dim())]
    assert len(tensors) == 3
    with torch.no_grad():
        whole(param)[1] = float("nan")
    before = [whole_value(tensor).clone() for tensor in tensors]
    step = optimizer.state[param]["step"].clone()
    zero_rows(param, ACTIVE, optimizer)
    for tensor, old in zip(tensors, before, strict=True):
        value = whole_value(tensor)
        assert old[1].count_nonzero() and not value[1].count_nonzero()
        assert torch.equal(value[ACTIVE], old[ACTIVE])
    assert optimizer.state[param]["step"] == step


def test_zero_rows_without_an_optimizer(make):
    param = make(torch.ones(3, 2))
    zero_rows(param, ACTIVE)
    assert whole_value(param).tolist() == [[1, 1], [0, 0], [1, 1]]


def test_on_gradient(make):
    """An ordinary parameter's gradient is that of the backward pass; a DTensor's is summed over the passes."""
    param, heard = make(torch.ones(3, 2)), []
    handle = on_gradient(param, lambda grad, is_total: heard.append((whole(grad).clone(), is_total)))
    for factor in (1, 2):
        (param * factor).sum().backward()
    handle.remove()
    param.sum().backward()
    is_total = is_dtensor(param)
    assert [total for _, total in heard] == [is_total] * 2
    assert [grad[0, 0].item() for grad, _ in heard] == ([1, 3] if is_total else [1, 2])


def test_whole(make):
    param = make(torch.arange(6.0).view(3, 2))
    value = whole_value(param)
    assert type(whole(param.detach())) is type(value) is torch.Tensor
    assert torch.equal(value, torch.arange(6.0).view(3, 2)) and not value.requires_grad
    assert whole_shape(param) == (3, 2)


def test_the_shape_before_zero_3_took_the_parameter_apart():
    param = nn.Parameter(torch.empty(0))
    param.ds_shape = torch.Size([3, 2])
    assert whole_shape(param) == (3, 2)


def test_an_entry_of_a_state_dict():
    from accelerate import cpu_offload

    model = nn.ModuleDict({"a": nn.Linear(2, 3)})
    expected = model["a"].weight.detach().clone()
    assert torch.equal(whole_entry(model, "a.weight", model["a"].weight.detach()), expected)
    cpu_offload(model, "cpu")
    assert model["a"].weight.is_meta
    assert torch.equal(whole_entry(model, "a.weight", model.state_dict()["a.weight"]), expected)


def test_an_entry_without_a_value():
    model = nn.ModuleDict({"a": nn.Linear(2, 3, device="meta")})
    with pytest.raises(ValueError, match=r"a\.weight is on the meta device: it has no value yet"):
        whole_entry(model, "a.weight", model["a"].weight.detach())


def test_imports_torch_only():
    modules = {value.__name__ for value in vars(sharding).values() if type(value) is type(torch)}
    assert modules == {"torch", "torch.nn"}
    source = Path(sharding.__file__).read_text("utf-8")
    roots = {name.partition(".")[0] for name in re.findall(r"^(?:from|import) (\w\S*)", source, re.MULTILINE)}
    assert roots == {"__future__", "collections", "contextlib", "typing", "torch"}
