"""A model's modules without numbers: an adapter is tried on them before the model is changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..._compat.torch import replace_contents, shell_of
from ..._compat.transformers import forget_adapters


def skeleton_of(model: nn.Module) -> nn.Module:
    """The base model without adapters, each module a shell with everything that the original has except numbers and hooks.

    Parameters and buffers are on the meta device and take no memory; those of classes of their own (quantised or
    sharded weights) are the original's. What else hangs on the modules is shared, the model's configuration is a copy.
    """
    shell = _shell(model, {})
    forget_adapters(shell)
    if "config" in vars(shell):
        shell.config = copy.deepcopy(shell.config)
    return shell


def _shell(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """`known`: what originals have become, by id, so that what is tied stays tied."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    while isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if id(module) in known:
        return known[id(module)]
    shell = known[id(module)] = shell_of(module)
    replace_contents(shell, lambda tensor: _meta(tensor, known), lambda child: _shell(child, known))
    return shell


def _meta(tensor: torch.Tensor, known: dict[int, Any]) -> torch.Tensor:
    is_plain = type(tensor) in (nn.Parameter, torch.Tensor) and type(tensor.data) is torch.Tensor
    if id(tensor) not in known:
        if not is_plain:
            known[id(tensor)] = tensor
        else:
            numbers = torch.empty_like(tensor.data, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(numbers, tensor.requires_grad) if is_parameter else numbers
    return known[id(tensor)]
