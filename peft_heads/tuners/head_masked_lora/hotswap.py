"""Hot-swapping: PEFT writes an adapter's weights over another's without asking the tuner."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftConfig
from torch import nn

from ..._compat.loading import Loading
from ..._compat.peft import is_own
from ..._compat.torch import COMPILED, uncompiled
from ..common.folder_config import AdapterFolderConfig
from ..common.mask_keys import masks_for_model
from ..common.saved_folder import check_before_writing
from ..common.saved_settings import split_settings
from .layer import HeadMaskedLinear


WAY_OUT = "load the adapter beside the other instead (load_adapter and set_adapter)"


def check_configs(old: PeftConfig, new: PeftConfig) -> None:
    """Raise ValueError for adapters that must not be swapped although their options agree.

    An adapter without masks has no place for the masks of another, and packed codes have no place among weights.
    """
    if getattr(old, "masks_heads", None) != getattr(new, "masks_heads", None):
        raise ValueError(
            "hot-swapping needs two adapters that carry head masks, or two that do not; got "
            f"ne={old.ne}, ratio={old.ratio} and ne={new.ne}, ratio={new.ratio}; use load_adapter and set_adapter"
        )
    if getattr(old, "prunes_neurons", None) != getattr(new, "prunes_neurons", None):
        raise ValueError(
            "hot-swapping needs two adapters that prune neurons, or two that do not; got "
            f"neuron_ratio={old.neuron_ratio}, target_speed={old.target_speed} and neuron_ratio={new.neuron_ratio}, "
            f"target_speed={new.target_speed}; use load_adapter and set_adapter"
        )
    if getattr(new, "packed", False):
        raise ValueError(
            "hot-swapping writes full-precision weights where the old ones were, and the new adapter is packed; use "
            "load_adapter and set_adapter"
        )


def prepare(
    model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str, config: PeftConfig
) -> dict[str, torch.Tensor]:
    """Check the weights of a file, and return them as they are to be swapped in.

    PEFT fills what a file does not hold with zeros: all heads active, and no update.

    Args:
        model: The model with the old adapter in it.
        state_dict: The file's weights, by the model's names but with the file's masks.
        adapter_name: The old adapter.
        config: The new adapter's configuration.

    Raises:
        ValueError: The folder that the configuration comes from contradicts itself, or does not fit the model. Or a
            k-bit weight has another rank than the one it replaces: PEFT would pad a smaller one with zeros, which have no
            code and would change all the others, and put a larger one into a layer of the old rank.
    """
    if is_own(config):
        if isinstance(config, AdapterFolderConfig) and config.carried.source is not None:
            check_before_writing(uncompiled(model), config, config.carried.source, Loading())
        state_dict, _ = split_settings(state_dict)
    layers = list(_layers(model, adapter_name))
    if not layers:
        return state_dict
    for name, layer in layers:
        if adapter_name not in layer.lora_quantizer:
            continue
        for factor in ("lora_A", "lora_B"):
            key, weight = f"{name}.{factor}.{adapter_name}.weight", getattr(layer, factor)[adapter_name].weight
            new = state_dict.get(key, weight)
            if new.shape != weight.shape:
                raise ValueError(
                    f"{key} has {layer.lora_quantizer[adapter_name].bits} bits and shape {tuple(weight.shape)}; a weight "
                    f"of shape {tuple(new.shape)} cannot be swapped in, because k-bit weights cannot be padded; {WAY_OUT}"
                )
    for _, layer in layers:
        if adapter_name in layer.lora_quantizer:
            layer.lora_quantizer[adapter_name].forget()  # PEFT writes through `.data`
    return masks_for_model(state_dict)


def check_padding(model: nn.Module, target_rank: int) -> None:
    """Raise ValueError if a k-bit adapter would be padded with zeros, which have no code and would change all weights."""
    for name, layer in _layers(model):
        for adapter_name, quantizer in layer.lora_quantizer.items():
            rank = layer.lora_A[adapter_name].weight.shape[0]
            if rank != target_rank:
                raise ValueError(
                    f"{name}: adapter {adapter_name!r} has {quantizer.bits}-bit weights of rank {rank}, which cannot be "
                    f"padded to target_rank={target_rank}; k-bit adapters are hot-swapped at one rank "
                    f"(target_rank={rank}, or without target_rank); for another, {WAY_OUT}"
                )


def _layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, HeadMaskedLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, HeadMaskedLinear) and (adapter_name is None or adapter_name in module.lora_A):
            yield name.removeprefix(f"{COMPILED}."), module  # the prefix of torch.compile is not in the keys
