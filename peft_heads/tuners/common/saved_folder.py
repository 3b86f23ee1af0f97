"""The trial of an adapter's folder: its files must fit each other and the model before anything is changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from ..._compat.loading import Loading
from ...adapter_folder.contents import FolderContents
from ...adapter_folder.labels import find_labels
from ...adapter_folder.weights_file import NAMES, TensorInfo, find_weights, read_infos, read_weights
from ...heads.traversal import named_targets
from .classifiers import get_labels
from .folder_config import AdapterFolderConfig
from .saved_keys import BASE, follow_file, is_adapter_key, module_of, renamed_keys
from .saved_places import TRIAL, check_classifiers, check_infos, places_of, trial_classifiers
from .saved_settings import is_settings_key
from .setting_types import refusal
from .skeleton import skeleton_of


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
        heads = trial_classifiers(trial)
        check_infos(
            infos,
            places,
            frozen={name.replace(".base_layer.", ".") for name, _ in _frozen(trial)},
            # of stock LoRA PEFT drops what belongs to no module, and we warn
            foreign={module_of(key) for key in infos} - set(dict(named_targets(trial)))
            if config.carried.is_stock
            else (),
            packable=[n for n, m in trial.named_modules() if hasattr(m, "lora_quantizer") and TRIAL in m.lora_A],
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
            check_classifiers(heads, infos, places, get_labels(model), labels)
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


def _frozen(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the base model, by their names in it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if f".{TRIAL}." not in name and not name.endswith(f".{TRIAL}"):
            yield name.replace(".original_module.", "."), tensor


def _looked_at(keys: dict[str, str], infos: dict[str, TensorInfo]) -> set[str]:
    """The keys of a file whose values can contradict each other: of all but what is trained in full and not packed."""
    return {
        key
        for key, new in keys.items()
        if is_adapter_key(new) or is_settings_key(new) or infos[new].dtype == torch.uint8
    }
