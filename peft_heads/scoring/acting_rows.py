"""The rows of a linear layer as they act, with an adapter's update."""

from __future__ import annotations

import torch
from torch import nn

from ..functional.sharding import whole, whole_value
from ..heads.traversal import unwrapped


@torch.no_grad()
def row_norms(name: str, layer: nn.Module, adapter_name: str) -> torch.Tensor:
    """L2 norm of each row of a layer's weight: the base weight plus the update of an adapter that is not merged.

    Args:
        name: The layer's name, for messages.
        layer: A linear layer, plain or with adapters.
        adapter_name: The adapter; the layer need not have it.

    Returns:
        float64 (out_features,) on the CPU.

    Raises:
        ValueError: The weight is quantised, or the layer cannot say what the adapter adds to it.
    """
    base = unwrapped(layer)
    weight = whole_value(base.weight)
    if not weight.is_floating_point() or tuple(weight.shape) != (base.out_features, base.in_features):
        raise ValueError(
            f"the rows of {name} have no norms: its weight is {weight.dtype} {tuple(weight.shape)}; choose another criterion "
            "of neurons than weight_norm"
        )
    weight = weight.double().cpu()
    if _has_adapter(layer, adapter_name) and adapter_name not in layer.merged_adapters:
        if not hasattr(layer, "get_delta_weight"):
            raise ValueError(
                f"the rows of {name} have no norms: {type(layer).__name__} does not say what adapter {adapter_name!r} adds "
                "to the weight (get_delta_weight); choose another criterion of neurons than weight_norm"
            )
        weight += whole(layer.get_delta_weight(adapter_name)).double().cpu()
    return weight.norm(dim=1)


def _has_adapter(layer: nn.Module, adapter_name: str) -> bool:
    """Whether a layer has something of an adapter, as PEFT's layers list it."""
    kinds = (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ()))
    places = (getattr(layer, kind, None) for kind in kinds)
    return any(
        isinstance(place, (dict, nn.ModuleDict, nn.ParameterDict)) and adapter_name in place for place in places
    )
