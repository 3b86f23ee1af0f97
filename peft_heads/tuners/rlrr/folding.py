"""How an ordinary checkpoint can hold a merged model, whose layers have got biases that they did not have."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...backbones.norms import following_batch_norm
from ...heads.detect import PROJECTION_ROLES
from ...heads.traversal import own_modules
from .base_layer import RLRRLayer


# Attention layers whose keys need no bias, because it would change nothing: q·(k + f) = q·k + q·f, and a softmax does
# not depend on what all keys have in common. (It does matter where keys are normalised, as in SwinV2, or rotated.)
_SHIFT_INVARIANT = ("Beit", "Data2VecVision")


@dataclass
class Folding:
    """The plan for new biases, by module names.

    Attributes:
        dropped: Biases that change nothing.
        batch_norms: Biases that move into the running mean of a batch norm, and the names of these.
        settings: Settings of the model's configuration that ask for biases.
        completed: Other modules that get a bias by these settings; zeros, unless an adapter has another for them.
        without_place: Biases for which the checkpoint format has no place, or no known place.
        why: Reason why they have none, for a message.
    """

    dropped: list[str] = field(default_factory=list)
    batch_norms: dict[str, str] = field(default_factory=dict)
    settings: dict[str, bool] = field(default_factory=dict)
    completed: list[str] = field(default_factory=list)
    without_place: list[str] = field(default_factory=list)
    why: str = ""


def plan_folding(model: nn.Module, names: Iterable[str]) -> Folding:
    """Find a place for biases in the checkpoint format of a model.

    Args:
        model: The base model, possibly with adapters in it; nothing is changed.
        names: Modules that have no bias of their own and get one.
    """
    names, plan = list(names), Folding()
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return plan  # a plain module is saved as it is
    plan.dropped = [name for name in names if _is_shift_invariant(model, name)]
    plan.batch_norms = {name: norm for name in names if (norm := following_batch_norm(model, name)) is not None}
    wanted = {f"{name}.bias": name for name in names if name not in plan.dropped and name not in plan.batch_norms}
    if not wanted:
        return plan
    try:
        there = _parameters(model)
        for setting, value in model.config.to_dict().items():
            if setting.endswith("bias") and value is False and not wanted.keys() <= there:
                added = _parameters(model, **{setting: True}) - there
                others = [key.removesuffix(".bias") for key in added - wanted.keys()]
                if added & wanted.keys() and all(_could_have_bias(model, name) for name in others):
                    plan.settings[setting] = True
                    plan.completed += others
                    there |= added
    except Exception as error:  # a model may do anything when it is built
        there = set()
        plan.why = (
            f"whether there is a place for a bias in the checkpoint format of {type(model).__name__} is not known, since "
            f"it cannot be built of its configuration alone ({error!r})"
        )
    else:
        plan.why = f"there is no place for a bias in the checkpoint format of {type(model).__name__}"
    plan.without_place = [name for key, name in wanted.items() if key not in there]
    return plan


def plan_merging(model: nn.Module, adapter_names: list[str]) -> Folding:
    """Plan how a model can be saved after a merge, before anything is changed.

    Args:
        model: The base model with RLRR layers in it.
        adapter_names: Adapters that are to be merged, in addition to those that are merged already.
    """
    shifted, unshifted = [], []
    for name, layer in own_modules(model):
        if isinstance(layer, RLRRLayer) and layer.frozen_bias() is None:
            names = dict.fromkeys((*adapter_names, *layer.merged_adapters))
            shifts = [layer.rlrr_shift[name] for name in names if name in layer.rlrr_shift]
            if shifts:
                (shifted if any(shift.any() for shift in shifts) else unshifted).append(name)
    plan = plan_folding(model, shifted)
    plan.dropped += unshifted
    return plan


@torch.no_grad()
def fold(model: nn.Module, plan: Folding) -> None:
    """Bring a merged model, from which the adapters have been removed, into its checkpoint format."""
    for name, norm_name in plan.batch_norms.items():
        norm = model.get_submodule(norm_name)
        norm.running_mean = norm.running_mean - model.get_submodule(name).bias.to(norm.running_mean)
    for name in (*plan.dropped, *plan.batch_norms):
        model.get_submodule(name).bias = None
    for name in plan.completed:
        module = model.get_submodule(name)
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)), requires_grad=False)
    for setting, value in plan.settings.items():
        setattr(model.config, setting, value)


def _is_shift_invariant(model: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return PROJECTION_ROLES.get(child) == "key" and type(model.get_submodule(parent)).__name__.startswith(
        _SHIFT_INVARIANT
    )


def _could_have_bias(model: nn.Module, name: str) -> bool:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # the setting adds something else than a bias
        return False
    module = getattr(module, "original_module", module)  # of a module that is trained in full
    module = module.get_base_layer() if isinstance(module, RLRRLayer) else module
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _parameters(model: nn.Module, **settings: Any) -> set[str]:
    """Names of the tensors of a new model of the same class, into which a checkpoint is loaded."""
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return set(type(model)(config).state_dict())
