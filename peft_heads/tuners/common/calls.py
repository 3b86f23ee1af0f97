"""Finds adapted layers that the module around them never calls: in the first forward pass, whatever the method."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..._compat.torch import forward_hooks, run_while_tracing
from ...backbones.bypass import UNCALLED, child_uses
from ...heads.detect import is_attention
from ...heads.traversal import own_modules


# Modules that hold others; an nn.Sequential is called, but knows nothing of what it holds.
_CONTAINERS = (*UNCALLED, nn.Sequential)


def watch_calls(model: nn.Module) -> None:
    """Let the first forward pass of every module with adapted layers raise ValueError if they cannot act.

    A layer of an attention module must be called in the first pass of that module. Of other modules a layer may be
    left out, as long as the module's code does not use it otherwise: nobody adds a norm that a configuration switches
    off. After the first pass nothing is left: no hook, no cost.

    Args:
        model: A model with adapters in it, of any method; layers that are watched already are left alone.
    """
    owners: dict[str, dict[str, BaseTunerLayer]] = {}
    inside: tuple[str, ...] = ()  # a layer in a layer is that layer's to use as it likes
    modules = dict(own_modules(model))
    for name, module in modules.items():
        if not isinstance(module, BaseTunerLayer) or name.startswith(inside or ("\0",)):
            continue
        inside += (f"{name}.",)
        if name and not hasattr(module, "_watched"):
            module._watched = True
            owners.setdefault(_owner_of(name, modules), {})[name] = module
    for owner_name, layers in owners.items():
        _watch(owner_name, modules[owner_name], layers)


class CallCheck:
    """The forward hook of a module with adapted layers, which raises ValueError if it has not called them.

    Under `torch.compile` it acts while the code is traced, and leaves nothing in it; it is removed by the first pass
    that is not compiled.

    Args:
        owner: The module's name, for the message.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.children: list[str] = []
        self.waiting: set[str] = set()
        self.handle: Any = None

    def __call__(self, owner: nn.Module, args: tuple, output: Any) -> None:
        # after unload() the module has its own layers again
        present = tuple(child for child in self.children if isinstance(_descendant(owner, child), BaseTunerLayer))
        bypassed = self.judge(present)
        if bypassed is not None:
            raise ValueError(bypassed)
        if not torch.compiler.is_compiling():
            self.handle.remove()

    def expect(self, child: str) -> None:
        """Name an adapted layer that must be called, as the module's attribute."""
        self.children.append(child)
        self.waiting.add(child)

    @run_while_tracing
    def note(self, child: str) -> None:
        """It has been called."""
        self.waiting.discard(child)

    @run_while_tracing
    def judge(self, present: tuple[str, ...]) -> str | None:
        """What is wrong with those adapted layers that are still there; None if nothing."""
        bypassed = sorted(self.waiting & set(present))
        if not bypassed:
            return None
        names = ", ".join(f"{self.owner}.{child}" if self.owner else child for child in bypassed)
        return (
            f"{names}: {self.owner or 'the model'} ran without calling this layer (expected a call; it reads the weight "
            "of the layer instead, or does not use it), so that the adapter there does nothing. Leave it out "
            f"(exclude_modules={bypassed}, or other target_modules), or take an implementation that calls it"
        )


class CallNote:
    """The forward pre-hook of an adapted layer, which tells the check of the module around it, and goes."""

    def __init__(self, check: CallCheck, child: str) -> None:
        self.check = check
        self.child = child
        self.handle: Any = None

    def __call__(self, layer: nn.Module, args: tuple) -> None:
        self.check.note(self.child)
        if not torch.compiler.is_compiling():
            self.handle.remove()


def _watch(owner_name: str, owner: nn.Module, layers: dict[str, BaseTunerLayer]) -> None:
    uses, must_call_all = child_uses(type(owner)), is_attention(owner)
    check = next((hook for hook in forward_hooks(owner) if isinstance(hook, CallCheck)), None)
    for name, layer in layers.items():
        child = name.removeprefix(f"{owner_name}.")
        if child in uses.forwarded:  # past the layer's hooks
            continue
        if not must_call_all and child not in uses.read | uses.passed:
            continue
        if check is None:
            check = CallCheck(owner_name)
            check.handle = owner.register_forward_hook(check)
        check.expect(child)
        note = CallNote(check, child)
        note.handle = layer.register_forward_pre_hook(note)


def _owner_of(name: str, modules: dict[str, nn.Module]) -> str:
    """The module that is to call a layer: the nearest around it that is no container."""
    owner = name.rpartition(".")[0]
    while owner and isinstance(modules[owner], _CONTAINERS):
        owner = owner.rpartition(".")[0]
    return owner


def _descendant(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module
