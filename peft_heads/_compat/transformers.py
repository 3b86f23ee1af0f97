"""Facts about transformers: names, classes and warnings that differ between versions."""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import nn


if TYPE_CHECKING:
    from transformers import BaseImageProcessor


def forget_adapters(model: nn.Module) -> None:
    """Let a model of transformers not know that adapters were loaded into it.

    Delete when transformers keeps nothing but `peft_config`.
    """
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)


def commit_hash(config: Any) -> str | None:
    """The revision on the Hub that a configuration of transformers was read from; None for a folder's.

    Delete when transformers has a public name for it.
    """
    return getattr(config, "_commit_hash", None)


def is_model_class(found: Any) -> bool:
    """Whether it is a model class of transformers, or one of its Auto classes.

    Delete when transformers has a public base class of its Auto classes.

    Raises:
        TypeError: It is no class.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    return issubclass(found, (PreTrainedModel, _BaseAutoModelClass))


def silence_known_warnings() -> None:
    """Keep the command line free of warnings between Hugging Face libraries, about which a user can do nothing.

    Delete when PEFT asks for `is_activation_checkpointing` (peft 0.21 on transformers 5.23 and later).
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def trainer_has_overwrite_output_dir() -> bool:
    """Whether `TrainingArguments` has `overwrite_output_dir`, which transformers 5.0 has dropped.

    Delete when transformers 5.0 is the oldest that is supported.
    """
    from transformers import TrainingArguments

    return any(field.name == "overwrite_output_dir" for field in fields(TrainingArguments))


def load_pil_image_processor(name_or_path: str | os.PathLike, **kwargs: Any) -> BaseImageProcessor:
    """`AutoImageProcessor.from_pretrained` with the PIL backend, which needs no torchvision.

    transformers 5.1 to 5.18 replaces the name in its top module by one that only raises where torchvision is missing,
    although the class works; and before 5.1 the backend is chosen by `use_fast`.

    Delete when transformers 5.19 is the oldest that is supported.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    has_backends = importlib.util.find_spec("transformers.image_processing_backends") is not None
    choice = {"backend": "pil"} if has_backends else {"use_fast": False}
    kwargs.setdefault("trust_remote_code", False)  # not given, transformers asks on stdin
    return AutoImageProcessor.from_pretrained(name_or_path, **choice, **kwargs)


def mismatched_keys(loading_info: dict[str, Any]) -> list[str]:
    """Names of the weights that `from_pretrained(…, output_loading_info=True)` found in another shape.

    Delete when transformers 5.0 is the oldest that is supported: before, the entries have no shapes beside the name.
    """
    return sorted(entry if isinstance(entry, str) else entry[0] for entry in loading_info["mismatched_keys"])


def support_peft_in_image_pipelines() -> None:
    """Let `pipeline("image-classification", model=peft_model)` know that a PeftModel is fine.

    It works without, after an error in the log that lists every class but PeftModel.

    Delete when transformers lists PEFT's models for this task.
    """
    from transformers.pipelines import base

    supported = getattr(base, "SUPPORTED_PEFT_TASKS", None)
    if supported is not None and "PeftModel" not in supported.setdefault("image-classification", []):
        supported["image-classification"].append("PeftModel")
