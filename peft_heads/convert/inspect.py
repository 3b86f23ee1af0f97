"""What a saved adapter is, from its files alone: method, heads, parameters, bytes. Nothing is written."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from .._compat import Loading
from ..adapter_folder.checkpoints import read_error
from ..adapter_folder.labels import read_labels
from ..adapter_folder.settings import read_settings
from ..adapter_folder.weights_file import find_weights, read_infos, read_weights
from ..backbones.renames import match_renamed
from ..functional.packing import unpack_module
from ..functional.quantization import quantize
from ..heads.detect import resolve_heads
from ..heads.layout import HeadLayout, ProjectionLayout
from ..heads.protocol import check_mask
from ..image_classifier import fetch_adapter
from ..tuners.common.head_mask import LORA_MASK, contradiction, is_mask_key, rows_in_file
from ..tuners.common.registry import is_own_type, method_of
from ..tuners.common.saved_folder import check_before_writing
from ..tuners.common.saved_keys import is_adapter_key, module_of
from ..tuners.common.saved_settings import is_settings_key
from ..tuners.common.setting_types import refusal
from ..tuners.head_masked_lora.config import FULL_PRECISION
from ..tuners.head_masked_lora.packed import PACKED
from .lora import check_type
from .migrate import empty_base_model


PARTS = ("adapter", "classification head", "masks and header")


@dataclass(frozen=True)
class AdapterReport:
    """What [`inspect_adapter`] finds.

    Attributes:
        folder: Where the adapter lies.
        settings: Its `adapter_config.json`.
        masks: `{projection: bool (num_heads,)}`, True = active; empty for a stock LoRA adapter. Parts of a fused
            projection have entries of their own (`…qkv.q`) if the number of heads is known.
        norms: `{projection: float64 (num_heads,)}`, the Frobenius norm of each head's part of the update
            `scaling · B · A` (DoRA's magnitude left out), of k-bit adapters with the quantised factors; empty if the
            number of heads is not known.
        no_norms: Why it is not known; empty if it is.
        parameters: Trained numbers in the file, by part: `"adapter"`, `"classification head"`.
        bytes: Of the weights' file, by `PARTS`.
        other_files: Bytes of the other files of the folder, by name.
    """

    folder: Path
    settings: dict[str, Any]
    masks: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]
    no_norms: str
    parameters: dict[str, int]
    bytes: dict[str, int]
    other_files: dict[str, int]


def inspect_adapter(adapter: str | os.PathLike, base_model: str | os.PathLike | None = None) -> AdapterReport:
    """Read an adapter's files: ours (head-masked LoRA, RLRR), or stock LoRA.

    Args:
        adapter: Folder or repository of the adapter.
        base_model: Folder or repository of the base model, of which only the configuration is read, for the number of
            heads; what the adapter names if None. Where that cannot be read, the report says so.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: A file is damaged or contradicts another, or `base_model` was given and cannot be read.
    """
    folder = fetch_adapter(adapter)
    settings, files = read_settings(folder), sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        is_read = path.suffix in (".json", ".safetensors") and path.name != "trainer_state.json"
        error = read_error(path) if is_read else None
        if error is not None:
            raise ValueError(f"{path} is damaged: {error}")
    check_type(folder, settings)
    read_labels(folder)
    weights = find_weights(os.fspath(folder))
    if is_own_type(settings["peft_type"]):
        PeftConfig.from_pretrained(os.fspath(folder))  # settings of the wrong type
    model, no_norms = _base_model(folder, settings, base_model)
    try:
        tensors = {key: tensor for key, tensor in read_weights(weights).items() if not is_settings_key(key)}
        report = _report(folder, settings, files, weights, tensors, model, no_norms)
        if is_own_type(settings["peft_type"]):
            _check(folder, weights, model)
        return report
    except OSError:
        raise
    except Exception as error:  # of settings that nobody has checked, those of stock LoRA
        raise refusal(folder, error) from error


def _report(
    folder: Path,
    settings: dict[str, Any],
    files: list[Path],
    weights: Path,
    tensors: dict[str, torch.Tensor],
    model: nn.Module | None,
    no_norms: str,
) -> AdapterReport:
    layouts = {} if model is None else _layouts(model, settings, tensors)
    if model is not None and not layouts:
        no_norms = f"{type(model).__name__} has no attention heads where the adapter is"
    stored, tensors = tensors, _unpacked(tensors, layouts, weights, settings)
    masks = _masks(tensors, layouts, weights)
    bits = FULL_PRECISION if _is_packed(stored) else settings.get("adapter_bits") or FULL_PRECISION
    norms = _norms(tensors if bits == FULL_PRECISION else _quantized(tensors, layouts, bits), layouts, settings)
    method = method_of(settings.get("peft_type"))
    no_norms = method.no_norms or no_norms
    if not norms and not no_norms:
        no_norms = f"the update of {method.peft_type} is not computed from its file"
    check_deactivated_rows(weights, tensors, masks, layouts, method.head_rows)
    for name, mask in masks.items():
        if name in norms and norms[name][~mask].count_nonzero():
            heads = (~mask & (norms[name] != 0)).nonzero().flatten().tolist()
            raise contradiction(weights, f"the mask of {name} deactivates heads {heads}, whose update is not zero")
    numbers, sizes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for key, tensor in tensors.items():
        numbers[_part_of(key)] += tensor.numel()
    for key, tensor in stored.items():
        sizes[_part_of(key)] += tensor.nbytes
    sizes[PARTS[2]] += weights.stat().st_size - sum(sizes.values())  # what is no tensor
    return AdapterReport(
        folder,
        settings,
        masks,
        norms,
        no_norms,
        parameters={part: numbers[part] for part in PARTS[:2]},
        bytes=sizes,
        other_files={path.name: path.stat().st_size for path in files if path != weights},
    )


def update_norms(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, layout: HeadLayout) -> torch.Tensor:
    """Frobenius norm of each head's rows of `scaling · B · A`.

    The product, which is as large as the frozen weight, is never formed.

    Args:
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: What the update is multiplied by.
        layout: The heads.

    Returns:
        float64 (num_heads,).

    Example:
        >>> layout = HeadLayout("query", num_heads=2, head_dim=1)
        >>> update_norms(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 2.0, layout).tolist()
        [10.0, 0.0]
    """
    A, B = lora_A.double(), layout.rows(lora_B).double()
    squares = ((B @ (A @ A.T)) * B).sum(dim=1).clamp(min=0)  # (num_rows,)
    return scaling * layout.sum_rows(squares).sqrt()


def check_deactivated_rows(
    weights: Path,
    tensors: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
    layouts: dict[str, ProjectionLayout],
    head_rows: tuple[str, ...],
) -> None:
    """Raise ValueError if an adapter's file has values in the rows of heads that its masks deactivate.

    Args:
        weights: The file, for the message.
        tensors: What it holds.
        masks: `{projection: bool (num_heads,)}`.
        layouts: `{module as the file names it: its heads}`.
        head_rows: Names of the parameters whose rows belong to heads.
    """
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        layout = layouts.get(module_of(key))
        if layout is None or part not in head_rows:
            continue
        for name, heads in layout.named_parts(module_of(key)).items():
            if name not in masks:
                continue
            off = heads.rows(tensor)[heads.expand(~masks[name])]
            if off.count_nonzero():
                indices = (~masks[name]).nonzero().flatten().tolist()
                raise contradiction(
                    weights, f"the mask of {name} deactivates heads {indices}, whose rows of {part} are not zero"
                )


def _guess_rows(shape: tuple[int, int], mask: torch.Tensor) -> torch.Tensor:
    """`rows_in_file` where no model says the heads: as of a projection that is no part of a fused one."""
    if shape[0] % len(mask):
        raise ValueError(f"it has {len(mask)} heads in {shape[0]} rows, which is not the same number for every head")
    return mask.repeat_interleave(shape[0] // len(mask))


def _unpacked(
    tensors: dict[str, torch.Tensor],
    layouts: dict[str, ProjectionLayout],
    weights: Path,
    settings: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """The tensors of an unpacked file, with the values that the codes of a packed one stand for."""
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
            unpacked[prefix + LORA_MASK] = mask
    return unpacked


def _quantized(
    tensors: dict[str, torch.Tensor], layouts: dict[str, ProjectionLayout], bits: int
) -> dict[str, torch.Tensor]:
    """The factors as a k-bit adapter acts by them; what stands in rows of deactivated heads stays to be seen."""
    quantized = dict(tensors)
    for key, tensor in tensors.items():
        mask = tensors.get(key.replace("lora_B.weight", LORA_MASK))
        layout = layouts.get(module_of(key))
        if key.endswith("lora_A.weight") or (key.endswith("lora_B.weight") and mask is None):
            quantized[key] = quantize(tensor, bits)
        elif key.endswith("lora_B.weight") and layout is not None:
            rows = layout.active_rows(mask)
            quantized[key] = torch.where(rows.unsqueeze(-1), quantize(tensor, bits, rows), tensor)
    return quantized


def _check(folder: Path, weights: Path, model: nn.Module | None) -> None:
    """Raise ValueError if the files of an adapter of ours contradict each other; without its base model, less is seen."""
    source = {"path_or_repo": os.fspath(folder)}
    config = PeftConfig.from_pretrained(os.fspath(folder))
    if model is not None:
        check_before_writing(model, config, source, Loading())
        return
    for key, info in read_infos(weights).items():
        expected = "bool" if is_settings_key(key) or is_mask_key(key) else "uint8" if key.endswith(PACKED) else None
        is_right = info.dtype == getattr(torch, expected) if expected else info.dtype and info.dtype.is_floating_point
        if not is_right and (is_adapter_key(key) or info.dtype != torch.uint8):
            raise ValueError(f"{weights}: {key} is a tensor of {info.dtype} (expected {expected or 'floating point'})")


def _base_model(
    folder: Path, settings: dict[str, Any], base_model: str | os.PathLike | None
) -> tuple[nn.Module | None, str]:
    """The base model without numbers, and why there is none."""
    try:
        return empty_base_model(folder, settings, base_model), ""
    except ValueError as error:
        if base_model is not None:
            raise
        return None, " ".join(str(error).split())


def _layouts(
    model: nn.Module, settings: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, ProjectionLayout]:
    """`{module as the file names it: its heads}`."""
    masked_parts = settings.get("fused_parts") or method_of(settings.get("peft_type")).masked_parts
    found = resolve_heads(model, settings.get("num_heads"), masked_parts)
    modules = dict.fromkeys(module_of(key) for key in tensors if is_adapter_key(key))
    renamed = match_renamed(modules, [name for name, _ in model.named_modules()])
    return {name: found[renamed.get(name, name)] for name in modules if renamed.get(name, name) in found}


def _masks(
    tensors: dict[str, torch.Tensor], layouts: dict[str, ProjectionLayout], weights: Path
) -> dict[str, torch.Tensor]:
    masks = {}
    for key, mask in tensors.items():
        if is_mask_key(key):
            name = module_of(key)
            layout = layouts.get(name)
            try:
                check_mask(name, mask, mask.numel() if layout is None else layout.num_heads)
            except ValueError as error:
                raise ValueError(f"{weights}: {error}") from error
            if layout is None:
                masks[name] = mask
            else:
                masks.update(zip(layout.named_parts(name), layout.split(mask), strict=True))
    return masks


def _norms(
    tensors: dict[str, torch.Tensor], layouts: dict[str, ProjectionLayout], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    norms = {}
    for key, lora_A in tensors.items():
        name = module_of(key)
        lora_B = tensors.get(key.replace("lora_A", "lora_B"))
        if not key.endswith("lora_A.weight") or name not in layouts or lora_B is None:
            continue
        rank = lora_A.shape[0]
        alphas = settings.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(alphas, name), settings.get("lora_alpha", rank))
        scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        for part_name, part in layouts[name].named_parts(name).items():
            norms[part_name] = update_norms(lora_A, lora_B, scaling, part)
    return norms


def _is_packed(tensors: dict[str, torch.Tensor]) -> bool:
    return any(key.endswith(PACKED) for key in tensors)


def _part_of(key: str) -> str:
    if is_mask_key(key):
        return PARTS[2]
    return PARTS[0] if is_adapter_key(key) else PARTS[1]
