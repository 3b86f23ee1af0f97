"""Finds layers that the module around them never calls, because it reads their weight: no adapter can work there."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..heads.detect import FUSED_PROJECTIONS


# Modules that are never called themselves: the module around them calls what they hold.
UNCALLED = (nn.ModuleList, nn.ModuleDict)
# Attributes of a weight that code reads without computing with the weight.
_DESCRIPTIONS = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_meta", "is_cuda"}


@dataclass(frozen=True)
class ChildUses:
    """How the code of a module's class uses its children; all empty where the source is not at hand.

    Attributes:
        read: Children whose weight it computes with.
        called: Children that it calls.
        called_once: Those among them that it calls at one place only.
        forwarded: Children whose `forward` it calls, past the hooks.
        passed: Children that it hands to something else, which may do any of these.
    """

    read: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()
    called_once: frozenset[str] = frozenset()
    forwarded: frozenset[str] = frozenset()
    passed: frozenset[str] = frozenset()

    @property
    def only_read(self) -> frozenset[str]:
        return self.read - self.called - self.forwarded - self.passed


def bypassed_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The names among these of modules that the module around them never calls, because it reads their weight.

    Its code shows that (torchvision's Swin, VideoMAE before transformers 5, `out_proj` of `nn.MultiheadAttention`), or an
    attribute on which that depends (timm's BEiT, EVA and Swin V2, which keep the bias of q and v apart), or torch has
    a fast path for it (`nn.TransformerEncoderLayer` in evaluation mode).
    """
    return [name for name in names if _is_bypassed(model.get_submodule(name.rpartition(".")[0]), name)]


@functools.cache
def child_uses(module_class: type[nn.Module]) -> ChildUses:
    """How a class of modules uses its children, by its own code and that of its base classes.

    Example:
        >>> sorted(child_uses(nn.MultiheadAttention).only_read)
        ['out_proj']
    """
    found: dict[str, Counter[str]] = {use: Counter() for use in ("read", "called", "forwarded", "passed")}
    for base in module_class.__mro__[: module_class.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            if name == "__init__" or not inspect.isfunction(function):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):
                return ChildUses()  # the code that cannot be read may call any child
            for use, child in _uses(tree):
                # a weight that another method reads does not matter: that method may fold weights, say
                if use != "read" or name == "forward":
                    found[use][child] += 1
    called_once = frozenset(child for child, places in found["called"].items() if places == 1)
    return ChildUses(**{use: frozenset(children) for use, children in found.items()}, called_once=called_once)


def _is_bypassed(owner: nn.Module, name: str) -> bool:
    child = name.rpartition(".")[2]
    if isinstance(owner, nn.TransformerEncoderLayer) and has_fast_path(owner):
        return True
    if (
        child in FUSED_PROJECTIONS
        and getattr(owner, "q_bias", None) is not None
        and not getattr(owner, "qkv_bias_separate", False)
    ):
        return True
    if "forward" in vars(owner):  # it is replaced on this module, and the class does not show what it does
        return False
    return child in child_uses(type(owner)).only_read


def has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether torch computes the whole layer from its weights while it is in evaluation mode."""
    can = bool(layer.self_attn.batch_first and layer.activation_relu_or_gelu)
    return can and torch.backends.mha.get_fastpath_enabled()


def _uses(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """`(use, name of the child)` of every `self.name` in a method that is read."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in parents:
        use = _use(node, parents) if _is_child(node) else None
        if use is not None:
            yield use, node.attr


def _is_child(node: ast.AST) -> bool:
    """`self.something`, read."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _use(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> str | None:
    """How `self.something` is used; None if that does not show whether it is called."""
    parent = parents[node]
    if isinstance(parent, ast.Call) and parent.func is node:
        return "called"
    if not isinstance(parent, ast.Attribute):
        return "passed"
    if parent.attr == "weight":
        around = parents.get(parent)
        is_description = isinstance(around, ast.Attribute) and around.attr in _DESCRIPTIONS
        is_written = not isinstance(parent.ctx, ast.Load) or isinstance(around, ast.Expr)
        return None if is_description or is_written else "read"
    return "forwarded" if parent.attr in ("forward", "__call__") else None
