"""A report on a saved adapter, from its files alone: method, heads, parameters, bytes. Nothing is written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from .._compat.loading import Loading
from ..adapter_folder.base_model import empty_base_model
from ..adapter_folder.checkpoints import read_error
from ..adapter_folder.labels import read_labels
from ..adapter_folder.settings import read_settings
from ..adapter_folder.weights_file import find_weights, read_infos, read_weights
from ..image_classifier import fetch_adapter
from ..tuners.common.mask_keys import is_mask_key
from ..tuners.common.method_registry import is_own_type, method_of
from ..tuners.common.saved_folder import check_before_writing
from ..tuners.common.saved_keys import is_adapter_key
from ..tuners.common.saved_settings import is_settings_key
from ..tuners.common.setting_types import refusal
from ..tuners.head_masked_lora.config import FULL_PRECISION
from ..tuners.head_masked_lora.packed import PACKED
from .file_tensors import is_packed, layouts_in_file, masks_in_file, quantized_tensors, unpacked_tensors
from .source import check_type
from .update_norms import check_deactivated_rows, check_deactivated_updates, norms_by_head


# Keys of the report, which scripts read: the second is the classifier.
PARTS = ("adapter", "classification head", "masks and header")


@dataclass(frozen=True)
class AdapterReport:
    """The result of [`inspect_adapter`].

    Attributes:
        folder: The adapter's folder.
        settings: Its `adapter_config.json`.
        masks: `{projection: bool (num_heads,)}`, True = active; empty for a stock LoRA adapter. Parts of a fused
            projection have entries of their own (`…qkv.q`) if the number of heads is known.
        norms: `{projection: float64 (num_heads,)}`, the Frobenius norm of each head's part of the update
            `scaling · B · A` (DoRA's magnitude left out), of k-bit adapters with the quantised factors; empty if the
            number of heads is not known.
        no_norms: The reason why the norms are not known; empty if they are.
        parameters: Trained numbers in the file, by part: `"adapter"`, `"classification head"`.
        bytes: Bytes of the weights' file, by `PARTS`.
        other_files: Bytes of the other files of the folder, by name.
        neuron_masks: `{first layer of an MLP: bool (num_neurons,)}`, True = active; empty if no neurons are pruned.
    """

    folder: Path
    settings: dict[str, Any]
    masks: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]
    no_norms: str
    parameters: dict[str, int]
    bytes: dict[str, int]
    other_files: dict[str, int]
    neuron_masks: dict[str, torch.Tensor] = field(default_factory=dict)


def inspect_adapter(adapter: str | os.PathLike, base_model: str | os.PathLike | None = None) -> AdapterReport:
    """Read an adapter's files: ours (head-masked LoRA, RLRR), or stock LoRA.

    Args:
        adapter: Folder or repository of the adapter.
        base_model: Folder or repository of the base model; what the adapter names if None. Only its configuration is
            read, for the number of heads. Where the one that the adapter names cannot be read, the report says so.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: A file is damaged or contradicts another, or `base_model` was given and cannot be read.
    """
    folder = fetch_adapter(adapter)
    settings = read_settings(folder)
    _check_readable(folder)
    check_type(folder, settings)
    read_labels(folder)
    weights, config = find_weights(os.fspath(folder)), None
    if is_own_type(settings["peft_type"]):
        config = PeftConfig.from_pretrained(os.fspath(folder))  # which refuses settings of the wrong type
    model, no_norms = _base_model(folder, settings, base_model)
    try:
        report = _report(folder, settings, weights, model, no_norms)
        if config is not None:
            _check_contents(folder, config, weights, model)
        return report
    except OSError:
        raise
    except Exception as error:  # settings of stock LoRA, which nobody has checked
        raise refusal(folder, error) from error


def _report(
    folder: Path, settings: dict[str, Any], weights: Path, model: nn.Module | None, no_norms: str
) -> AdapterReport:
    """The report on an adapter's folder.

    Args:
        folder: The folder.
        settings: The adapter's configuration.
        weights: The file of its weights.
        model: The base model without numbers; None where it cannot be read.
        no_norms: Why it cannot.
    """
    stored = {key: tensor for key, tensor in read_weights(weights).items() if not is_settings_key(key)}
    layouts = {} if model is None else layouts_in_file(model, settings, stored)
    if model is not None and not layouts:
        no_norms = f"{type(model).__name__} has no attention heads where the adapter is"
    tensors = unpacked_tensors(stored, layouts, weights, settings)
    masks = masks_in_file(tensors, layouts, weights)
    neuron_masks = masks_in_file(tensors, layouts, weights, neurons=True)
    bits = FULL_PRECISION if is_packed(stored) else settings.get("adapter_bits") or FULL_PRECISION
    acting = tensors if bits == FULL_PRECISION else quantized_tensors(tensors, layouts, bits)
    norms = norms_by_head(acting, layouts, settings)
    method = method_of(settings.get("peft_type"))
    no_norms = method.no_norms or no_norms
    if not norms and not no_norms:
        no_norms = f"the update of {method.peft_type} is not computed from its file"
    check_deactivated_rows(weights, tensors, masks, layouts, method.head_rows)
    check_deactivated_updates(weights, norms, masks)
    norms = {name: norm for name, norm in norms.items() if name not in layouts or not layouts[name].has_neurons}
    return AdapterReport(
        folder,
        settings,
        masks,
        norms,
        no_norms,
        parameters=_parameters(tensors),
        bytes=_bytes(stored, weights),
        other_files={path.name: path.stat().st_size for path in _files(folder) if path != weights},
        neuron_masks=neuron_masks,
    )


def _parameters(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Trained numbers by part; masks are not trained."""
    numbers = dict.fromkeys(PARTS, 0)
    for key, tensor in tensors.items():
        numbers[_part_of(key)] += tensor.numel()
    return {part: numbers[part] for part in PARTS[:2]}


def _bytes(stored: dict[str, torch.Tensor], weights: Path) -> dict[str, int]:
    """Bytes of the weights' file by part; the header counts with the masks."""
    sizes = dict.fromkeys(PARTS, 0)
    for key, tensor in stored.items():
        sizes[_part_of(key)] += tensor.nbytes
    sizes[PARTS[2]] += weights.stat().st_size - sum(sizes.values())
    return sizes


def _part_of(key: str) -> str:
    if is_mask_key(key):
        return PARTS[2]
    return PARTS[0] if is_adapter_key(key) else PARTS[1]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _check_readable(folder: Path) -> None:
    """Raise ValueError if a file of the folder is damaged."""
    for path in _files(folder):
        is_read = path.suffix in (".json", ".safetensors") and path.name != "trainer_state.json"
        error = read_error(path) if is_read else None
        if error is not None:
            raise ValueError(f"{path} is damaged: {error}")


def _check_contents(folder: Path, config: PeftConfig, weights: Path, model: nn.Module | None) -> None:
    """Raise ValueError if the files of an adapter of ours contradict each other; without its base model, less is seen."""
    if model is not None:
        check_before_writing(model, config, {"path_or_repo": os.fspath(folder)}, Loading())
        return
    for key, info in read_infos(weights).items():
        expected = "bool" if is_settings_key(key) or is_mask_key(key) else "uint8" if key.endswith(PACKED) else None
        is_right = info.dtype == getattr(torch, expected) if expected else info.dtype and info.dtype.is_floating_point
        if not is_right and (is_adapter_key(key) or info.dtype != torch.uint8):
            raise ValueError(f"{weights}: {key} is a tensor of {info.dtype} (expected {expected or 'floating point'})")


def _base_model(
    folder: Path, settings: dict[str, Any], base_model: str | os.PathLike | None
) -> tuple[nn.Module | None, str]:
    """The base model without numbers, or None and the reason why there is none."""
    try:
        return empty_base_model(folder, settings, base_model), ""
    except ValueError as error:
        if base_model is not None:
            raise
        return None, " ".join(str(error).split())
