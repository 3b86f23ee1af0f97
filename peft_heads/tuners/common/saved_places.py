"""What an adapter's file of weights must hold: a place for every key and a key for every place, of the right shape."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES, AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ...adapter_folder.labels import LABELS_FILE
from ...adapter_folder.weights_file import TensorInfo
from .classifiers import QuantizedLinear
from .head_mask import masked_layers
from .mask_keys import IN_MODEL, MASKS, NEURON_KIND, is_mask_key
from .saved_keys import PACKED, is_adapter_key, module_of
from .saved_settings import is_settings_key
from .targets import module_patterns


# What PEFT saves while an adapter is trained, and has no place for where it predicts.
TRAINING_ONLY = ("lora_monteclora_sampler.",)
# The name that an adapter has while it is tried.
TRIAL = "trial"


@dataclass(frozen=True)
class Place:
    """A tensor that an adapter's file has.

    Attributes:
        shape: Its shape; None for bytes, whose number is not known beforehand.
        dtype: `torch.bool` of masks, `torch.uint8` of packed codes; any other of floating point stands for all of them.
        rows_of: Of a layer that is trained in full, and may have another number of outputs: the key that says how many.
        is_optional: Whether it may be missing.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    rows_of: str | None = None
    is_optional: bool = False


def places_of(model: nn.Module, own: dict[str, torch.Tensor]) -> dict[str, Place]:
    """What the file of an adapter holds, by key.

    Args:
        model: The base model with the adapter `TRIAL` in it.
        own: What PEFT saves of it beside what is trained in full.
    """
    places = {
        key: Place(tuple(value.shape), value.dtype) for key, value in own.items() if not is_mask_key(key, IN_MODEL)
    }
    for name, layer in masked_layers(model, TRIAL):
        key = f"{name}.{layer.head_masks_name}.mask"
        places[key] = Place((layer.head_layout[TRIAL].num_heads,), torch.bool, is_optional=True)
    state_dict = model.state_dict()
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            inside = {key.removeprefix(f"{name}."): v for key, v in state_dict.items() if key.startswith(f"{name}.")}
            for key, value in wrapper.adapter_state_dict(TRIAL, inside).items():
                places[f"{name}.{key}"] = Place(tuple(value.shape), value.dtype)
    for name, head in trial_classifiers(model).items():
        for parameter, _ in head.named_parameters(recurse=False):
            place = places[f"{name}.{parameter}"]
            places[f"{name}.{parameter}"] = replace(place, rows_of=f"{name}.weight")
    return places


