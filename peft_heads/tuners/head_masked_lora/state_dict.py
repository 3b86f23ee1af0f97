"""What is particular about the weights of a head-masked adapter in a file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ...heads.maskable import check_mask, deactivated_heads
from ...heads.renames import match_renamed
from ...heads.resolve import named_targets
from ...sharding import whole
from ..targets import module_patterns
from ..task_heads import QuantizedLinear
from .config import HeadMaskedLoraConfig
from .layer import HeadMaskedLinear


BASE = "base_model.model."


def masked_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, HeadMaskedLinear]]:
    """`(name in the model's state dict, layer)` of the layers that carry a mask for the adapter."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, HeadMaskedLinear) and adapter_name in module.lora_head_mask
    ]


def saved_keys(path_or_repo: str, subfolder: str | None = None, **download_kwargs: Any) -> list[str]:
    """Keys of an adapter's weights; empty where there is no safetensors file."""
    path = Path(path_or_repo, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    if not path.parent.is_dir():
        try:  # PEFT is going to ask for the same file
            path = hf_hub_download(path_or_repo, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download_kwargs)
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return []
    elif not path.exists():
        return []
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def module_of(key: str) -> str:
    """The base model's module that a key of an adapter's file belongs to.

    Example:
        >>> module_of("base_model.model.vit.layers.0.attention.q_proj.lora_A.weight")
        'vit.layers.0.attention.q_proj'
        >>> module_of("base_model.model.classifier.bias")
        'classifier'
    """
    name = key.removeprefix(BASE)
    # what PEFT puts inside of a module, and the module's own parameters
    inside = re.search(r"\.(lora_|base_layer\.|modules_to_save\.)|\.[^.]*$", name)
    return name[: inside.start()] if inside else ""


def is_lora_key(key: str) -> bool:
    return ".lora_" in key


def renamed_keys(keys: Iterable[str], present: list[str]) -> dict[str, str]:
    """`{key: key}` of a file's weights, by the names that the model has for their modules.

    Args:
        keys: Keys of the file.
        present: Names of the model's modules.
    """
    keys = list(keys)
    renamed = match_renamed(dict.fromkeys(map(module_of, keys)), present)
    return {key: key.replace(module_of(key), renamed.get(module_of(key), module_of(key)), 1) for key in keys}


def rename_modules(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's weights by the names that their modules have in the model; warns of modules that it has not."""
    present = [name.removeprefix(BASE) for name, _ in named_targets(model)]
    keys = renamed_keys(state_dict, present)
    unknown = {module_of(key) for key in keys.values() if is_lora_key(key)} - set(present)
    if unknown:
        warnings.warn(
            f"the adapter file has weights for modules that the model has under no known name, which are ignored: "
            f"{module_patterns(sorted(unknown))}"
        )
    return {keys[key]: value for key, value in state_dict.items()}


def make_plain_lora(
    model: nn.Module,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    model_state_dict: dict[str, torch.Tensor],
) -> None:
    """Write into `state_dict` what makes the weights right for a reader that knows nothing of masks.

    Rows that the adapter must not change become zeros, and DoRA's magnitude there that of the frozen row.

    Args:
        model: The model with the adapter in it.
        adapter_name: The adapter.
        state_dict: Its weights.
        model_state_dict: The model's, of which the frozen weights are taken: where the model is sharded they may have
            been put together on this process alone.
    """
    for name, layer in masked_layers(model, adapter_name):
        layout, mask = layer.head_layout[adapter_name], layer.get_head_mask(adapter_name)
        active = layout.active_rows(mask)
        if active.all():
            continue
        for suffix in ("weight", "bias"):
            key = f"{name}.lora_B.{adapter_name}.{suffix}"
            if key in state_dict:
                state_dict[key] = layout.mask_rows(state_dict[key], mask.to(state_dict[key].device))
        key = f"{name}.lora_magnitude_vector.{adapter_name}"
        if key in state_dict:
            magnitude = state_dict[key]
            weight = whole(model_state_dict.get(f"{name}.base_layer.weight", layer.get_base_layer().weight.detach()))
            norm = torch.linalg.norm(weight, dim=1).to(magnitude)
            state_dict[key] = torch.where(active.to(magnitude.device), magnitude, norm)


def write_quantized(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Write into an adapter's `state_dict` the values by which k-bit weights act, for a reader that quantises nothing.

    They are no state to train on from: quantised again, they would be others.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, HeadMaskedLinear) and adapter_name in module.lora_quantizer:
                state_dict[f"{name}.lora_A.weight"] = module.quantized_down(adapter_name)
                state_dict[f"{name}.lora_B.weight"] = module.quantized_up(adapter_name)
            head = getattr(module, "modules_to_save", {})
            if adapter_name in head and isinstance(head[adapter_name], QuantizedLinear):
                state_dict[f"{name}.weight"] = head[adapter_name].quantized_weight()


def check_state_dict(
    model: nn.Module, config: HeadMaskedLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the file's masks are there, fit the adapter, and agree with its weights."""
    lost = [k for k, v in state_dict.items() if k.endswith("lora_head_mask.mask") and not v.all()]
    if lost:
        raise ValueError(
            f"the adapter file deactivates heads ({lost[0]}, …), but adapter {adapter_name!r} carries no mask there: "
            f"it was created with ne={config.ne}, ratio={config.ratio}; create it with the settings it was saved with"
        )
    for name, layer in masked_layers(model, adapter_name):
        mask = state_dict.get(f"{name}.lora_head_mask.{adapter_name}.mask")
        if mask is None:
            raise ValueError(
                f"the adapter file has no head mask for {name}, which an adapter with ne={config.ne}, "
                f"ratio={config.ratio} must have; was it made by another method, or edited? A plain LoRA adapter is "
                "loaded with config=HeadMaskedLoraConfig.from_lora(path)"
            )
        layout = layer.head_layout[adapter_name]
        check_mask(name, mask, layout.num_heads)
        for suffix in ("weight", "bias"):
            rows = state_dict.get(f"{name}.lora_B.{adapter_name}.{suffix}")
            if rows is None or rows.shape[0] != layout.out_features:
                continue  # PEFT reports missing keys and mismatched shapes
            off = ~layout.active_rows(mask).to(rows.device)
            if rows[off].count_nonzero():
                masks = dict(zip(layout.named_parts(name), layout.split(mask), strict=True))
                off_heads = [f"heads {heads} of {key}" for key, heads in deactivated_heads(masks).items()]
                raise ValueError(
                    f"the adapter file contradicts itself: in {name} the mask deactivates "
                    f"{', '.join(off_heads) or 'nothing'} and fused_parts is {config.fused_parts!r}; the deactivated "
                    f"rows of lora_B.{suffix} must be zero, but {int(rows[off].count_nonzero())} of "
                    f"{int(rows[off].numel())} entries are not; the mask or the weights were edited"
                )
