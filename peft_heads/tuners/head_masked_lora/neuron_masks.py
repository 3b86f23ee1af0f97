"""Where an adapter masks MLP neurons, and how layers get masks that PEFT gives no LoRA to."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ...backbones.neurons import neuron_projections
from ...heads.layout import ProjectionLayout
from ...heads.neurons import neuron_layout
from ..common.calls import watch_calls
from ..common.mask_keys import is_mask_key
from ..common.targets import check_called
from .config import HeadMaskedLoraConfig
from .neuron_layer import NeuronMaskedLinear


def find_neuron_layouts(model: nn.Module, config: HeadMaskedLoraConfig) -> dict[str, ProjectionLayout]:
    """`{module name: neurons}` of the first layer of every MLP, before anything is replaced.

    Raises:
        ValueError: Neurons of the model cannot be switched off, or an earlier adapter is in the way.
    """
    layouts = {name: neuron_layout(number) for name, number in neuron_projections(model).items()}
    check_called(model, list(layouts))
    for name in layouts:
        _check_place(name, model.get_submodule(name))
    return layouts


def without_masks(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A file's weights without its masks: a layer that has a mask alone is not to be given LoRA."""
    return {key: value for key, value in state_dict.items() if not is_mask_key(key)}


def add_neuron_masks(tuner: BaseTuner, adapter_name: str) -> None:
    """Give an adapter's neuron masks a layer wherever the adapter has no LoRA."""
    config, state = tuner.peft_config[adapter_name], tuner.adapter_states[adapter_name]
    for name, layout in state.neuron_layouts.items():
        target, (parent, _, child) = tuner.model.get_submodule(name), name.rpartition(".")
        if isinstance(target, NeuronMaskedLinear):
            if adapter_name not in target.lora_neuron_mask:
                target.expect_adapter(adapter_name, layout, None)
                target.update_layer(adapter_name, 0, config.lora_alpha, config=config)
            continue
        layer = NeuronMaskedLinear(target, adapter_name, config=config, layout=layout)
        layer.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)
        tuner._replace_module(tuner.model.get_submodule(parent), child, layer, target)
    if state.neuron_layouts:
        watch_calls(tuner.model)


def _check_place(name: str, layer: nn.Module) -> None:
    """Raise ValueError if a layer that is to carry neuron masks has an adapter that leaves no room for them."""
    if isinstance(layer, BaseTunerLayer) and not isinstance(layer, NeuronMaskedLinear):
        raise ValueError(
            f"{name} was given a {type(layer).__name__} by an earlier adapter (expected torch.nn.Linear, or a layer with "
            "neuron masks), which cannot carry the neuron masks of the new adapter; add the adapter that prunes neurons first"
        )