def check_infos(
    infos: dict[str, TensorInfo],
    places: dict[str, Place],
    *,
    frozen: Iterable[str],
    packable: Iterable[str] = (),
    packed_classifiers: Iterable[str] = (),
    spare_masks: Iterable[str] = (),
    foreign: Container[str] = (),
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Raise ValueError unless an adapter's file holds what its configuration says.

    Args:
        infos: What is in the file, by the names of the model.
        places: What should be.
        frozen: Names of the base model's weights.
        packable: Modules whose factors may be packed.
        spare_masks: Modules that may have a mask for which the adapter has no place.
        packed_classifiers: Keys of weights that may be packed where they stand.
        foreign: Modules whose weights may have no place.
        ignore_mismatched_sizes: Whether the user has said that other shapes do not matter.
    """
    places = dict(places)
    for name in packable:
        if f"{name}.{PACKED}" in infos:
            for key in ("lora_A.weight", "lora_B.weight", *MASKS):
                places.pop(f"{name}.{key}", None)
            places[f"{name}.{PACKED}"] = Place(None, torch.uint8)
    for key in packed_classifiers:
        if key in infos and infos[key].dtype == torch.uint8:
            places[key] = Place(None, torch.uint8)
    known = {key for key in infos if is_settings_key(key) or _is_embedding(key)}
    known |= {key for key in infos if any(part in key for part in TRAINING_ONLY)}
    known |= {key for key in infos if is_mask_key(key) and module_of(key) in set(spare_masks)}
    surplus = [key for key in infos if key not in places and key not in known and module_of(key) not in foreign]
    if surplus:
        raise ValueError(_no_place(surplus, set(frozen), sum(is_mask_key(key) for key in infos)))
    missing = [key for key, place in places.items() if key not in infos and not place.is_optional]
    if missing:
        raise ValueError(
            f"Found missing adapter keys: it has no {missing[0]}{_others(missing)}, which an adapter with these settings has; the configuration or "
            "the weights were edited, or belong to different adapters"
        )
    for key, place in places.items():
        if key in infos:
            _check_one(key, infos[key], place, infos, ignore_mismatched_sizes)


def _check_one(
    key: str, info: TensorInfo, place: Place, infos: dict[str, TensorInfo], ignore_mismatched_sizes: bool
) -> None:
    if place.dtype == torch.bool and is_mask_key(key):
        if info != TensorInfo(place.shape, place.dtype):
            raise ValueError(
                f"the {'neuron' if NEURON_KIND in key else 'head'} mask of {module_of(key)} must be a bool tensor of shape {place.shape}; got {info.dtype} of "
                f"shape {info.shape}"
            )
        return
    is_float = info.dtype is not None and info.dtype.is_floating_point
    if not (is_float if place.dtype.is_floating_point else info.dtype == place.dtype):
        expected = "numbers of floating point" if place.dtype.is_floating_point else place.dtype
        raise ValueError(f"{key} is a tensor of {info.dtype or 'an unknown dtype'} (expected {expected})")
    if place.shape is None or ignore_mismatched_sizes:
        return
    expected = place.shape
    weight = infos.get(place.rows_of)
    if weight is not None and weight.dtype == torch.uint8:
        return  # its bytes say how many rows it has
    if weight is not None and weight.shape[:1] > (0,):
        expected = (weight.shape[0], *expected[1:])
    if info.shape != expected:
        raise ValueError(
            f"{key} has the shape {info.shape}, but with these settings it has {expected}; the configuration or the "
            "weights were edited, or belong to different adapters or base models"
        )


def _no_place(surplus: list[str], frozen: set[str], all_masks: int) -> str:
    of_base = [key for key in surplus if key.replace(".base_layer.", ".") in frozen]
    if of_base:
        return (
            f"it has weights of the frozen base model ({of_base[0]}{_others(of_base)}), which its configuration does "
            "not save and which would stay when the adapter is disabled; name the module in modules_to_save, or remove "
            "them from the file"
        )
    ours = [key for key in surplus if is_adapter_key(key)]
    masks = [module_of(key) for key in ours if is_mask_key(key)]
    if masks and len(masks) == all_masks:
        return f"its masks are those of {module_patterns(masks)}: is it an adapter of another model?"
    key = (ours or surplus)[0]
    return (
        f"it has {key}{_others(surplus)}, for which an adapter with these settings has no place in the model (module "
        f"{module_of(key) or key}); the configuration or the weights were edited, or belong to different adapters or "
        "base models"
    )


def _is_embedding(key: str) -> bool:
    """Whether PEFT may have saved the key because of `save_embedding_layers`: no adapter has a place for it."""
    return module_of(key).rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def _others(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def trial_classifiers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """What the adapter `TRIAL` trains in full and may have another number of outputs, by name in the base model."""
    return {
        ".".join(filter(None, [name, inner])): module
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and TRIAL in wrapper.modules_to_save
        for inner, module in wrapper.modules_to_save[TRIAL].named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def check_classifiers(
    heads: dict[str, nn.Module],
    infos: dict[str, TensorInfo],
    places: dict[str, Place],
    own_labels: dict[int, str] | None,
    labels: dict[int, str] | None,
) -> None:
    """Raise ValueError if a packed classifier's bias has another size, or the folder names more or fewer classes.

    Args:
        heads: Trained heads, by name, into which packed ones have been read.
        infos, places: What is in the file, and what should be.
        own_labels: Of the base model.
        labels: Of the folder.
    """
    for name, head in heads.items():
        weight, bias = infos.get(f"{name}.weight"), infos.get(f"{name}.bias")
        if weight is None:
            continue
        is_packed = isinstance(head, QuantizedLinear) and weight.dtype == torch.uint8
        outputs = len(head.packed_weight.codes) if is_packed else weight.shape[0]
        if is_packed and bias is not None and bias.shape != (outputs,):
            raise ValueError(f"{name}.bias has the shape {bias.shape}, but the packed weight has {outputs} outputs")
        # of a detector the outputs are one more than the classes, say
        names_outputs = own_labels and places[f"{name}.weight"].shape[0] == len(own_labels)
        if names_outputs and labels and outputs != len(labels):
            raise ValueError(
                f"{name} has {outputs} outputs, but {LABELS_FILE} names {len(labels)} classes; they were edited, or "
                "belong to different adapters"
            )
