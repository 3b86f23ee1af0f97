"""Keys of masks of heads and neurons: in files `….mask`, True = active; in models `….off`, True = deactivated."""

from __future__ import annotations

import torch


# The last part of a mask's key: in files (and in the models of earlier versions), and in a model.
IN_FILE, IN_MODEL = ".mask", ".off"


# The end of a mask's key in the file of a head-masked LoRA adapter: of heads, and of MLP neurons.
LORA_MASK = "lora_head_mask" + IN_FILE
LORA_NEURON_MASK = "lora_neuron_mask" + IN_FILE
MASKS = (LORA_MASK, LORA_NEURON_MASK)
# How the part of a key ends that names a mask, whatever the method.
NEURON_KIND = "_neuron_mask"
KINDS = ("_head_mask", NEURON_KIND)


def masks_for_file(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the masks among an adapter's tensors to the form of files: `….mask`, True = active."""
    return _inverted(state_dict, IN_MODEL, IN_FILE)


def masks_for_model(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the masks of a file, or of an old state dict, to the form of models: `….off`, True = deactivated.

    Raises:
        ValueError: A mask is not bool.
    """
    return _inverted(state_dict, IN_FILE, IN_MODEL)


def is_mask_key(key: str, end: str = IN_FILE) -> bool:
    """Whether a key belongs to a mask, with an adapter name in it or without.

    Args:
        key: A key of a file, or with `end=IN_MODEL` of a model's state dict.
        end: The key's last part.
    """
    return key.endswith(end) and any(part.endswith(KINDS) for part in key.split(".")[-3:-1])


def deactivates(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether any mask in a state dict with a model's names deactivates a head or a neuron."""
    return any(is_mask_key(key, IN_MODEL) and bool(value.any()) for key, value in state_dict.items())


def _inverted(state_dict: dict[str, torch.Tensor], end: str, new_end: str) -> dict[str, torch.Tensor]:
    converted = {}
    for key, value in state_dict.items():
        if is_mask_key(key, end):
            if value.dtype != torch.bool:
                raise ValueError(
                    f"{key} must be a bool tensor with one entry per head (or neuron); got {value.dtype} "
                    f"{tuple(value.shape)}: was it edited or averaged?"
                )
            key, value = key.removesuffix(end) + new_end, ~value
        converted[key] = value
    return converted
