"""The neurons of MLPs that an adapter can switch off, and their masks. A neuron is a unit of one row."""

from __future__ import annotations

import torch
from torch import nn

from .layout import HeadLayout, ProjectionLayout
from .protocol import HeadMaskable, maskable_layers, module_patterns, read_masks, write_masks


# Names of the scores of neurons.
NEURON_CRITERIA = ("gate", "gate_signed", "gate_squared", "weight_norm", "random", "front", "most_responsive")


def neuron_layout(num_neurons: int) -> ProjectionLayout:
    """The layout of an MLP's first layer: each of its rows is a neuron.

    Example:
        >>> neuron_layout(3).deactivated_rows(torch.tensor([True, False, True])).tolist()
        [False, True, False]
    """
    return ProjectionLayout(num_neurons, (HeadLayout("neuron", num_neurons, head_dim=1),))


def neuron_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, HeadMaskable]:
    """`{module name in the base model: layer}` of the first MLP layers whose neurons an adapter can switch off.

    Raises:
        ValueError: The adapter has no neuron masks; the message lists the adapters that do.
    """
    found, others = maskable_layers(model, adapter_name, neurons=True)
    if not found:
        has = f"adapters with neuron masks: {', '.join(sorted(others))}" if others else "no adapter has any"
        raise ValueError(
            f"no MLP neuron of the model has a mask of adapter {adapter_name!r} ({has}); create the adapter with "
            "get_peft_model(model, HeadMaskedLoraConfig(neuron_ratio=...)), or with target_speed"
        )
    return found


def get_neuron_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The neuron masks of an adapter.

    Returns:
        `{first layer of an MLP: bool tensor (num_neurons,) on the CPU}`, True = active. A layer is named by its module
        in the base model.

    Raises:
        ValueError: The adapter has no neuron masks.
    """
    return read_masks(neuron_layers(model, adapter_name), adapter_name)


def set_neuron_masks(model: nn.Module, masks: dict[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Set neuron masks by hand; layers that `masks` leaves out keep theirs.

    Args:
        model: A model with an adapter that prunes neurons.
        masks: `{first layer of an MLP: bool tensor (num_neurons,)}`, True = active, named as `get_neuron_masks` names
            them.
        adapter_name: The adapter.

    Raises:
        ValueError: Unknown layer, wrong shape or dtype, or the adapter has no neuron masks. Nothing is changed then.
    """
    write_masks(neuron_layers(model, adapter_name), masks, adapter_name)


def describe_neurons(masks: dict[str, torch.Tensor]) -> list[str]:
    """How many neurons are off, in lines of text, layers with the same numbers together.

    Example:
        >>> masks = {f"layers.{i}.fc1": torch.arange(8) > 2 for i in range(3)}
        >>> describe_neurons(masks)
        ['3 of 8 neurons in layers.*.fc1 (3 layers)']
    """
    places: dict[tuple[int, int], list[str]] = {}
    for name, mask in masks.items():
        places.setdefault((int((~mask).sum()), len(mask)), []).append(name)
    return [
        f"{off} of {total} neurons in {module_patterns(names, among=masks)}"
        + (f" ({len(names)} layers)" if len(names) > 1 else "")
        for (off, total), names in places.items()
    ]
