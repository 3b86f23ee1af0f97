"""Merges an adapter and removes its deactivated heads and neurons: an ordinary, smaller checkpoint of transformers."""

from __future__ import annotations

import os
from pathlib import Path

from peft import LoraConfig

from ..adapter_folder.atomic import new_folder
from ..adapter_folder.settings import read_settings
from ..heads.protocol import get_head_masks
from ..image_classifier import fetch_adapter
from ..tuners.common.method_registry import adapter_types
from .merged import load_whole_model, merge, save_checkpoint
from .smaller import prune_heads
from .source import check_type, sources


def export_pruned(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge an adapter with `mask_scope="head"` and write the model without its deactivated heads.

    The checkpoint can be read by the installed version of transformers (see [`prune_heads`]). Arguments, result and
    errors are those of [`peft_heads.convert.lora.export_lora`].
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        settings = read_settings(source)
        check_type(source, settings, adapter_types(LoraConfig))
        if settings.get("mask_scope") != "head":
            raise ValueError(
                f"{source} has mask_scope={settings.get('mask_scope')!r}, under which the frozen heads go on working "
                "and cannot be removed (expected 'head'); use --to lora or --to merged"
            )
        model = load_whole_model(source, base_model)
        masks = get_head_masks(model)
        save_checkpoint(folder, prune_heads(merge(model, source), masks), source, base_model)
    return Path(target)
