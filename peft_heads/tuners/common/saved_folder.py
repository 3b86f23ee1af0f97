"""What an adapter's file of weights must hold: a place for every key and a key for every place, of the right shape."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import EMBEDDING_LAYER_NAMES, AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..._compat.loading import Loading
from ...adapter_folder.contents import FolderContents
from ...adapter_folder.labels import LABELS_FILE, find_labels
from ...adapter_folder.weights_file import NAMES, TensorInfo, find_weights, read_infos, read_weights
from ...heads.traversal import named_targets
from .classifiers import QuantizedLinear, get_labels
from .folder_config import AdapterFolderConfig
from .head_mask import masked_layers
from .mask_keys import IN_MODEL, LORA_MASK, is_mask_key
from .saved_keys import BASE, PACKED, follow_file, is_adapter_key, module_of, renamed_keys
from .saved_settings import is_settings_key
from .setting_types import refusal
from .skeleton import skeleton_of
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


def check_folder(
    tuner: type, model: nn.Module, config: AdapterFolderConfig, source: dict[str, Any], loading: Loading
) -> None:
    """Raise ValueError unless the files in an adapter's folder fit each other and the model.

    The adapter is tried on the model's modules without their numbers, so that nothing is changed and little read.

    Args:
        tuner: The class of the adapter's tuner.
        model: The base model, possibly with adapters in it.
        config: The adapter's configuration, in which modules are called as in the model.
        source: Where the adapter is, as arguments of `find_weights`.
        loading: What the user has said of the loading.

    Raises:
        FileNotFoundError: The folder has no weights.
        ValueError: Its files contradict each other.
    """
    path = find_weights(**source)
    if path is None:
        folder = Path(source["path_or_repo"], source.get("subfolder") or "")
        if folder.is_dir():
            raise FileNotFoundError(f"{folder} has no weights of an adapter: neither {' nor '.join(NAMES)} is there")
        return  # PEFT says what is wrong with a repository
    try:
        infos, labels = read_infos(path), config.carried.contents.labels_in_file
        trial, config = try_adapter(tuner, model, config)
        keys = keys_in_model(infos, trial, loading.key_mapping)
        infos = {keys[key]: info for key, info in infos.items()}
        places = places_of(trial, tuner.own_tensors(trial, config, TRIAL))
        heads = _trained_classifiers(trial)
        check_infos(
            infos,
            places,
            frozen={name.replace(".base_layer.", ".") for name, _ in _frozen(trial)},
            # of stock LoRA PEFT drops what belongs to no module, and we warn
            foreign={module_of(key) for key in infos} - set(dict(named_targets(trial)))
            if config.carried.is_stock
            else (),
            packable=[name for name, layer in trial.named_modules() if hasattr(layer, "lora_quantizer")],
            packed_classifiers=[f"{name}.weight" for name in heads],
            # those of the layers that the adapter has: whether they deactivate anything is seen later
            spare_masks=[name for name, _ in named_targets(trial)],
            ignore_mismatched_sizes=loading.ignore_mismatched_sizes,
        )
        tensors = {keys[key]: value for key, value in read_weights(path, _looked_at(keys, infos)).items()}
        for key in [key for key in tensors if not is_adapter_key(key) and not is_settings_key(key)]:
            name, _, parameter = key.rpartition(".")
            tensors[f"{name}.modules_to_save.{TRIAL}.{parameter}"] = tensors.pop(key)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner._remap_adapter_state_dict_for_load(trial, config, TRIAL, tensors)
        if not loading.ignore_mismatched_sizes:
            _check_classifiers(heads, infos, places, get_labels(model), labels)
    except OSError:
        raise
    except Exception as error:
        raise refusal(path, error) from error


def check_before_writing(
    model: nn.Module, config: AdapterFolderConfig, source: dict[str, Any], loading: Loading
) -> None:
    """As `check_folder`, for an adapter that the model has, or that it gets with a configuration of the user's own."""
    if not isinstance(config, AdapterFolderConfig):
        return  # of a method from outside, without folders that we know
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.copy(config)
    try:
        if config.carried.source is not None:
            config.modules_to_save = modules_in_file(config)
        contents = FolderContents(labels_in_file=find_labels(**source))
        config.carried = replace(config.carried, source=source, contents=contents)
        follow_file(config, base_model)
        check_folder(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], base_model, config, source, loading)
    except OSError:
        raise
    except Exception as error:
        raise refusal(source["path_or_repo"], error) from error


