"""The base model that an adapter's settings name: its class, and the model without numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._compat.transformers import is_model_class


def base_model_class(settings: dict[str, Any], folder: str | os.PathLike) -> Any:
    """The class of transformers that an adapter was trained on, by its settings; an Auto class where they name none.

    For instance, a ViT-MAE checkpoint has no image classifier of its own and is read as a ViT's.

    Args:
        settings: The adapter's configuration.
        folder: The adapter's folder, for the message.

    Raises:
        ValueError: The settings name something of transformers that is neither a model nor an Auto class.
    """
    import transformers

    mapping = settings.get("auto_mapping") or {}
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else mapping
    if name is None:
        return transformers.AutoModelForImageClassification
    try:
        # a name that transformers does not have is that of a class of the user's own
        found = getattr(transformers, name, None) or transformers.AutoModelForImageClassification
        if is_model_class(found):
            return found
    except (TypeError, ImportError, RuntimeError):  # no name, no class, or one that cannot be imported
        pass
    raise ValueError(
        f"{folder}: auto_mapping of the adapter's settings names {str(name)[:80]!r} as the class of the base model (expected a "
        "model class, or an Auto class, of transformers); it was edited"
    )


def empty_base_model(folder: Path, settings: dict[str, Any], base_model: str | os.PathLike | None) -> nn.Module:
    """The base model on the meta device: it has names and shapes, and no numbers.

    Args:
        folder: The adapter's folder, for the messages.
        settings: The adapter's configuration.
        base_model: Folder or repository of the base model, of which only the configuration is read; what the settings
            name if None.

    Raises:
        ValueError: The settings name no base model, or its configuration cannot be read or is wrong.
    """
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
