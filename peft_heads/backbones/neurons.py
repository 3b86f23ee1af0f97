"""The MLPs of a model whose neurons can be switched off: which these are, and why others cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..heads.traversal import own_modules, unwrapped
from .blocks import Block, whole_blocks
from .empty_models import image_config
from .units import neurons_of


WAY_OUT = "leave neuron_ratio and target_speed out"
# What may stand in an MLP beside its linear layers and its activation: it maps 0 to 0.
_HARMLESS = (nn.Dropout, nn.Identity, nn.Linear)


def neuron_projections(model: nn.Module) -> dict[str, int]:
    """`{first layer of an MLP: number of its neurons}` of all blocks, in the model's order.

    A neuron is an output of the first of two linear layers, with an activation between them that maps 0 to 0: nothing
    of a neuron remains then if its row and its bias are zero.

    Args:
        model: The model, plain or with adapters in it.

    Raises:
        ValueError: A block has no such MLP; the message names it.
    """
    try:
        blocks = whole_blocks(model)
    except ValueError as error:
        raise ValueError(
            f"MLP neurons can be switched off in blocks of attention and MLP alone: {error}; {WAY_OUT}"
        ) from error
    modules = {name: unwrapped(module) for name, module in own_modules(model)}
    return {block.mlp_layers[0]: _num_neurons(model, modules, block) for block in blocks}


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether PEFT's plain LoRA layer is what the module gets; quantised layers often subclass `nn.Linear`."""
    return type(layer) is nn.Linear and type(layer.weight.data) is torch.Tensor


def _num_neurons(model: nn.Module, modules: dict[str, nn.Module], block: Block) -> int:
    layers = {name: modules[name] for name in block.mlp_layers}
    for name, layer in layers.items():
        if not is_plain_linear(layer):
            raise ValueError(
                f"{name} is a {type(layer).__name__} with weights of type {type(layer.weight).__name__}, for which neuron "
                f"masks are not implemented (expected torch.nn.Linear); load the model without quantization, or {WAY_OUT}"
            )
    first, *_, last = layers
    shapes = ", ".join(f"{name} {layer.in_features} → {layer.out_features}" for name, layer in layers.items())
    num_neurons, _ = neurons_of(model, block)
    if not num_neurons:
        raise ValueError(
            f"the MLP of {block.name} is gated, or has other layers than neuron masks know ({shapes}; expected two linear "
            f"layers, the second with as many inputs as the first has outputs); {WAY_OUT}"
        )
    activations = _activations(model, modules, block)
    if not activations:
        raise ValueError(
            f"no activation was found between {first} and {last} (expected a module, an attribute such as `act`, or "
            f"hidden_act in the model's configuration), so that nobody knows whether it maps 0 to 0; {WAY_OUT}"
        )
    for name, activation in activations.items():
        value = _at_zero(activation)
        if value != 0:
            raise ValueError(
                f"{name} ({_kind(activation)}) stands in the MLP between {first} and {last} and "
                f"{'does not work on single numbers' if value is None else f'maps 0 to {value:.3g}'} (expected an "
                f"activation that maps 0 to 0: GELU, QuickGELU, ReLU, SiLU), so that something of a neuron would remain "
                f"that is off; {WAY_OUT}"
            )
    return num_neurons


def _activations(model: nn.Module, modules: dict[str, nn.Module], block: Block) -> dict[str, Callable]:
    """What stands in an MLP beside its linear layers, by name; else what the configuration says."""
    found: dict[str, Callable] = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in block.mlp_layers):
        children = dict(modules[parent].named_children())
        functions = {key: value for key, value in vars(modules[parent]).items() if "act" in key and callable(value)}
        if parent == block.name:  # beside the MLP there are the attention layer and the norms
            children = {key: child for key, child in children.items() if "act" in key}
        candidates = {key: unwrapped(child) for key, child in children.items()} | functions
        found |= {
            f"{parent}.{key}": candidate
            for key, candidate in candidates.items()
            if not isinstance(candidate, _HARMLESS)
        }
    if not found:
        named = getattr(image_config(getattr(model, "config", None)), "hidden_act", None)
        if callable(named) or named in ACT2FN:
            found["hidden_act"] = named if callable(named) else ACT2FN[named]
    return found


@torch.no_grad()
def _at_zero(activation: Callable) -> float | None:
    """What an activation makes of 0; None if it cannot be applied to single numbers."""
    parameter = next(iter(activation.parameters()), None) if isinstance(activation, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "meta":
        return 0.0  # a skeleton; the model itself was, or is going to be, looked at
    try:
        value = activation(torch.zeros(1, device=device))
    except Exception:  # whatever stands there
        return None
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else None


def _kind(activation: Any) -> str:
    return type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "?")
