"""How an ordinary checkpoint holds a merged model: what becomes of biases that its layers did not have."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...heads.blocks import following_batch_norm
from ...heads.resolve import PROJECTION_ROLES
from ..targets import module_patterns
from .base_layer import RLRRLayer


# Attention layers whose scores are softmax(q·k) of the projections as they are, and which leave the bias of the keys
# out for that reason: q·(k + f) = q·k + q·f, and what all keys have in common does not change a softmax. (Not where
# keys are normalised, as SwinV2's are, or rotated.)
_SHIFT_INVARIANT = ("Beit", "Data2VecVision")


@dataclass
class Folding:
    """What becomes of new biases, by module names.

    Attributes:
        dropped: Biases that change nothing.
        batch_norms: Those that the running mean of a batch norm takes, and the name of the latter.
        zeros: Modules that get a bias of zeros, since the checkpoint format has biases for all or none.
        settings: Settings of the model's configuration that ask for the biases.
        homeless: Biases for which there is no place.
    """

    dropped: list[str] = field(default_factory=list)
    batch_norms: dict[str, str] = field(default_factory=dict)
    zeros: list[str] = field(default_factory=list)
    settings: dict[str, bool] = field(default_factory=dict)
    homeless: list[str] = field(default_factory=list)

    def no_place(self, model: nn.Module) -> str:
        """The beginning of a message about biases for which there is no place."""
        return (
            f"{module_patterns(self.homeless)}: there is no bias in the checkpoint format of {type(model).__name__} "
            "(expected one, for the trained shift f of RLRR)"
        )


def plan_folding(model: nn.Module, names: Iterable[str]) -> Folding:
    """Find a place for biases in the checkpoint format of a model.

    Args:
        model: The base model, possibly with adapters in it; nothing is changed.
        names: Modules that have no bias and get one.
    """
    names, plan = list(names), Folding()
    config = getattr(model, "config", None)
    if not names or config is None or not hasattr(model, "save_pretrained"):
        return plan  # a plain module has no format but its own
    plan.dropped = [name for name in names if _is_shift_invariant(model, name)]
    there = _parameters(model, config)
    homeless = {f"{name}.bias" for name in names if name not in plan.dropped} - there
    for setting, value in config.to_dict().items() if homeless else ():
        if setting.endswith("bias") and value is False:
            added = _parameters(model, config, **{setting: True}) - there
            others = [key.removesuffix(".bias") for key in added - homeless]
            if added & homeless and all(_could_have_bias(model, name) for name in others):
                plan.settings[setting] = True
                plan.zeros += others
                homeless -= added
    for name in names:
        if f"{name}.bias" in homeless:
            norm = following_batch_norm(model, name)
            if norm is None:
                plan.homeless.append(name)
            else:
                plan.batch_norms[name] = norm
    return plan


def plan_merging(model: nn.Module, adapter_names: list[str]) -> Folding:
    """Find out, before anything is changed, how a model can be saved into which adapters are merged.

    Args:
        model: The base model with RLRR layers in it.
        adapter_names: The adapters that are going to be merged, beside those that are.

    Raises:
        ValueError: A layer gets a bias for which the checkpoint has no place.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, RLRRLayer)}
    shifts = {name: _new_bias(layer, adapter_names) for name, layer in layers.items()}
    unused = [name for name, shift in shifts.items() if shift is not None and not shift]
    plan = plan_folding(model, [name for name, shift in shifts.items() if shift])
    plan.dropped += unused
    if plan.homeless:
        raise ValueError(
            f"{plan.no_place(model)}, so that a merged checkpoint would lose it. Keep the adapter as an adapter, use "
            "merge_adapter() in memory, or train with RLRRConfig(shift_without_bias=False)"
        )
    return plan


@torch.no_grad()
def fold(model: nn.Module, plan: Folding) -> None:
    """Bring a merged model, out of which the adapters have been taken, into its checkpoint format."""
    for name, norm in plan.batch_norms.items():
        model.get_submodule(norm).running_mean -= model.get_submodule(name).bias
    for name in (*plan.dropped, *plan.batch_norms):
        model.get_submodule(name).bias = None
    for name in plan.zeros:
        module = model.get_submodule(name)
        module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), requires_grad=False)
    for setting, value in plan.settings.items():
        setattr(model.config, setting, value)


def _new_bias(layer: RLRRLayer, adapter_names: list[str]) -> bool | None:
    """Whether the bias that a layer gets is something else than zeros; None if it has one already or gets none."""
    names = dict.fromkeys((*adapter_names, *layer.merged_adapters))
    shifts = [layer.rlrr_shift[name] for name in names if name in layer.rlrr_shift]
    if not shifts or layer.frozen_bias() is not None:
        return None
    return any(bool(shift.any()) for shift in shifts)


def _is_shift_invariant(model: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return PROJECTION_ROLES.get(child) == "key" and type(model.get_submodule(parent)).__name__.startswith(
        _SHIFT_INVARIANT
    )


def _could_have_bias(model: nn.Module, name: str) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # what is added is no bias at all
        return False
    module = module.get_base_layer() if isinstance(module, RLRRLayer) else module
    return isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is None


def _parameters(model: nn.Module, config: Any, **settings: Any) -> set[str]:
    """Names of what a new model of the same class has, which is what a checkpoint is loaded into."""
    config = copy.deepcopy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return set(type(model)(config).state_dict())
