"""A model's own modules by name, however many adapters stand on it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .._compat.torch import children_of


# Names under which wrappers keep the model's own module, beside the adapters' parts.
_WRAPPED = ("base_layer", "original_module")


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model and its modules, as `named_modules` names them, without the adapters' parts.

    Where an adapter wraps a layer, the wrapper and its `base_layer` are visited; where a module is trained in full,
    the wrapper and its `original_module`. Whatever adapters have put beside these is left out, so that the effort
    does not grow with the number of adapters.
    """
    return ((name, module) for name, module, _ in _walk(model))


def named_targets(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that an adapter can target: all but the model itself and the insides of wrapped layers."""
    return ((name, module) for name, module, is_inside in _walk(model) if name and not is_inside)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model's own module under what adapters have put around it; itself if that is nothing."""
    return getattr(module, "original_module", getattr(module, "base_layer", module))


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """`(name, module, whether it lies in a layer that an adapter wraps)`."""
    seen: set[nn.Module] = set()
    stack = [("", model, False)]
    while stack:
        name, module, is_inside = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module, is_inside
        children = children_of(module)
        if hasattr(type(module), "adapter_layer_names"):  # of layers with adapters, and of wrappers of whole modules
            children = {key: children[key] for key in _WRAPPED if key in children} or children
            is_inside = is_inside or "base_layer" in children
        stack += [
            (f"{name}.{key}" if name else key, child, is_inside) for key, child in reversed(list(children.items()))
        ]
