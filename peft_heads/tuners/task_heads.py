"""Trained heads (`modules_to_save`) of different sizes, and label names, of several adapters on one model.

PEFT copies the base model's head for every adapter and fails to load a file with another number of classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


def fit_task_heads(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> int | None:
    """Give the adapter's copies of the trained modules as many outputs as `state_dict` has for them.

    Only output sizes are changed, of linear layers and convolutions; PEFT reports any other mismatch.

    Args:
        model: The model with the adapter in it.
        adapter_name: The adapter that is being loaded.
        state_dict: Its weights, by the names they have in the model.

    Returns:
        The new number of outputs; None if everything fits already.
    """
    outputs = None
    for name, wrapper in _wrappers(model):
        if adapter_name not in wrapper.modules_to_save:
            continue
        for inner, module in wrapper.modules_to_save[adapter_name].named_modules():
            prefix = ".".join(filter(None, [name, "modules_to_save", adapter_name, inner]))
            saved = state_dict.get(f"{prefix}.weight")
            if saved is None or not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            if saved.shape[0] == module.weight.shape[0]:
                continue
            outputs = saved.shape[0]
            for parameter_name, param in list(module.named_parameters(recurse=False)):
                resized = param.new_empty(outputs, *param.shape[1:])
                setattr(module, parameter_name, nn.Parameter(resized, requires_grad=param.requires_grad))
            setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", outputs)
    return outputs


def check_mixed_batch(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Raise ValueError if the adapters of a mixed batch have trained heads of different sizes.

    Their outputs would not fit into one tensor.
    """
    for name, wrapper in _wrappers(model):
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for adapter_name in dict.fromkeys(adapter_names):
            in_base = adapter_name == "__base__"
            module = wrapper.original_module if in_base else wrapper.modules_to_save[adapter_name]
            shapes[adapter_name] = [tuple(param.shape) for param in module.parameters()]
        if len({str(shape) for shape in shapes.values()}) > 1:
            sizes = ", ".join(f"{adapter} {shape[-1][0]}" for adapter, shape in shapes.items() if shape)
            raise ValueError(
                f"a mixed batch needs adapters whose trained heads have the same size, but the outputs of {name} are: "
                f"{sizes}; predict with one adapter at a time (set_adapter)"
            )


def get_labels(base_model: nn.Module) -> dict[int, str] | None:
    """Label names in a model's configuration; None where it has none."""
    labels = getattr(getattr(base_model, "config", None), "id2label", None)
    return dict(labels) if labels else None


def set_labels(base_model: nn.Module, id2label: dict[int, str] | None) -> None:
    """Let a model's configuration name these labels, from which transformers takes the number of classes as well."""
    if id2label and get_labels(base_model):
        base_model.config.id2label = dict(id2label)
        base_model.config.label2id = {label: index for index, label in id2label.items()}
        if hasattr(base_model, "num_labels"):
            base_model.num_labels = len(id2label)


def default_labels(num_labels: int) -> dict[int, str]:
    """The names that transformers gives to labels without names."""
    return {index: f"LABEL_{index}" for index in range(num_labels)}


def _wrappers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
