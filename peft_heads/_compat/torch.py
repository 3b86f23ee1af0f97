"""Facts about torch: private names, and what it does to hooks, compiled models and transforms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn


# The attribute of a compiled model, and the part of its modules' names, that leads to the model itself.
COMPILED = "_orig_mod"


def run_while_tracing(function: Callable) -> Callable:
    """Let `torch.compile` run a function once, while it traces, and put its result into the compiled code.

    As `torch.compiler.assume_constant_result` does, which imports torch's compiler, whether it is wanted or not.

    Delete when importing that does not take a second (torch 2.14).
    """
    function._dynamo_marked_constant = True
    return function


def must_be_called(module: nn.Module) -> bool:
    """Whether something waits for a call of the module itself, so that its weight must not be used without one.

    A hook, which may gather, cast or move the weight (FSDP, layerwise casting), or a `forward` in its place
    (Accelerate's offloading). The names of the hooks are private to torch; delete when it has a public way to ask.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)


def transforms_are_active() -> bool:
    """Whether a transform of `torch.func` (`vmap`, `grad`, …) is going on.

    Delete when torch has a public function for it.
    """
    return torch._C._are_functorch_transforms_active()


def tensor_version(tensor: torch.Tensor) -> int:
    """A number that changes with every write into a tensor, unless it goes through `data`.

    Delete when torch has a public name for it.
    """
    return tensor._version


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` has wrapped, or the model itself.

    Delete, together with `COMPILED`, when torch has a public name for it.
    """
    return getattr(model, COMPILED, model)


def forward_hooks(module: nn.Module) -> list[Callable]:
    """The forward hooks that are registered on a module.

    Delete when torch lists them.
    """
    return list(module._forward_hooks.values())


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """The modules directly inside a module, by name, each as often as it is there.

    Delete when `named_children` takes no longer: loading an adapter asks for thousands of them.
    """
    return {name: child for name, child in module._modules.items() if child is not None}


def shell_of(module: nn.Module) -> nn.Module:
    """A module of the same class with the same attributes and contents, but without hooks.

    Delete, together with `replace_contents`, when torch copies a module onto the meta device.
    """
    shell = object.__new__(type(module))
    for name, value in vars(module).items():
        # torch keeps hooks in dicts, ordered or not, whose names end so
        is_hooks = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict)
        vars(shell)[name] = OrderedDict() if is_hooks else value
    return shell


def replace_contents(module: nn.Module, new_tensor: Callable, new_child: Callable) -> None:
    """Replace what a shell holds: parameters and buffers by `new_tensor(old)`, modules by `new_child(old)`."""
    for kind, new in (("_parameters", new_tensor), ("_buffers", new_tensor), ("_modules", new_child)):
        vars(module)[kind] = {name: None if old is None else new(old) for name, old in vars(module)[kind].items()}


def is_partitioned_by_zero(param: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps the float32 numbers of a parameter in parts: by ZeRO 3, or by ZeRO 1 and 2.

    Delete when DeepSpeed has a public function for it.
    """
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def backward_pass() -> int:
    """A number of the backward pass that is going on, different for each; -1 outside of one.

    Delete when torch has a public name for it.
    """
    return torch._C._current_graph_task_id()


def device_with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU if the device has no float64.

    Delete when torch has float64 on MPS.
    """
    return torch.device("cpu") if device.type == "mps" else device
