"""A head-masked adapter as a stock LoRA adapter, which PEFT loads without this package."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..adapter_folder.atomic import new_folder
from ..adapter_folder.labels import read_labels, write_labels
from ..adapter_folder.settings import read_settings
from ..image_classifier import fetch_adapter
from ..tuners.common.mask_keys import MASKS
from ..tuners.common.method_registry import adapter_types
from ..tuners.common.options import PRUNING_NUMBERS
from ..tuners.common.saved_settings import is_settings_key, is_stock_lora
from ..tuners.head_masked_lora.packed import PACKED
from ..tuners.head_masked_lora.state_dict import write_quantized
from .file_tensors import prunes_neurons
from .source import check_type, load_complete_adapter, save_processor, sources


if TYPE_CHECKING:
    from peft import PeftModel


def export_lora(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a head-masked adapter as a stock LoRA adapter, which PEFT loads without this package.

    Masks and quantisation are folded into the weights (and DoRA's magnitudes). Modules have the names of the installed
    transformers. Labels and image processor are copied for readers that look for them.

    Args:
        adapter: Folder or repository of the adapter.
        target: The new folder.
        base_model: Folder or repository of the base model; what the adapter names if None.
        overwrite: Whether an adapter or a checkpoint in `target` is replaced.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: Plain LoRA cannot express it, or adapter, base model or target are not as they should be;
            nothing is written then.
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        _check_expressible(source, read_settings(source))
        model, _ = load_complete_adapter(source, base_model)
        save_file(_plain_weights(model, source), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        _plain_config(model.active_peft_config, base_model).save_pretrained(str(folder))
        labels = read_labels(source)
        if labels:
            write_labels(folder, labels)
        save_processor(folder, source, base_model=None)
    return Path(target)


def _check_expressible(source: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError unless an adapter with these settings can be written as plain LoRA."""
    if is_stock_lora(settings):
        raise ValueError(f"{source} is a stock LoRA adapter already; there is nothing to export")
    check_type(source, settings, adapter_types(LoraConfig))
    if prunes_neurons(settings):
        given = [f"{name}={settings[name]}" for name in PRUNING_NUMBERS if settings.get(name) is not None]
        raise ValueError(
            f"{source} has neuron masks ({', '.join(given)}), which no LoRA adapter can express: neurons that are off are "
            "silent, frozen weights and biases included; use --to merged, or --to pruned for a smaller model"
        )
    if settings.get("mask_scope") == "head" and (settings.get("ne") or settings.get("ratio")):
        raise ValueError(
            f"{source} has mask_scope='head', which no LoRA adapter can express: its deactivated heads are silent, "
            "frozen weights and biases included; use --to merged, or --to pruned for a smaller model"
        )


def _plain_weights(model: PeftModel, source: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights as they act, without masks, codes and noted settings."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    write_quantized(model, model.active_adapter, weights)
    weights = {
        key: tensor.contiguous()
        for key, tensor in weights.items()
        if not key.endswith((*MASKS, PACKED)) and not is_settings_key(key)
    }
    broken = next((key for key, tensor in weights.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ValueError(f"{source} cannot be exported: {broken} has entries that are not finite")
    return weights


def _plain_config(config: PeftConfig, base_model: str | os.PathLike | None) -> LoraConfig:
    """The stock configuration with the same values in the fields that it has."""
    names = {field.name for field in fields(LoraConfig)} - {"peft_type", "inference_mode"}
    settings = {name: getattr(config, name) for name in names} | {"inference_mode": True}
    if base_model is not None:
        settings["base_model_name_or_path"] = os.fspath(base_model)
    return LoraConfig(**settings)
