"""Modules that are as large as the number of labels: what a new task must train, wherever in a model it lies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from ..heads.traversal import own_modules


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = (nn.Linear, *_CONVOLUTIONS, nn.Embedding)


def label_sized_modules(model: nn.Module, heads: Iterable[str]) -> tuple[list[str], list[str]]:
    """Modules of a model of transformers that depend on the number of labels, and lie in none of the known heads.

    Which they are is seen by building the model on the meta device for one label more. It is not built where its
    heads have a layer of that size, and no other module has.

    Args:
        model: The model, plain or with adapters in it.
        heads: Names of its known heads.

    Returns:
        Names of the modules that can be trained in full, and of parameters that lie in a module with other modules.
    """
    known = tuple(f"{head}." for head in heads)
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    if not isinstance(num_labels, int) or num_labels < 1:
        return [], []
    sized = [f"{name}." for name in _sized(model, {num_labels, num_labels + 1})]
    if any(name.startswith(known) for name in sized) and all(name.startswith(known) for name in sized):
        return [], []
    parameters = [name for name in _dependent_parameters(model, num_labels) if not name.startswith(known or ("\0",))]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    shared = {name for name in modules if any(True for _ in _own(model.get_submodule(name)).children())}
    return (
        [name for name in modules if name not in shared],
        [name for name in parameters if name.rpartition(".")[0] in shared],
    )


def is_loss(module: nn.Module) -> bool:
    """Whether a module computes a loss; its parameters (a temperature) are no task's classifier."""
    return type(module).__name__.endswith(("Loss", "Criterion"))


def _sized(model: nn.Module, sizes: set[int]) -> list[str]:
    """Layers with so many outputs, or entries; what adapters have put inside is left out."""
    found: dict[str, None] = {}
    inside: tuple[str, ...] = ("\0",)
    for name, module in own_modules(model):
        if name.startswith(inside):
            continue
        if hasattr(module, "base_layer"):
            inside += (f"{name}.",)
            module = module.base_layer
        if isinstance(module, _KINDS) and module.weight.shape[0] in sizes:
            found[name.partition(".original_module")[0].partition(".modules_to_save.")[0]] = None
    return list(found)


def _dependent_parameters(model: nn.Module, num_labels: int) -> list[str]:
    """Names of the parameters whose shape depends on the number of labels; empty if the model cannot be built again."""
    shapes = []
    for number in (num_labels, num_labels + 1):
        config = copy.deepcopy(model.config)
        config.num_labels = number
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False  # nothing is to be downloaded
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built = type(model)(config)
        except Exception:  # whatever a class does when it is built: there is nothing to be learned from it then
            return []
        shapes.append({name: param.shape for name, param in built.named_parameters()})
    return [name for name, shape in shapes[0].items() if shapes[1].get(name, shape) != shape]


def _own(module: nn.Module) -> nn.Module:
    """The model's own module under what adapters have put around it."""
    return getattr(module, "original_module", getattr(module, "base_layer", module))
