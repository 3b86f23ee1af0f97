"""Ways out of a saved adapter, for tools that know nothing of this package: a stock LoRA adapter, a whole checkpoint."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..adapter_folder.atomic import new_folder
from ..adapter_folder.checkpoints import read_error
from ..adapter_folder.labels import read_labels, write_labels
from ..adapter_folder.score_files import HEAT_MAP_FILE, SCORES_FILE
from ..adapter_folder.settings import read_settings
from ..data.images import load_image_processor
from ..image_classifier import fetch_adapter, load_adapter, quiet_loading
from ..tuners.common.head_mask import LORA_MASK
from ..tuners.common.registry import adapter_types, method_of, registered_methods
from ..tuners.common.saved_settings import is_settings_key
from ..tuners.head_masked_lora.packed import PACKED
from ..tuners.head_masked_lora.state_dict import write_quantized


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROCESSOR_FILE, MODEL_CARD = "preprocessor_config.json", "README.md"
# What makes a warning of a loaded adapter must not be exported: weights that were drawn anew, or left out.
_INCOMPLETE = ("Found missing adapter keys", "the adapter file has weights for modules that the model has under no")


def export_lora(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a head-masked adapter as a stock LoRA adapter, which PEFT loads without this package.

    Masks and quantisation are folded into the weights (and DoRA's magnitudes). Modules have the names of the installed transformers.
    Labels and image processor come along for whoever looks for them.

    Args:
        adapter: Folder or repository of the adapter.
        target: The new folder.
        base_model: Folder or repository of the base model; what the adapter names if None.
        overwrite: Whether an adapter or a checkpoint in `target` is replaced.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It cannot be said as plain LoRA, or adapter, base model or target are not as they should be;
            nothing is written then.
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        settings = read_settings(source)
        if settings.get("peft_type") == "LORA":
            raise ValueError(f"{source} is a stock LoRA adapter already; there is nothing to export")
        check_type(source, settings, adapter_types(LoraConfig))
        if settings.get("mask_scope") == "head" and (settings.get("ne") or settings.get("ratio")):
            raise ValueError(
                f"{source} has mask_scope='head', which no LoRA adapter can express: its deactivated heads are silent, "
                "frozen weights and biases included; use --to merged, or --to pruned for a smaller model"
            )
        model, _ = load_complete_adapter(source, base_model)
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        write_quantized(model, model.active_adapter, weights)
        ours = (LORA_MASK, PACKED)
        weights = {
            key: tensor.contiguous()
            for key, tensor in weights.items()
            if not key.endswith(ours) and not is_settings_key(key)
        }
        broken = next((key for key, tensor in weights.items() if not tensor.isfinite().all()), None)
        if broken:
            raise ValueError(f"{source} cannot be exported: {broken} has entries that are not finite")
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = model.active_peft_config
        names = {field.name for field in fields(LoraConfig)} - {"peft_type", "inference_mode"}
        settings = {name: getattr(config, name) for name in names} | {"inference_mode": True}
        if base_model is not None:
            settings["base_model_name_or_path"] = os.fspath(base_model)
        LoraConfig(**settings).save_pretrained(str(folder))
        labels = read_labels(source)
        if labels:
            write_labels(folder, labels)
        _save_processor(folder, source, base_model=None)
    return Path(target)


def export_merged(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge an adapter (ours or stock LoRA) into its base model and write an ordinary checkpoint of transformers.

    In float32. With labels and image processor, for `AutoModelForImageClassification` and `AutoImageProcessor` alone. Arguments,
    result and errors as of [`export_lora`].
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        check_type(source, read_settings(source))
        save_checkpoint(folder, merge(load_whole_model(source, base_model), source), source, base_model)
    return Path(target)


def export_packed(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a k-bit adapter with its codes instead of its full-precision weights: `adapter_bits` per weight.

    It remains a head-masked adapter, with everything else that its folder holds. Arguments, result and errors as of
    [`export_lora`].
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        settings = read_settings(source)
        method = method_of(settings.get("peft_type"))
        if method is None or method.pack is None:
            packed = (other.peft_type for other in registered_methods() if other.pack is not None)
            raise ValueError(
                f"{source} holds an adapter of type {settings.get('peft_type')}, which has no k-bit weights (expected "
                f"{' or '.join(packed)})"
            )
        model, _ = load_complete_adapter(source, base_model)
        method.pack(model, model.active_adapter)
        for name in (MODEL_CARD, PROCESSOR_FILE, SCORES_FILE, HEAT_MAP_FILE):
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        model.save_pretrained(str(folder))
    return Path(target)


def load_complete_adapter(source: Path, base_model: str | os.PathLike | None) -> tuple[PeftModel, list[str]]:
    """As `load_adapter`, but what is worth a warning there is an error, and every error is one line with the folder."""
    base = base_model or read_settings(source).get("base_model_name_or_path")
    try:
        with warnings.catch_warnings():
            for message in _INCOMPLETE:
                warnings.filterwarnings("error", message=message)
            # the adapter was trained beside float32 weights; in a checkpoint of 16 bits its head would be rounded
            return load_adapter(source, base_model, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, Warning) as error:
        faults = [f"{file} ({fault})" for file in _weights_and_settings(base) if (fault := read_error(file))]
        reason = ", ".join(faults) or " ".join(str(error).split())
        raise ValueError(f"{source} cannot be put on its base model {os.fspath(base or '')!r}: {reason}") from error


def load_whole_model(source: Path, base_model: str | os.PathLike | None) -> PeftModel:
    """The model with its adapter; refused if parts of it would be random, because no file has them."""
    model, untrained = load_complete_adapter(source, base_model)
    if untrained:
        raise ValueError(
            f"neither {source} nor its base model holds {', '.join(untrained)}: they would be random in the "
            "checkpoint; name the base model that the adapter was trained on (--base_model)"
        )
    return model


def merge(model: PeftModel, source: Path) -> PreTrainedModel:
    """The base model with the adapter in its weights, in place."""
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN
        raise ValueError(f"{source} cannot be merged: {error}") from error


def save_checkpoint(folder: Path, model: PreTrainedModel, source: Path, base_model: str | os.PathLike | None) -> None:
    """Write model and image processor; the model's configuration has the labels."""
    with quiet_loading():
        model.save_pretrained(folder)
    base = base_model or read_settings(source).get("base_model_name_or_path")
    _save_processor(folder, source, base)


