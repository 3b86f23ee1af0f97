"""Adapter folders from the files of Bi-LoRA's authors, and back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ...adapter_folder.atomic import new_folder, write_atomically, write_together
from ...adapter_folder.labels import write_labels
from ...adapter_folder.settings import read_settings
from ...adapter_folder.weights_file import find_weights, read_infos, read_weights
from ...backbones.targets import default_targets
from ...functional.packing import PackedWeight, pack_module, read_mask, unpack_module
from ...functional.quantization import BITS
from ...heads.detect import resolve_heads
from ...image_classifier import fetch_adapter
from ...tuners import HeadMaskedLoraConfig, pack_adapter
from ...tuners.common.classifiers import default_labels
from ...tuners.common.registry import adapter_types
from ...tuners.common.saved_keys import BASE, module_of, renamed_keys
from ...tuners.common.saved_settings import is_settings_key
from ...tuners.head_masked_lora.config import FULL_PRECISION
from ...tuners.head_masked_lora.packed import PACKED
from ..lora import PROCESSOR_FILE, check_type, load_complete_adapter
from .files import (
    BACKBONE,
    BASE_MODEL,
    HEAD_BITS,
    NUM_BLOCKS,
    PATCH_SIZE,
    WIDTH,
    Settings,
    Weights,
    dataset_in_name,
    encode,
    encode_settings,
    read,
    settings_beside,
    shortest_scale,
)


# The authors' images: 224 × 224, bicubic, from 0 to 1 and not normalised as the base model's own are.
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": False,
}
HEAD = f"{BASE}classifier"
_OTHER_FORMS = "; or use --to packed, --to lora or --to merged"


def import_bi_lora(
    file: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder for a `.bin` of Bi-LoRA's authors and the `.yaml` beside it.

    The adapter has the codes, means and deviations of the file. Classes have numbers for names, and the image
    processor is the authors': their images are not normalised.

    Args:
        file: The `.bin`.
        target: The new folder.
        base_model: Folder or repository of the ViT-B/16 that the adapter is to name;
            `google/vit-base-patch16-224-in21k` if None.
        overwrite: Whether an adapter or a checkpoint in `target` is replaced.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: One of them is not of the form of [`bi_lora_files`], or target or base model are not as they should
            be; nothing is written then.
    """
    base = os.fspath(base_model or BASE_MODEL)
    with new_folder(target, overwrite, (file, settings_beside(Path(file)), base)) as folder:
        settings, weights = read(file)
        problem = _problem_of_base_model(base) if os.path.isdir(base) else None
        if problem:
            raise ValueError(f"{file} cannot be imported: {problem}")
        save_file(_state_dict(weights), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        alpha = settings.scale * settings.dim
        HeadMaskedLoraConfig(
            ne=0,
            r=settings.dim,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            target_modules=default_targets(_empty_vit()),
            modules_to_save=["classifier"],
            adapter_bits=settings.bit,
            classifier_bits=HEAD_BITS[settings.method],
            bottleneck_dropout=0.1,
            packed=True,
            base_model_name_or_path=base,
            auto_mapping={
                "base_model_class": transformers.ViTForImageClassification.__name__,
                "parent_library": transformers.ViTForImageClassification.__module__,
            },
            inference_mode=True,
        ).save_pretrained(str(folder))
        write_labels(folder, default_labels(settings.num_class))
        write_atomically(folder / PROCESSOR_FILE, json.dumps(PROCESSOR, indent=2))
    return Path(target)


def export_bi_lora(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a k-bit adapter of a ViT-B/16 as a `.bin` of Bi-LoRA's authors, and the `.yaml` beside it.

    What has been imported comes out byte for byte, under the same file name: the dataset is what stands before `-bit`.

    Args:
        adapter: Folder or repository of the adapter. Unless it is packed, its base model is loaded as well.
        target: The new `.bin`.
        base_model: Folder or repository of the base model; what the adapter names if None.
        overwrite: Whether files that are there are replaced.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: The form has no place for what the adapter is, or adapter or target are not as they should be;
            nothing is written then.
    """
    file = Path(target)
    settings_file = settings_beside(file)
    for path in (file, settings_file):
        if path.is_dir() or (path.exists() and not overwrite):
            way_out = "it is a folder" if path.is_dir() else "--overwrite replaces it"
            raise ValueError(f"{path} exists already and nothing was changed; {way_out}")
    source = fetch_adapter(adapter)
    config = read_settings(source)
    check_type(source, config, adapter_types(LoraConfig))
    problem = _problem_of_settings(config) or _problem_of_base_model(
        base_model or config.get("base_model_name_or_path")
    )
    if problem:
        raise ValueError(f"{source} cannot be written as a file of Bi-LoRA: {problem}")
    dataset = dataset_in_name(file, config["adapter_bits"], config["r"])
    tensors = _packed_state_dict(source, base_model)
    try:
        weights = _weights(tensors, config)
        settings = _settings(config, dataset, weights.num_class)
    except ValueError as error:
        raise ValueError(f"{source} cannot be written as a file of Bi-LoRA: {error}") from error
    write_together({settings_file: encode_settings(settings), file: encode(weights)})
    return file


def _state_dict(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights as they stand in a packed adapter's file."""
    state_dict = {
        f"{BASE}{name}.{PACKED}": pack_module(factors)
        for name, factors in zip(_projections(_empty_vit()), weights.factors, strict=True)
    }
    if weights.bias is None:  # the authors' 1-bit head has none, but transformers' has
        state_dict |= {f"{HEAD}.weight": pack_module([weights.head]), f"{HEAD}.bias": torch.zeros(weights.num_class)}
    else:
        state_dict |= {f"{HEAD}.weight": weights.head.contiguous(), f"{HEAD}.bias": weights.bias.contiguous()}
    return state_dict


def _packed_state_dict(source: Path, base_model: str | os.PathLike | None) -> dict[str, torch.Tensor]:
    """The weights in an adapter's file, packed if they are not."""
    path = find_weights(os.fspath(source))
    if any(key.endswith(PACKED) for key in read_infos(path)):
        tensors = read_weights(path)
    else:
        model, _ = load_complete_adapter(source, base_model)
        pack_adapter(model, model.active_adapter)
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tensor for key, tensor in tensors.items() if not is_settings_key(key)}


def _settings(config: dict[str, Any], dataset: str, num_class: int) -> Settings:
    rank, alpha, head_bits = config["r"], config["lora_alpha"], config.get("classifier_bits", FULL_PRECISION)
    return Settings(
        dataset=dataset,
        num_class=num_class,
        backbone=BACKBONE,
        method=next(method for method, bits in HEAD_BITS.items() if bits == head_bits),
        dim=rank,
        bit=config["adapter_bits"],
        scale=alpha / math.sqrt(rank) if config.get("use_rslora") else shortest_scale(alpha, rank),
    )


def _weights(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> Weights:
    """The weights of a packed adapter.

    Raises:
        ValueError: There is something else among them, or something is missing.
    """
    vit = _empty_vit()
    present = [name for name, _ in vit.named_modules()]
    tensors = {new: state_dict[key] for key, new in renamed_keys(state_dict, present).items()}
    keys = [f"{BASE}{name}.{PACKED}" for name in _projections(vit)]
    expected = {*keys, f"{HEAD}.weight", f"{HEAD}.bias"}
    surplus, missing = sorted(set(tensors) - expected), sorted(expected - set(tensors))
    if surplus or missing:
        what = f"besides it has {surplus[0]}" if surplus else f"it has no {missing[0]}"
        raise ValueError(
            f"the form is q and v of all {NUM_BLOCKS} blocks of a ViT-B/16 and its classifier, but {what}{_OTHER_FORMS}"
        )
    factors = [_factors(key, tensors[key], config["adapter_bits"], config["r"]) for key in keys]
    head_bits = config.get("classifier_bits", FULL_PRECISION)
    return Weights(factors, *_head(tensors[f"{HEAD}.weight"], tensors[f"{HEAD}.bias"], head_bits))


def _factors(key: str, data: torch.Tensor, bits: int, rank: int) -> tuple[PackedWeight, PackedWeight]:
    try:
        mask = read_mask(data)
        if mask is not None and not mask.all():
            raise ValueError(
                f"heads {(~mask).nonzero().flatten().tolist()} are deactivated, and the form has no place for head "
                f"masks{_OTHER_FORMS}"
            )
        (down, up), _ = unpack_module(data, 2)
    except ValueError as error:
        raise ValueError(f"{module_of(key)}: {error}") from error
    shapes = [tuple(matrix.codes.shape) for matrix in (down, up)]
    if shapes != [(rank, WIDTH), (WIDTH, rank)] or down.bits != bits:
        raise ValueError(
            f"{module_of(key)} has factors of shape {shapes[0]} and {shapes[1]} with {down.bits} bits; expected "
            f"{(rank, WIDTH)} and {(WIDTH, rank)} with {bits}"
        )
    return down, up


def _head(
    weight: torch.Tensor, bias: torch.Tensor, bits: int
) -> tuple[PackedWeight | torch.Tensor, torch.Tensor | None]:
    if bits == FULL_PRECISION:
        head, bias = weight.float(), bias.float()
        shape, found_bits = tuple(head.shape), bits
        if not (head.isfinite().all() and bias.isfinite().all()):
            raise ValueError("the classifier has entries that are not finite")
    else:
        try:
            (head,), _ = unpack_module(weight, 1)
        except ValueError as error:
            raise ValueError(f"the classifier: {error}") from error
        shape, found_bits = tuple(head.codes.shape), head.bits
        if bias.count_nonzero():
            raise ValueError(
                f"the classifier of {bits} bit has a bias, for which the form has no place; train the head with "
                f"classifier_bits={FULL_PRECISION}{_OTHER_FORMS}"
            )
    if shape != (bias.numel(), WIDTH) or found_bits != bits:
        raise ValueError(
            f"the classifier has the shape {shape} with {found_bits} bits; expected {(bias.numel(), WIDTH)} with {bits}"
        )
    return head, bias if bits == FULL_PRECISION else None


def _problem_of_settings(config: dict[str, Any]) -> str | None:
    """Why the form has no place for an adapter with these settings."""
    if config.get("adapter_bits", FULL_PRECISION) not in BITS:
        return f"it has no k-bit weights; train with adapter_bits of {', '.join(map(str, BITS))}"
    if config.get("classifier_bits", FULL_PRECISION) not in HEAD_BITS.values():
        return (
            f"its classifier has {config['classifier_bits']} bits, but the form has heads of "
            f"{' or '.join(map(str, sorted(HEAD_BITS.values())))}{_OTHER_FORMS}"
        )
    if config.get("mask_scope") == "head" and (config.get("ne") or config.get("ratio")):
        return f"mask_scope='head' silences frozen weights, for which the form has no place{_OTHER_FORMS}"
    if type(config.get("r")) is not int or not isinstance(config.get("lora_alpha"), (int, float)):
        return f"its settings have r={config.get('r')!r} and lora_alpha={config.get('lora_alpha')!r}"
    for name in ("rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(name):
            return f"it has {name}, but the form has one rank, one scale and no bias{_OTHER_FORMS}"
    return None


def _problem_of_base_model(base: str | os.PathLike | None) -> str | None:
    """Why a model is not the one that the form is for; None where that cannot be known."""
    if base and os.path.isdir(base):
        try:
            config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            return f"the configuration of the base model {os.fspath(base)!r} cannot be read: {error}"
        expected = {
            "model_type": "vit",
            "hidden_size": WIDTH,
            "num_hidden_layers": NUM_BLOCKS,
            "patch_size": PATCH_SIZE,
        }
        found = {name: getattr(config, name, None) for name in expected}
        return None if found == expected else f"the base model {os.fspath(base)!r} is no ViT-B/16: it has {found}"
    if base and os.fspath(base) != BASE_MODEL:
        return (
            f"its base model is {os.fspath(base)!r}, but the form knows {BASE_MODEL} ({BACKBONE}) alone; if it is a copy "
            f"of that, say --base_model {BASE_MODEL}"
        )
    return None


def _empty_vit() -> nn.Module:
    """A ViT-B/16 without weights: its names are all that is wanted."""
    with torch.device("meta"):
        return transformers.ViTForImageClassification(transformers.ViTConfig())


def _projections(vit: nn.Module) -> list[str]:
    """Names of q and v of block 0, q and v of block 1, …"""
    layouts = resolve_heads(vit).items()
    return [name for name, layout in layouts if layout.parts[0].role in ("query", "value")]
