"""Settings without which an adapter's numbers mean something else, noted among its weights.

They leave no trace in names and shapes, so a configuration that was edited, or is another adapter's, would give wrong
results without a word. Files written before they were noted have none, and are believed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from ...adapter_folder.weights_file import read_infos, read_weights
from .method_registry import own_prefixes, parameter_prefixes


_BASE = "base_model.model."


@functools.cache
def _settings_keys(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}settings" for prefix in prefixes)


def is_settings_key(key: str) -> bool:
    """Whether a key of an adapter's file, also with the adapter's name behind, stands for settings."""
    return key.removeprefix(_BASE).startswith(_settings_keys(parameter_prefixes()))


def is_stock_lora(settings: dict[str, Any]) -> bool:
    """Whether an adapter with this configuration is PEFT's own LoRA."""
    return settings.get("peft_type") == PeftType.LORA


def check_foreign(settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError if an adapter that is said to be none of ours has weights that another method gets wrong.

    Args:
        settings: Its configuration, whose type is none of ours.
        path: The file of its weights. Head-masked weights of full precision with `mask_scope="adapter"` are LoRA.
    """
    infos = read_infos(path)
    noted = read_weights(path, {key for key in infos if is_settings_key(key)})
    prefixes = own_prefixes()
    odd = [key for key in infos if key.endswith(".lora_packed") or any(f".{prefix}" in key for prefix in prefixes)]
    odd += [key for key, value in noted.items() if value.any()]
    if odd:
        raise ValueError(
            f"{path} has {odd[0]}, which no adapter of type {settings.get('peft_type')} has; its configuration was edited, or "
            "belongs to another adapter"
        )
    if is_stock_lora(settings):
        _check_ranks(settings, path)


def _check_ranks(settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError if the factors of a stock LoRA adapter have other ranks than its configuration says.

    PEFT makes the factors by the configuration, however large, before it reads the weights.

    Args:
        settings: The adapter's configuration.
        path: The file of its weights.
    """
    if settings.get("target_parameters"):  # the factors of several experts in one
        return
    patterns = settings.get("rank_pattern") or {}
    for key, info in read_infos(path).items():
        name, found, _ = key.removeprefix(_BASE).rpartition(".lora_A.weight")
        if not found or not info.shape:
            continue
        try:
            rank = patterns.get(get_pattern_key(patterns, name), settings.get("r", LoraConfig.r))
        except (AttributeError, TypeError, re.error) as error:
            raise ValueError(f"{path.parent}: rank_pattern cannot be used ({' '.join(str(error).split())})") from error
        if rank != info.shape[0]:
            raise ValueError(
                f"{path}: {key} has rank {info.shape[0]}, but the configuration says {str(rank)[:80]} (r, rank_pattern); "
                "one of the two was edited, or they belong to different adapters"
            )


def write_settings(key: str, settings: dict[str, bool], state_dict: dict[str, torch.Tensor]) -> None:
    """Note settings among an adapter's weights: bool (len(settings),), as masks are, which no reader takes for weights."""
    prefix = _BASE if any(name.startswith(_BASE) for name in state_dict) else ""
    state_dict[prefix + key] = torch.tensor(list(settings.values()))


def check_settings(
    settings: dict[str, bool], noted: Iterable[torch.Tensor], without_meaning: Container[str] = ()
) -> None:
    """Raise ValueError unless what a file notes are these settings.

    Args:
        settings: Those of the configuration, and whether each is so.
        noted: Tensors of the file under a settings key; none of an older file.
        without_meaning: Settings that make no difference to these weights.
    """
    for tensor in noted:
        if tensor.dtype != torch.bool or tensor.shape != (len(settings),):
            raise ValueError(
                f"the settings noted in the adapter file ({', '.join(settings)}) are {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} (expected torch.bool of shape {(len(settings),)}); it was edited"
            )
        for (name, is_so), was_so in zip(settings.items(), tensor.tolist(), strict=True):
            if is_so != was_so and name not in without_meaning:
                raise ValueError(
                    f"the adapter file was saved {'with' if was_so else 'without'} {name}, which its configuration "
                    f"{'says' if is_so else 'does not say'}: it was edited, or belongs to another adapter; restore the "
                    "setting, or save the adapter again"
                )


def split_settings(
    state_dict: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """A file's weights, and the noted settings, of which an older file has none."""
    weights = {key: value for key, value in state_dict.items() if not is_settings_key(key)}
    return weights, [value for key, value in state_dict.items() if is_settings_key(key)]