def _save_processor(folder: Path, source: Path, base_model: str | os.PathLike | None) -> None:
    """Write the adapter's image processor, else the base model's; none where there is none (a damaged one raises)."""
    if (source / PROCESSOR_FILE).exists():
        load_image_processor(source).save_pretrained(folder)
    elif base_model is not None and (not os.path.isdir(base_model) or Path(base_model, PROCESSOR_FILE).exists()):
        try:
            load_image_processor(base_model).save_pretrained(folder)
        except FileNotFoundError:
            if os.path.isdir(base_model):
                raise


def check_type(source: Path, settings: dict[str, Any], expected: tuple[str, ...] = ()) -> None:
    """Raise ValueError for an adapter of a method that is not among those expected: ours, and LoRA."""
    expected = expected or adapter_types()
    if settings.get("peft_type") not in expected:
        raise ValueError(
            f"{source} holds an adapter of type {settings.get('peft_type')}; expected {' or '.join(expected)}"
        )


def sources(adapter: str | os.PathLike, base_model: str | os.PathLike | None) -> tuple:
    """What an export reads, which its target must not replace."""
    base = base_model
    if base is None and os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        base = read_settings(adapter).get("base_model_name_or_path")
    return (adapter, base) if base else (adapter,)


def _weights_and_settings(base: str | os.PathLike | None) -> Iterator[Path]:
    if base and os.path.isdir(base):
        yield from sorted([*Path(base).glob("*.safetensors"), *Path(base).glob("*.json")])
