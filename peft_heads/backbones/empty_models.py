"""Models built from a changed configuration, without memory for their weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from .image_part import BACKBONE_CONFIGS


def smaller_config(model: nn.Module, fields: dict[str, Any]) -> transformers.PretrainedConfig:
    """A copy of a model's configuration, with fields changed in the part that describes the image backbone."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "use_pretrained_backbone"):
        config.use_pretrained_backbone = False  # nothing is to be downloaded
    for key, value in fields.items():
        setattr(image_config(config), key, value)
    return config


def image_config(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The part of a configuration that describes the image backbone."""
    inner = (getattr(config, key, None) for key in BACKBONE_CONFIGS)
    return next((part for part in inner if isinstance(part, transformers.PretrainedConfig)), config)


def build_empty(model: nn.Module, config: transformers.PretrainedConfig) -> nn.Module | str:
    """A model of a class and a configuration whose parameters have no memory; the reason where there is none.

    Buffers are real, so that the model is complete once `load_state_dict(…, assign=True)` has given it parameters.
    """
    try:
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return type(model)(config).eval()
    except Exception as error:  # a class may do anything when it is built
        return " ".join(str(error).split()) or type(error).__name__


def random_images(model: nn.Module, number: int = 1) -> torch.Tensor:
    """Images (number, channels, height, width) of the size that a model's configuration states, the same every time.

    Raises:
        ValueError: The configuration states no size.
    """
    config = image_config(model.config)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        raise ValueError(f"{type(config).__name__} states no size of images (image_size)")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(number, channels, height, width, generator=torch.Generator().manual_seed(0))
