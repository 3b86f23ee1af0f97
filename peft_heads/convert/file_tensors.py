"""The tensors of an adapter's file: where their heads are, their masks, and the values that packed codes stand for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones.neurons import neuron_projections
from ..backbones.renames import match_renamed
from ..functional.packing import unpack_module
from ..functional.quantization import quantize
from ..heads.detect import resolve_heads
from ..heads.layout import ProjectionLayout
from ..heads.neurons import neuron_layout
from ..heads.protocol import check_mask
from ..tuners.common.head_mask import rows_in_file
from ..tuners.common.mask_keys import LORA_MASK, LORA_NEURON_MASK, MASKS, NEURON_KIND, is_mask_key
from ..tuners.common.method_registry import method_of
from ..tuners.common.options import PRUNING_NUMBERS
from ..tuners.common.saved_keys import is_adapter_key, module_of
from ..tuners.head_masked_lora.packed import PACKED


def layouts_in_file(
    model: nn.Module, settings: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, ProjectionLayout]:
    """`{module, by its name in the file: its heads}`, or its neurons where the adapter prunes these.

    Args:
        model: The base model, possibly with other names for the modules.
        settings: The adapter's configuration.
        tensors: The tensors of the file.
    """
    masked_parts = settings.get("fused_parts") or method_of(settings.get("peft_type")).masked_parts
    found = resolve_heads(model, settings.get("num_heads"), masked_parts)
    if prunes_neurons(settings):
        found |= {name: neuron_layout(number) for name, number in neuron_projections(model).items()}
    modules = dict.fromkeys(module_of(key) for key in tensors if is_adapter_key(key))
    renamed = match_renamed(modules, [name for name, _ in model.named_modules()])
    return {name: found[renamed.get(name, name)] for name in modules if renamed.get(name, name) in found}


def masks_in_file(
    tensors: dict[str, torch.Tensor], layouts: dict[str, ProjectionLayout], weights: Path, neurons: bool = False
) -> dict[str, torch.Tensor]:
    """`{projection: bool (num_heads,)}`; a fused projection has one entry per part if its heads are known.

    Args:
        tensors: The tensors of the file, unpacked.
        layouts: `{module, by its name in the file: its heads}`.
        weights: The file, for the messages.
        neurons: Whether the masks of neurons are wanted, instead of those of heads.

    Raises:
        ValueError: A mask has a wrong shape or dtype.
    """
    masks = {}
    for key, mask in tensors.items():
        if is_mask_key(key) and (NEURON_KIND in key) == neurons:
            name = module_of(key)
            layout = layouts.get(name)
            try:
                unit = "neuron" if neurons else "head"
                check_mask(name, mask, mask.numel() if layout is None else layout.num_heads, unit)
            except ValueError as error:
                raise ValueError(f"{weights}: {error}") from error
            if layout is None:
                masks[name] = mask
            else:
                masks.update(zip(layout.named_parts(name), layout.split(mask), strict=True))
    return masks


def unpacked_tensors(
    tensors: dict[str, torch.Tensor],
    layouts: dict[str, ProjectionLayout],
    weights: Path,
    settings: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """The tensors of a file, with values in place of packed codes.

    Args:
        tensors: The tensors of the file.
        layouts: `{module, by its name in the file: its heads}`; where it is unknown, the rows of heads are guessed.
        weights: The file, for the messages.
        settings: The adapter's configuration.

    Raises:
        ValueError: Codes cannot be unpacked, or have other bits than the settings say.
    """
    unpacked = {}
    for key, tensor in tensors.items():
        layout = layouts.get(module_of(key))
        is_lora = key.endswith(PACKED)
        if not is_lora and tensor.dtype != torch.uint8:
            unpacked[key] = tensor
            continue
        find_rows = _guess_rows if layout is None else partial(rows_in_file, layout, "the base model")
        try:
            matrices, mask = unpack_module(tensor, 2 if is_lora else 1, find_rows)
        except ValueError as error:
            # of a fused projection only the model knows the parts
            hint = "" if layout else " (which rows belong to heads is guessed: --base_model could not be read)"
            raise ValueError(f"{weights}: {key} cannot be unpacked: {error}{hint}") from error
        setting = "adapter_bits" if is_lora else "classifier_bits"
        if matrices[0].bits != settings.get(setting):
            raise ValueError(
                f"{weights}: {key} is packed with {matrices[0].bits} bits, but the settings say "
                f"{setting}={settings.get(setting)}; one of the two was edited"
            )
        prefix = key.removesuffix(PACKED)
        names = [f"{prefix}lora_A.weight", f"{prefix}lora_B.weight"] if is_lora else [key]
        unpacked |= {name: matrix.values() for name, matrix in zip(names, matrices, strict=True)}
        if mask is not None:
            # a neuron is a row; no head is
            unpacked[prefix + (LORA_NEURON_MASK if len(mask) == matrices[-1].codes.shape[0] else LORA_MASK)] = mask
    return unpacked


def quantized_tensors(
    tensors: dict[str, torch.Tensor], layouts: dict[str, ProjectionLayout], bits: int
) -> dict[str, torch.Tensor]:
    """The tensors with quantised factors, by which a k-bit adapter acts.

    Rows of deactivated heads keep their values, so that values other than zero are noticed.
    """
    quantized = dict(tensors)
    for key, tensor in tensors.items():
        mask = next((tensors[k] for kind in MASKS if (k := key.replace("lora_B.weight", kind)) in tensors), None)
        layout = layouts.get(module_of(key))
        if key.endswith("lora_A.weight") or (key.endswith("lora_B.weight") and mask is None):
            quantized[key] = quantize(tensor, bits)
        elif key.endswith("lora_B.weight") and layout is not None:
            rows = layout.active_rows(mask)
            quantized[key] = torch.where(rows.unsqueeze(-1), quantize(tensor, bits, rows), tensor)
    return quantized


def prunes_neurons(settings: dict[str, Any]) -> bool:
    """Whether an adapter's configuration gives neurons masks."""
    return any(settings.get(name) is not None for name in PRUNING_NUMBERS)


def is_packed(tensors: dict[str, torch.Tensor]) -> bool:
    return any(key.endswith(PACKED) for key in tensors)


def _guess_rows(shape: tuple[int, int], mask: torch.Tensor) -> torch.Tensor:
    """`rows_in_file` of a projection whose heads no model tells, as if it were no part of a fused one."""
    if shape[0] % len(mask):
        raise ValueError(f"it has {len(mask)} heads in {shape[0]} rows, which is not the same number for every head")
    return mask.repeat_interleave(shape[0] // len(mask))
