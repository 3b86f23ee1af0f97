"""Rewrites a saved adapter for the module names of the transformers that is installed.

A stock LoRA adapter fails to load once transformers has renamed the modules that it adapts. Our own adapters are loaded
under any name; they need it only for readers without this package.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import nn

from ..adapter_folder.atomic import write_atomically
from ..adapter_folder.base_model import empty_base_model
from ..adapter_folder.files import check_folder_files
from ..adapter_folder.settings import read_settings
from ..adapter_folder.weights_file import read_weights
from ..tuners.common.method_registry import adapter_types
from ..tuners.common.saved_keys import RENAMED_OPTIONS, follow_renames, is_adapter_key, module_of, renamed_keys
from ..tuners.common.saved_settings import is_settings_key


def migrate_adapter(folder: str | os.PathLike, base_model: str | os.PathLike | None = None) -> dict[str, str]:
    """Rename the adapted modules in a folder's weights and configuration to what the base model calls them now.

    Both files are written beside the old ones and then renamed. Meanwhile the old weights have another name, so that
    nobody reads them with the new configuration. If this is interrupted, running it again completes it; otherwise
    running it again changes nothing.

    Args:
        folder: The adapter's folder: stock LoRA, or one of ours.
        base_model: Folder or repository of the base model; what the adapter names if None. Only its configuration is
            read.

    Returns:
        `{old name: new name}`; empty if the names are right already.

    Raises:
        ValueError: The adapter cannot be rewritten; nothing is changed then.
        FileNotFoundError: There is no adapter in the folder.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    check_folder_files(folder)
    weights_file, aside = folder / SAFETENSORS_WEIGHTS_NAME, folder / f"_{SAFETENSORS_WEIGHTS_NAME}.old"
    if aside.exists():  # of a migration that was interrupted
        os.replace(aside, weights_file) if not weights_file.exists() else aside.unlink()
    peft_type = settings.get("peft_type")
    if peft_type not in adapter_types():
        raise ValueError(
            f"{folder} holds an adapter of type {peft_type}; names are known for {', '.join(adapter_types())} alone"
        )
    tensors, metadata = read_weights(weights_file) if weights_file.exists() else {}, {"format": "pt"}
    keys = [key for key in tensors if not is_settings_key(key)]
    adapted = list(dict.fromkeys(module_of(key) for key in keys if is_adapter_key(key)))
    trained = list(dict.fromkeys(module_of(key) for key in keys if not is_adapter_key(key)))
    if not adapted:
        method = "LoRA" if peft_type in adapter_types(LoraConfig) else peft_type
        raise ValueError(f"{folder} has no {method} weights in {SAFETENSORS_WEIGHTS_NAME}; other formats are not read")
    model = empty_base_model(folder, settings, base_model)
    new_keys = _new_keys(folder, keys, model)
    config = PeftConfig.from_pretrained(os.fspath(folder))
    names = follow_renames(config, adapted, trained, model)
    if names:
        weights = save({new_keys.get(key, key): tensor for key, tensor in tensors.items()}, metadata=metadata)
        new_settings = json.dumps(_new_settings(settings, config), indent=2, sort_keys=True, default=sorted)
        os.replace(weights_file, aside)
        write_atomically(folder / CONFIG_NAME, new_settings)
        write_atomically(weights_file, weights)
        aside.unlink()
    return names


def _new_keys(folder: Path, keys: list[str], model: nn.Module) -> dict[str, str]:
    """`{key: key}` by the names of the base model; raises ValueError if it has no module for one of them."""
    present = [name for name, _ in model.named_modules()]
    new_keys = renamed_keys(keys, present)
    unknown = next((key for key in new_keys.values() if module_of(key) not in present), None)
    if unknown is not None:
        raise ValueError(
            f"{folder}: {unknown} belongs to no module of {type(model).__name__}, under any name that is known; "
            "nothing was changed"
        )
    return new_keys


def _new_settings(settings: dict[str, Any], config: PeftConfig) -> dict[str, Any]:
    """The settings of the file, with the names that `config` has for modules."""
    options = {name: getattr(config, name) for name in RENAMED_OPTIONS if name in settings}
    if config.target_modules is not None and not isinstance(config.target_modules, str):
        options["target_modules"] = sorted(config.target_modules)
    return {**settings, **options}
