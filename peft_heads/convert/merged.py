"""An adapter merged into its base model: an ordinary checkpoint of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter_folder.atomic import new_folder
from ..adapter_folder.settings import read_settings
from ..image_classifier import fetch_adapter, quiet_loading
from .source import check_type, load_complete_adapter, save_processor, sources


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def export_merged(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge an adapter (ours or stock LoRA) into its base model and write an ordinary checkpoint of transformers.

    The checkpoint is in float32 and has labels and image processor: `AutoModelForImageClassification` and
    `AutoImageProcessor` suffice to load it. Arguments, result and errors are those of
    [`peft_heads.convert.lora.export_lora`].
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        check_type(source, read_settings(source))
        save_checkpoint(folder, merge(load_whole_model(source, base_model), source), source, base_model)
    return Path(target)


def load_whole_model(source: Path, base_model: str | os.PathLike | None) -> PeftModel:
    """The model with its adapter; raises ValueError if parts of it would be random, because no file holds them."""
    model, untrained = load_complete_adapter(source, base_model)
    if untrained:
        raise ValueError(
            f"neither {source} nor its base model holds {', '.join(untrained)}: they would be random in the "
            "checkpoint; name the base model that the adapter was trained on (--base_model)"
        )
    return model


def merge(model: PeftModel, source: Path) -> PreTrainedModel:
    """The base model with the adapter in its weights, in place."""
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN
        raise ValueError(f"{source} cannot be merged: {error}") from error


def save_checkpoint(folder: Path, model: PreTrainedModel, source: Path, base_model: str | os.PathLike | None) -> None:
    """Write model and image processor; the model's configuration has the labels."""
    with quiet_loading():
        model.save_pretrained(folder)
    base = base_model or read_settings(source).get("base_model_name_or_path")
    save_processor(folder, source, base)
