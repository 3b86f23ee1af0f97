"""The keys of an adapter's file, and modules that have other names in the model."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ...adapter_folder.weights_file import find_weights, read_infos
from ...backbones.renames import match_renamed
from ...backbones.targets import shortest_names
from ...heads.detect import matches_pattern
from ...heads.traversal import named_targets
from .method_registry import parameter_prefixes
from .saved_settings import is_settings_key
from .targets import module_patterns


BASE = "base_model.model."
# In place of a module's factors and mask, their codes.
PACKED = "lora_packed"
# Options whose values may be names of modules, beside `target_modules`.
NAME_PATTERNS = ("rank_pattern", "alpha_pattern", "num_heads")
NAME_FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
RENAMED_OPTIONS = (*NAME_PATTERNS, *NAME_FILTERS, "modules_to_save")


def saved_keys(path_or_repo: str, subfolder: str | None = None, **download_kwargs: Any) -> list[str]:
    """Keys of an adapter's weights, without those that stand for a setting; empty where there is no file of weights.

    Raises:
        ValueError: The file is damaged.
    """
    path = find_weights(path_or_repo, subfolder, **download_kwargs)
    return [] if path is None else [key for key in read_infos(path) if not is_settings_key(key)]


@functools.cache
def _end_of_module(prefixes: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\.({'|'.join(prefixes)}|base_layer\.|modules_to_save\.)|\.[^.]*$")


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
    inside = _end_of_module(parameter_prefixes()).search(name)
    return name[: inside.start()] if inside else ""


def is_adapter_key(key: str) -> bool:
    """Whether a key of an adapter's file is the method's, not that of a module trained in full."""
    return any(f".{prefix}" in key for prefix in parameter_prefixes())


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
    unknown = {module_of(key) for key in keys.values() if is_adapter_key(key)} - set(present)
    if unknown:
        warnings.warn(
            f"the adapter file has weights for modules that the model has under no known name, which are ignored: "
            f"{module_patterns(sorted(unknown))}"
        )
    return {keys[key]: value for key, value in state_dict.items()}


def follow_renames(config: PeftConfig, adapted: list[str], trained: list[str], model: nn.Module) -> dict[str, str]:
    """Let the configuration of a saved adapter mean the same modules in a model that names them otherwise.

    Which modules the adapter has is read from its file, so that every way of saying it (lists, patterns, layers,
    exclusions) comes out right; the names that are written into `config` are the model's.

    Args:
        config: A configuration as it was saved.
        adapted: The modules that the adapter's file has weights of the method for.
        trained: The modules that it has in full (`modules_to_save`).
        model: The base model.

    Returns:
        `{old name: new name}` of the modules that are renamed.
    """
    renamed = match_renamed([*adapted, *trained], [name for name, _ in named_targets(model)])
    names = {name: renamed.get(name, name) for name in adapted}
    if any(name in renamed for name in adapted):
        config.target_modules = set(shortest_names(list(names.values()), model))
        for option in NAME_FILTERS:  # the modules are named one by one now
            setattr(config, option, None)
        for option in NAME_PATTERNS:
            patterns = getattr(config, option, None)
            if isinstance(patterns, dict):
                values = {}
                for old, new in names.items():
                    # the new names stand there already if a migration was interrupted
                    keys = [key for name in (old, new) for key in patterns if matches_pattern(key, name)]
                    if keys:
                        values[new] = patterns[keys[0]]
                setattr(config, option, values)
    if config.modules_to_save:
        entries = []
        for entry in config.modules_to_save:  # the ends of names
            now = [renamed[name] for name in trained if name in renamed and name.endswith(entry)]
            entries += [entry] if all(name.endswith(entry) for name in now) else now
        config.modules_to_save = entries
    return renamed


def follow_file(config: PeftConfig, model: nn.Module) -> None:
    """Let a configuration that was read from a file mean the same modules in a model that names them otherwise.

    Raises:
        ValueError: Modules that are trained in full have other names in the file.
    """
    keys = saved_keys(**config.carried.source)
    adapted = list(dict.fromkeys(module_of(key) for key in keys if is_adapter_key(key)))
    trained = list(dict.fromkeys(module_of(key) for key in keys if not is_adapter_key(key)))
    in_full = tuple(config.modules_to_save or ())  # the ends of names
    renamed = follow_renames(config, adapted, trained, model)
    moved = [name for name in trained if name in renamed and name.endswith(in_full)]
    if moved:
        # PEFT looks them up in the file before a tuner can say what they are called there
        raise ValueError(
            f"the adapter trains modules whose names transformers has changed: {module_patterns(moved)} (now "
            f"{module_patterns(renamed[name] for name in moved)}); rewrite the adapter with `peft-heads migrate "
            f"{config.carried.source['path_or_repo']}`"
        )
