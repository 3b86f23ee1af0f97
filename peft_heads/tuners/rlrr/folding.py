"""Whether an ordinary checkpoint can hold a merged model: biases that its layers did not have."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...heads.resolve import PROJECTION_ROLES
from ..targets import module_patterns
from .base_layer import RLRRLayer


# Attention layers whose scores are softmax(q·k) of the projections as they are, and which leave the bias of the keys
# out for that reason: q·(k + f) = q·k + q·f, and what all keys have in common does not change a softmax. (Not where
# keys are normalised, as SwinV2's are, or rotated.)
_SHIFT_INVARIANT = ("Beit", "Data2VecVision")


def check_foldable(model: nn.Module, adapter_names: list[str]) -> tuple[list[RLRRLayer], dict[str, Any]]:
    """Find out, before anything is changed, how a merged model can be saved.

    Args:
        model: The base model with RLRR layers in it.
        adapter_names: The adapters that are going to be merged.

    Returns:
        Layers whose shift changes nothing and is to be left out, and settings of the model's configuration that have
        to change so that it asks for the biases that are there.

    Raises:
        ValueError: A layer gets a bias for which the checkpoint has no place.
    """
    new = {name: layer for name, layer in model.named_modules() if _gets_bias(layer, adapter_names)}
    useless = [n for n, layer in new.items() if _is_shift_invariant(model, n) or not _shifts(layer, adapter_names)]
    dropped = [new.pop(name) for name in useless]
    config = getattr(model, "config", None)
    if not new or config is None or not hasattr(model, "save_pretrained"):
        return dropped, {}  # a plain module has no format but its own
    there = _parameters(model, config)
    missing = {f"{name}.bias" for name in new} - there
    changes = {}
    for setting, value in config.to_dict().items() if missing else ():
        if setting.endswith("bias") and value is False:
            added = _parameters(model, config, **{setting: True}) - there
            if added and added <= missing:  # a bias too many would be random
                changes[setting] = True
                missing -= added
    if missing:
        names = [name for name in new if f"{name}.bias" in missing]
        raise ValueError(
            f"{module_patterns(names)}: there is no bias in the checkpoint format of {type(model).__name__} (expected "
            "one, for the trained shift f of RLRR), so that a merged checkpoint would lose it. Keep the adapter as an "
            "adapter, use merge_adapter() in memory, or train with RLRRConfig(shift_without_bias=False)"
        )
    return dropped, changes


def fold_into_config(model: nn.Module, changes: dict[str, Any]) -> None:
    """Let a merged model's configuration ask for the biases that its layers have now."""
    for name, value in changes.items():
        setattr(model.config, name, value)


def _gets_bias(layer: nn.Module, adapter_names: list[str]) -> bool:
    """Whether merging gives a layer a bias that it has not."""
    if not isinstance(layer, RLRRLayer) or layer.frozen_bias() is not None:
        return False
    return any(name in layer.rlrr_shift for name in adapter_names)


def _shifts(layer: RLRRLayer, adapter_names: list[str]) -> bool:
    """Whether any of the adapters' shifts is something else than zeros."""
    return any(bool(layer.rlrr_shift[name].any()) for name in adapter_names if name in layer.rlrr_shift)


def _is_shift_invariant(model: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return PROJECTION_ROLES.get(child) == "key" and type(model.get_submodule(parent)).__name__.startswith(
        _SHIFT_INVARIANT
    )


def _parameters(model: nn.Module, config: Any, **settings: Any) -> set[str]:
    """Names of what a new model of the same class has, which is what a checkpoint is loaded into."""
    config = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return set(type(model)(config).state_dict())
