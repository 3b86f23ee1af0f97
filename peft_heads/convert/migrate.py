"""Rewriting a saved adapter for the module names of the transformers that is installed.

Our own adapters need it only for readers without this package: they are loaded under any name. A stock LoRA adapter
fails to load once transformers has renamed what it adapts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import nn

from ..adapter_folder.atomic import write_atomically
from ..adapter_folder.files import check_folder_files
from ..adapter_folder.settings import read_settings
from ..adapter_folder.weights_file import read_weights
from ..image_classifier import base_model_class
from ..tuners.common.registry import adapter_types
from ..tuners.common.saved_keys import RENAMED_OPTIONS, follow_renames, is_adapter_key, module_of, renamed_keys
from ..tuners.common.saved_settings import is_settings_key


def migrate_adapter(folder: str | os.PathLike, base_model: str | os.PathLike | None = None) -> dict[str, str]:
    """Rename the adapted modules in a folder's weights and configuration to what the base model calls them now.

    Both files are written beside the old ones and then renamed. Meanwhile the old weights stand aside, so that nobody
    reads them with the new configuration; should the power go then, running it again does the rest. Otherwise running
    it again does nothing.

    Args:
        folder: The adapter's folder: stock LoRA, or one of ours.
        base_model: Folder or repository of the base model, of which only the configuration is read; what the adapter
            names if None.

    Returns:
        `{old name: new name}`; empty if the names are right already.

    Raises:
        ValueError: The adapter is not understood: nothing is changed then.
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

    present = [name for name, _ in model.named_modules()]
    new_keys = renamed_keys(keys, present)
    unknown = next((key for key in new_keys.values() if module_of(key) not in present), None)
    if unknown is not None:
        raise ValueError(
            f"{folder}: {unknown} belongs to no module of {type(model).__name__}, under any name that is known; "
            "nothing was changed"
        )
    config = PeftConfig.from_pretrained(os.fspath(folder))
    names = follow_renames(config, adapted, trained, model)
    if names:
        options = {name: getattr(config, name) for name in RENAMED_OPTIONS if name in settings}
        if config.target_modules is not None and not isinstance(config.target_modules, str):
            options["target_modules"] = sorted(config.target_modules)
        weights = save({new_keys.get(key, key): tensor for key, tensor in tensors.items()}, metadata=metadata)
        os.replace(weights_file, aside)
        write_atomically(
            folder / CONFIG_NAME, json.dumps({**settings, **options}, indent=2, sort_keys=True, default=sorted)
        )
        write_atomically(weights_file, weights)
        aside.unlink()
    return names


def empty_base_model(folder: Path, settings: dict[str, Any], base_model: str | os.PathLike | None) -> nn.Module:
    """The base model without weights: its names are all that is wanted."""
    import transformers

    base = base_model or settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder} does not say which base model the adapter belongs to; name it (--base_model)")
    try:
        config = transformers.AutoConfig.from_pretrained(
            base, revision=settings.get("revision") or "main", trust_remote_code=False
        )
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:  # JSON that is no mapping
        raise ValueError(f"{folder}: the base model's configuration cannot be read from {base!r}: {error}") from error
    model_class = base_model_class(settings, folder)
    try:
        with torch.device("meta"):
            return getattr(model_class, "from_config", model_class)(config)  # an Auto class, a class
    except Exception as error:  # transformers checks few of the sizes in a configuration
        raise ValueError(
            f"{folder}: there is no {model_class.__name__} by the configuration of {base!r}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
