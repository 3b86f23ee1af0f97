"""Parameters of which a process holds only a part (FSDP2's DTensors, DeepSpeed's ZeRO partitions), or nothing (offloaded).

Where a parameter is sharded, what reads or writes the whole of it is a collective: every process must call it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._compat.torch import is_partitioned_by_zero
from .rows import per_row


def is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # torch.distributed.tensor is slow to import


def whole_shape(param: torch.Tensor) -> torch.Size:
    """The shape of a parameter before it was sharded."""
    return getattr(param, "ds_shape", param.shape)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is, a DTensor put together."""
    if not is_dtensor(tensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.wait() if hasattr(tensor, "wait") else tensor  # without gradients it may still be on its way


def whole_entry(model: nn.Module, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """An entry of a model's state dict, put together; an offloaded one is fetched from Accelerate, to the CPU.

    Args:
        model: The model.
        key: The entry's key.
        tensor: The entry, which may be a DTensor, or on the meta device.

    Raises:
        ValueError: The entry is on the meta device, and Accelerate does not have it.
    """
    if not tensor.is_meta:
        return whole(tensor)
    from accelerate.utils import align_module_device

    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        value = getattr(module, name).detach()
    if value.is_meta:
        raise ValueError(
            f"{key} is on the meta device: it has no value yet, or was offloaded by other means than Accelerate's hooks; "
            "load the weights, or pass their values as state_dict"
        )
    return value.to("cpu", copy=True)


def whole_value(param: nn.Parameter) -> torch.Tensor:
    """A parameter's value, detached and put together."""
    with _gathered(param):
        value = whole(param.detach())
        return value.clone() if hasattr(param, "ds_id") else value


def on_gradient(param: nn.Parameter, call: Callable[[torch.Tensor, bool], None]) -> Any:
    """Call `call(gradient, is_total)` when a backward pass reaches the parameter, before anything clips it.

    Of an ordinary parameter, also with DistributedDataParallel or ZeRO, the gradient is this process's, of the
    micro-batch alone (`is_total=False`). FSDP2 computes no such gradient and calls no tensor hooks. There it is the
    gradient reduced over the processes and summed over the micro-batches so far (`is_total=True`).

    Args:
        param: The parameter.
        call: The function to call.

    Returns:
        A handle with `remove()`.
    """
    if is_dtensor(param):
        return param.register_post_accumulate_grad_hook(lambda p: call(p.grad, True))
    return param.register_hook(lambda grad: call(grad, False))


def zero_rows(param: nn.Parameter, active: torch.Tensor, optimizer: Any = None) -> None:
    """Set rows of a parameter, and of its state in the optimizer, to zero.

    Args:
        param: (rows, …).
        active: bool (rows,), False where the row becomes zero.
        optimizer: The optimizer, possibly wrapped by Accelerate or DeepSpeed; None leaves its state alone.

    Example:
        >>> param = nn.Parameter(torch.ones(2, 3))
        >>> zero_rows(param, active=torch.tensor([True, False]))
        >>> param.tolist()
        [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """
    with _gathered(param, modifier_rank=0):
        _keep_rows(param.data, active)
    states = getattr(optimizer, "state", {})
    for state in states.get(param, {}).values():
        if isinstance(state, torch.Tensor) and state.shape == param.shape:
            _keep_rows(state, active)
    if is_partitioned_by_zero(param):
        _zero_rows_of_partitions(param, active, states)


def _keep_rows(tensor: torch.Tensor, active: torch.Tensor) -> None:
    rows = per_row(active.to(tensor.device), tensor).expand(tensor.shape)
    if is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        rows = distribute_tensor(rows.contiguous(), tensor.device_mesh, tensor.placements)
    tensor.copy_(torch.where(rows, tensor, 0))


def _zero_rows_of_partitions(param: nn.Parameter, active: torch.Tensor, states: dict[Any, dict[str, Any]]) -> None:
    """Zero the rows of the float32 copies that ZeRO keeps.

    DeepSpeed's own functions reach them; `optimizer.state` holds flat partitions.
    """
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    value = safe_get_full_fp32_param(param)
    _keep_rows(value, active)
    safe_set_full_fp32_param(param, value)
    keys = {k for state in states.values() for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()}
    for key in sorted(keys):  # on all processes in the same order
        value = safe_get_full_optimizer_state(param, key)
        _keep_rows(value, active)
        safe_set_full_optimizer_state(param, value, key)


@contextmanager
def _gathered(param: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
    """Have a parameter of ZeRO 3 put together inside the block; what `modifier_rank` writes to it there is kept."""
    if not hasattr(param, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], modifier_rank=modifier_rank):
        yield
