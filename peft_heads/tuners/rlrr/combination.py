"""Linear combination of several adapters."""

from __future__ import annotations

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ...heads.traversal import own_modules
from .base_layer import RLRRLayer
from .config import RLRRConfig
from .layer import RLRRLinear


def check_summands(model: nn.Module, configs: dict[str, RLRRConfig], adapters: list[str]) -> None:
    """Raise ValueError unless adapters can be combined linearly."""
    for option in ("r", "left", "right", "residual", "rescale_weight", "patch_embedding", "shift_without_bias"):
        values = {name: getattr(configs[name], option) for name in adapters}
        if len(set(values.values())) > 1:
            raise ValueError(f"adapters with different {option} cannot be combined: {values}")
    if not configs[adapters[0]].residual:
        raise ValueError(
            "adapters with residual=False cannot be combined: their factors are no change of the weight, but all of it"
        )
    for name, wrapper in own_modules(model):
        if isinstance(wrapper, ModulesToSaveWrapper) and sum(a in wrapper.modules_to_save for a in adapters) > 1:
            raise ValueError(
                f"Cannot add weighted adapters if they target the same module with modules_to_save: {name}; pass "
                "modules_to_save=[], or combine the trained heads yourself"
            )
    for name, layer in own_modules(model):
        if isinstance(layer, RLRRLinear):
            layouts = {layer.head_layout[a] for a in adapters if a in layer.rlrr_head_mask}
            if len(layouts) > 1:
                raise ValueError(
                    f"adapters with other heads (num_heads) cannot be combined; in {name} they have "
                    f"{' and '.join(map(str, layouts))}"
                )


def modules_of(model: nn.Module, adapters: list[str]) -> set[str]:
    """Names of the modules that any of the adapters has."""
    return {
        name
        for name, layer in own_modules(model)
        if isinstance(layer, RLRRLayer) and any(layer.has_adapter(adapter) for adapter in adapters)
    }


def sum_into(layer: RLRRLayer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Write the combination of adapters into `adapter_name` of a layer that has it."""
    summands = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if layer.has_adapter(name)]
    # what deactivated heads have is not added: zeros in its place change no adapter
    rows = getattr(layer, "mask_rows", lambda _, tensor: tensor)
    with torch.no_grad():
        for key in layer.adapter_layer_names:
            params = getattr(layer, key)
            if adapter_name not in params:
                continue
            by_head = key in ("rlrr_left", "rlrr_shift")
            total = torch.zeros_like(params[adapter_name])
            for name, weight in summands:
                if name in params:
                    tensor = rows(name, params[name]) if by_head else params[name]
                    total += weight * tensor
            params[adapter_name].copy_(total)
    masks = [layer.get_head_mask(name) for name, _ in summands if name in layer.head_layout]
    if adapter_name in layer.rlrr_head_mask and masks:
        layer.set_head_mask(adapter_name, torch.stack([mask.cpu() for mask in masks]).any(dim=0))
