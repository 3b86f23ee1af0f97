"""The masks of a file in the loader of transformers 5: its own `load_adapter` and `from_pretrained` ask no tuner."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from .mask_keys import IN_FILE, IN_MODEL, KINDS


class InvertMask(ConversionOps):
    """True = active to True = deactivated, and back."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: [~tensor for tensor in (tensors if isinstance(tensors, list) else [tensors])]}

    @property
    def reverse_op(self) -> InvertMask:
        return self


def mask_converters(adapter_name: str) -> list[WeightConverter]:
    """Convert the masks of a file, by the keys they have once the adapter's name was put in."""
    places = [f"{kind}.{adapter_name}" for kind in KINDS]
    return [WeightConverter(place + IN_FILE, place + IN_MODEL, operations=[InvertMask()]) for place in places]
