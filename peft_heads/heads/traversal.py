"""A model's own modules by name, however many adapters stand on it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


# What the wrappers of PEFT keep of the model, beside the adapters' parts.
_WRAPPED = ("base_layer", "original_module")


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model and its modules, as `named_modules` names them, without the adapters' parts.

    Of a layer that an adapter wraps, the wrapper and its `base_layer` come; of a module that is trained in full, the
    wrapper and its `original_module`. What the adapters have put beside these is not visited, so that the effort does
    not grow with the number of adapters.
    """
    return ((name, module) for name, module, _ in _walk(model))


def named_targets(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that an adapter can have for targets: all but the model itself and what lies in a wrapped layer."""
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
        children = {key: child for key, child in module._modules.items() if child is not None}
        if hasattr(type(module), "adapter_layer_names"):  # of PEFT's layers and of its wrappers of whole modules
            children = {key: children[key] for key in _WRAPPED if key in children} or children
            is_inside = is_inside or "base_layer" in children
        stack += [
            (f"{name}.{key}" if name else key, child, is_inside) for key, child in reversed(list(children.items()))
        ]
