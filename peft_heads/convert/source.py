"""The adapter that an export reads: whether it is of the right kind, its files, and the adapter on its base model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ..adapter_folder.checkpoints import read_error
from ..adapter_folder.settings import read_settings
from ..data.images import load_image_processor
from ..image_classifier import load_adapter
from ..tuners.common.method_registry import adapter_types


if TYPE_CHECKING:
    from peft import PeftModel

PROCESSOR_FILE = "preprocessor_config.json"
# Warnings about weights that were re-initialised or left out: an adapter that was loaded so must not be exported.
_INCOMPLETE = ("Found missing adapter keys", "the adapter file has weights for modules that the model has under no")


def check_type(source: Path, settings: dict[str, Any], expected: tuple[str, ...] = ()) -> None:
    """Raise ValueError for an adapter whose method is not among the expected ones, by default ours and LoRA."""
    expected = expected or adapter_types()
    if settings.get("peft_type") not in expected:
        raise ValueError(
            f"{source} holds an adapter of type {settings.get('peft_type')}; expected {' or '.join(expected)}"
        )


def sources(adapter: str | os.PathLike, base_model: str | os.PathLike | None) -> tuple:
    """The folders and repositories that an export reads, and that its target must not replace."""
    base = base_model
    if base is None and os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        base = read_settings(adapter).get("base_model_name_or_path")
    return (adapter, base) if base else (adapter,)


def load_complete_adapter(source: Path, base_model: str | os.PathLike | None) -> tuple[PeftModel, list[str]]:
    """As `load_adapter`, but incomplete weights are an error, and every error is one line that names the folder."""
    base = base_model or read_settings(source).get("base_model_name_or_path")
    try:
        with warnings.catch_warnings():
            for message in _INCOMPLETE:
                warnings.filterwarnings("error", message=message)
            # the adapter was trained beside float32 weights; in a checkpoint of 16 bits its classifier would be rounded
            return load_adapter(source, base_model, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, Warning) as error:
        faults = [f"{file} ({fault})" for file in _weights_and_settings(base) if (fault := read_error(file))]
        reason = ", ".join(faults) or " ".join(str(error).split())
        raise ValueError(f"{source} cannot be put on its base model {os.fspath(base or '')!r}: {reason}") from error


def save_processor(folder: Path, source: Path, base_model: str | os.PathLike | None) -> None:
    """Write the adapter's image processor, else the base model's.

    Nothing is written where neither has one; a damaged one is an error.
    """
    if (source / PROCESSOR_FILE).exists():
        load_image_processor(source).save_pretrained(folder)
    elif base_model is not None and (not os.path.isdir(base_model) or Path(base_model, PROCESSOR_FILE).exists()):
        try:
            load_image_processor(base_model).save_pretrained(folder)
        except FileNotFoundError:
            if os.path.isdir(base_model):
                raise


def _weights_and_settings(base: str | os.PathLike | None) -> Iterator[Path]:
    if base and os.path.isdir(base):
        yield from sorted([*Path(base).glob("*.safetensors"), *Path(base).glob("*.json")])
