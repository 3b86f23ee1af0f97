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

from ...adapter_folder.atomic import new_folder, write_atomically, write_together
from ...adapter_folder.labels import write_labels
from ...adapter_folder.settings import read_settings
from ...adapter_folder.weights_file import find_weights, read_infos, read_weights
from ...backbones.targets import default_targets
from ...functional.quantization import BITS
from ...image_classifier import fetch_adapter
from ...tuners import HeadMaskedLoraConfig, pack_adapter
from ...tuners.common.classifiers import default_labels
from ...tuners.common.method_registry import adapter_types
from ...tuners.common.saved_settings import is_settings_key
from ...tuners.head_masked_lora.config import FULL_PRECISION
from ...tuners.head_masked_lora.packed import PACKED
from ..file_tensors import prunes_neurons
from ..source import PROCESSOR_FILE, check_type, load_complete_adapter
from .base_model import empty_vit, problem_of_base_model
from .files import dataset_in_name, encode, read, settings_beside
from .settings import BACKBONE, BASE_MODEL, CLASSIFIER_BITS, OTHER_FORMS, Settings, encode_settings, shortest_scale
from .state_dict import state_dict_of, weights_of


# The authors' images: 224 × 224, bicubic, from 0 to 1. Unlike the base model's own, they are not normalised.
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": False,
}


def import_bi_lora(
    file: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder for a `.bin` of Bi-LoRA's authors and the `.yaml` beside it.

    The adapter has the codes, means and deviations of the file. Its classes are named by their numbers. Its image
    processor is the authors', who do not normalise images.

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
        ValueError: One of them is not of the form of [`peft_heads.convert.bi_lora.files`], or the target exists, or
            the base model is not a ViT-B/16; nothing is written then.
    """
    base = os.fspath(base_model or BASE_MODEL)
    with new_folder(target, overwrite, (file, settings_beside(Path(file)), base)) as folder:
        settings, weights = read(file)
        problem = problem_of_base_model(base) if os.path.isdir(base) else None
        if problem:
            raise ValueError(f"{file} cannot be imported: {problem}")
        save_file(state_dict_of(weights), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        alpha = settings.scale * settings.dim
        HeadMaskedLoraConfig(
            ne=0,
            r=settings.dim,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            target_modules=default_targets(empty_vit()),
            modules_to_save=["classifier"],
            adapter_bits=settings.bit,
            classifier_bits=CLASSIFIER_BITS[settings.method],
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

    An adapter that was imported is written as it was, byte for byte, if the file has the same name: the dataset is the
    part before `-bit`.

    Args:
        adapter: Folder or repository of the adapter. Unless it is packed, its base model is loaded as well.
        target: The new `.bin`.
        base_model: Folder or repository of the base model; what the adapter names if None.
        overwrite: Whether files that are there are replaced.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: The form has no place for something that the adapter has, or the adapter is damaged, or the target
            exists; nothing is written then.
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
    problem = _problem_of_settings(config) or problem_of_base_model(
        base_model or config.get("base_model_name_or_path")
    )
    if problem:
        raise ValueError(f"{source} cannot be written as a file of Bi-LoRA: {problem}")
    dataset = dataset_in_name(file, config["adapter_bits"], config["r"])
    tensors = _packed_state_dict(source, base_model)
    try:
        weights = weights_of(tensors, config)
        settings = _settings(config, dataset, weights.num_class)
    except ValueError as error:
        raise ValueError(f"{source} cannot be written as a file of Bi-LoRA: {error}") from error
    write_together({settings_file: encode_settings(settings), file: encode(weights)})
    return file


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
    rank, alpha, classifier_bits = config["r"], config["lora_alpha"], config.get("classifier_bits", FULL_PRECISION)
    return Settings(
        dataset=dataset,
        num_class=num_class,
        backbone=BACKBONE,
        method=next(method for method, bits in CLASSIFIER_BITS.items() if bits == classifier_bits),
        dim=rank,
        bit=config["adapter_bits"],
        scale=alpha / math.sqrt(rank) if config.get("use_rslora") else shortest_scale(alpha, rank),
    )


def _problem_of_settings(config: dict[str, Any]) -> str | None:
    """Why the form has no place for an adapter with these settings."""
    if config.get("adapter_bits", FULL_PRECISION) not in BITS:
        return f"it has no k-bit weights; train with adapter_bits of {', '.join(map(str, BITS))}"
    if config.get("classifier_bits", FULL_PRECISION) not in CLASSIFIER_BITS.values():
        return (
            f"its classifier has {config['classifier_bits']} bits, but the form has heads of "
            f"{' or '.join(map(str, sorted(CLASSIFIER_BITS.values())))}{OTHER_FORMS}"
        )
    if prunes_neurons(config):
        return f"it has neuron masks (neuron_ratio, target_speed), for which the form has no place{OTHER_FORMS}"
    if config.get("mask_scope") == "head" and (config.get("ne") or config.get("ratio")):
        return f"mask_scope='head' silences frozen weights, for which the form has no place{OTHER_FORMS}"
    if type(config.get("r")) is not int or not isinstance(config.get("lora_alpha"), (int, float)):
        return f"its settings have r={config.get('r')!r} and lora_alpha={config.get('lora_alpha')!r}"
    for name in ("rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(name):
            return f"it has {name}, but the form has one rank, one scale and no bias{OTHER_FORMS}"
    return None