def modules_in_file(config: AdapterFolderConfig) -> set[str] | list[str] | str:
    """What a saved adapter trains in full: nothing where its configuration does not say.

    None was found in the model that it was saved from. In another model, or by a later version, one may be found, of
    which the adapter knows nothing.
    """
    return [] if config.modules_to_save is None else config.modules_to_save


def try_adapter(tuner: type, model: nn.Module, config: AdapterFolderConfig) -> tuple[nn.Module, AdapterFolderConfig]:
    """A skeleton of the base model with the adapter in it, called `TRIAL`, and the adapter's configuration there."""
    config = copy.copy(config)
    for field in fields(config):
        setattr(config, field.name, copy.deepcopy(getattr(config, field.name)))
    labels = config.carried.contents.labels_in_file
    contents, chosen = FolderContents(labels_in_file=labels), dict(config.carried.chosen)
    config.carried = replace(config.carried, source=None, chosen=chosen, contents=contents)
    config.inference_mode, config.init_lora_weights = False, False
    if getattr(config, "velora_config", None):  # its random start normalises numbers, which a skeleton has not
        config.velora_config.init_type = "batch_average"
    skeleton = skeleton_of(model)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # the real adapter is going to warn
        tuner(skeleton, {TRIAL: config}, TRIAL)
    return skeleton, config


def keys_in_model(keys: Iterable[str], model: nn.Module, key_mapping: dict[str, str] | None = None) -> dict[str, str]:
    """`{key of a file: the same by the names of the base model}`.

    Args:
        keys: Keys of the file.
        model: The base model, possibly with adapters in it.
        key_mapping: That of `load_adapter`: `{pattern: replacement}`; the first pattern that is found is replaced.
    """
    mapped = {}
    for key in keys:
        mapped[key] = key.removeprefix(BASE)
        for pattern, replacement in (key_mapping or {}).items():
            mapped[key], found = re.subn(pattern, replacement, mapped[key])
            if found:
                break
    # what is trained in full lies in a wrapper, of whose inner names a file knows nothing
    present = [re.sub(r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)", "", n) for n, _ in named_targets(model)]
    renamed = renamed_keys(mapped.values(), present)
    return {key: renamed[new] for key, new in mapped.items()}


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
    for name, head in _trained_classifiers(model).items():
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
            for key in ("lora_A.weight", "lora_B.weight", LORA_MASK):
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
                f"the head mask of {module_of(key)} must be a bool tensor of shape {place.shape}; got {info.dtype} of "
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


def _trained_classifiers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """What the adapter `TRIAL` trains in full and may have another number of outputs, by name in the base model."""
    return {
        ".".join(filter(None, [name, inner])): module
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and TRIAL in wrapper.modules_to_save
        for inner, module in wrapper.modules_to_save[TRIAL].named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def _frozen(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the base model, by their names in it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if f".{TRIAL}." not in name and not name.endswith(f".{TRIAL}"):
            yield name.replace(".original_module.", "."), tensor


def _check_classifiers(
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


def _looked_at(keys: dict[str, str], infos: dict[str, TensorInfo]) -> set[str]:
    """The keys of a file whose values can contradict each other: of all but what is trained in full and not packed."""
    return {
        key
        for key, new in keys.items()
        if is_adapter_key(new) or is_settings_key(new) or infos[new].dtype == torch.uint8
    }
