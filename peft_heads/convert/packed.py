"""A k-bit adapter with codes in place of its full-precision weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..adapter_folder.atomic import new_folder
from ..adapter_folder.score_files import HEAT_MAP_FILE, SCORES_FILE
from ..adapter_folder.settings import read_settings
from ..image_classifier import fetch_adapter
from ..tuners.common.method_registry import method_of, registered_methods
from .source import PROCESSOR_FILE, load_complete_adapter, sources


MODEL_CARD = "README.md"


def export_packed(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a k-bit adapter with its codes instead of its full-precision weights: `adapter_bits` per weight.

    It remains a head-masked adapter, with everything else that its folder holds. Arguments, result and errors are those
    of [`peft_heads.convert.lora.export_lora`].
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        settings = read_settings(source)
        method = method_of(settings.get("peft_type"))
        if method is None or method.pack is None:
            packed = (other.peft_type for other in registered_methods() if other.pack is not None)
            raise ValueError(
                f"{source} holds an adapter of type {settings.get('peft_type')}, which has no k-bit weights (expected "
                f"{' or '.join(packed)})"
            )
        model, _ = load_complete_adapter(source, base_model)
        method.pack(model, model.active_adapter)
        for name in (MODEL_CARD, PROCESSOR_FILE, SCORES_FILE, HEAT_MAP_FILE):
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        model.save_pretrained(str(folder))
    return Path(target)
