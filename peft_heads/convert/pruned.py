"""Merges an adapter and removes its deactivated heads and neurons: an ordinary, smaller checkpoint of transformers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from ..adapter_folder.atomic import new_folder
from ..adapter_folder.settings import read_settings
from ..heads.protocol import maskable_layers, read_masks
from ..image_classifier import fetch_adapter
from ..tuners.common.method_registry import adapter_types
from .merged import load_whole_model, merge, save_checkpoint
from .smaller import prune
from .source import check_type, sources


def export_pruned(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge an adapter and write the model without its deactivated heads and neurons.

    Heads can be removed under `mask_scope="head"`, where a deactivated head's value is zero, bias included. The
    checkpoint can be read by the installed version of transformers (see [`peft_heads.convert.smaller.prune`]).
    Arguments, result and errors are those of [`peft_heads.convert.lora.export_lora`].
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        settings = read_settings(source)
        check_type(source, settings, adapter_types(LoraConfig))
        prunes_neurons = settings.get("neuron_ratio") is not None or settings.get("target_speed") is not None
        if settings.get("mask_scope") != "head" and not prunes_neurons:  # with neurons the configuration sees to it
            raise ValueError(
                f"{source} has mask_scope={settings.get('mask_scope')!r}, under which the frozen heads go on working "
                "and cannot be removed (expected 'head'); use --to lora or --to merged"
            )
        model = load_whole_model(source, base_model)
        heads, neurons = (_masks(model, neurons) for neurons in (False, True))
        save_checkpoint(folder, prune(merge(model, source), heads, neurons), source, base_model)
    return Path(target)


def _masks(model: nn.Module, neurons: bool) -> dict[str, torch.Tensor]:
    """The masks of the adapter's heads, or of its neurons, by name; empty if it has none."""
    return read_masks(maskable_layers(model, "default", neurons)[0], "default")
