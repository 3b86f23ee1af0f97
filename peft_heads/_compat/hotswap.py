"""Facts about PEFT's hot-swapping."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import PeftType, hotswap
from torch import nn

from .peft import is_own


def allow_hotswap(name: str, *keys: str) -> None:
    """Let `hotswap_adapter` swap adapters of a LoRA-like type whose configurations agree in LoRA's keys and in `keys`.

    Where PEFT has no such table, or no such check as `extend_hotswap_check` extends, it is left to refuse ours.

    Delete when PEFT asks the tuner instead of a table.
    """
    if hasattr(hotswap, "CONFIG_KEYS_TO_CHECK") and hasattr(hotswap, "check_hotswap_configs_compatible"):
        hotswap.CONFIG_KEYS_TO_CHECK[PeftType[name.upper()]] = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], *keys]


def extend_hotswap_check(check: Callable[[PeftConfig, PeftConfig], None]) -> None:
    """Call `check(old config, new config)` whenever PEFT has accepted two adapters of ours for hot-swapping.

    Delete when PEFT asks the tuner instead of a table.
    """
    compare = getattr(hotswap, "check_hotswap_configs_compatible", None)
    if compare is None or hasattr(compare, "extended_by_peft_heads"):
        return

    @functools.wraps(compare)
    def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig, *args: Any, **kwargs: Any):
        result = compare(config0, config1, *args, **kwargs)
        if is_own(config0) and is_own(config1):
            check(config0, config1)
        return result

    check_hotswap_configs_compatible.extended_by_peft_heads = True
    hotswap.check_hotswap_configs_compatible = check_hotswap_configs_compatible


def extend_hotswap(
    prepare: Callable[[nn.Module, dict[str, torch.Tensor], str, PeftConfig], dict[str, torch.Tensor]],
    check_padding: Callable[[nn.Module, int], None],
) -> None:
    """Let a method prepare the weights that PEFT swaps in, and refuse the ranks that PEFT pads to.

    Args:
        prepare: Returns the weights to swap in. Called with the model, the weights of the file, the adapter's name and
            the new configuration.
        check_padding: Raises ValueError. Called with the model and the rank, and called twice, because whoever has
            imported PEFT's function before us goes past the first time; scalings are tensors the second time, of the
            same values.

    Delete when PEFT asks the tuner.
    """
    if hasattr(hotswap.hotswap_adapter_from_state_dict, "extended_by_peft_heads"):
        return
    swap, prepare_model = hotswap.hotswap_adapter_from_state_dict, hotswap.prepare_model_for_compiled_hotswap
    pad = getattr(hotswap, "_pad_lora_weights", None)

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, *args, **kwargs):
        state_dict = prepare(model, state_dict, adapter_name, config)
        return swap(model, state_dict, adapter_name, config, *args, **kwargs)

    @functools.wraps(prepare_model)
    def prepare_model_for_compiled_hotswap(model, *, target_rank=None, **kwargs):
        if target_rank is not None:
            check_padding(model, target_rank)
        return prepare_model(model, target_rank=target_rank, **kwargs)

    @functools.wraps(pad)
    def _pad_lora_weights(model, target_rank):
        check_padding(model, target_rank)
        return pad(model, target_rank=target_rank)

    hotswap_adapter_from_state_dict.extended_by_peft_heads = True
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    hotswap.prepare_model_for_compiled_hotswap = prepare_model_for_compiled_hotswap
    if pad is not None:
        hotswap._pad_lora_weights = _pad_lora_weights
