"""The one base model that Bi-LoRA's files are for: a ViT-B/16, pre-trained on ImageNet-21k."""

from __future__ import annotations

import os

import torch
import transformers
from torch import nn

from ...heads.detect import resolve_heads
from .settings import BACKBONE, BASE_MODEL, NUM_BLOCKS, PATCH_SIZE, WIDTH


def problem_of_base_model(base: str | os.PathLike | None) -> str | None:
    """Why a model is not the one that the form is for; None where that cannot be known."""
    if base and os.path.isdir(base):
        try:
            config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            return f"the configuration of the base model {os.fspath(base)!r} cannot be read: {error}"
        expected = {
            "model_type": "vit",
            "hidden_size": WIDTH,
            "num_hidden_layers": NUM_BLOCKS,
            "patch_size": PATCH_SIZE,
        }
        found = {name: getattr(config, name, None) for name in expected}
        return None if found == expected else f"the base model {os.fspath(base)!r} is no ViT-B/16: it has {found}"
    if base and os.fspath(base) != BASE_MODEL:
        return (
            f"its base model is {os.fspath(base)!r}, but the form knows {BASE_MODEL} ({BACKBONE}) alone; if it is a copy "
            f"of that, say --base_model {BASE_MODEL}"
        )
    return None


def empty_vit() -> nn.Module:
    """A ViT-B/16 without weights: its names are all that is wanted."""
    with torch.device("meta"):
        return transformers.ViTForImageClassification(transformers.ViTConfig())


def projections(vit: nn.Module) -> list[str]:
    """Names of q and v of block 0, q and v of block 1, …"""
    layouts = resolve_heads(vit).items()
    return [name for name, layout in layouts if layout.parts[0].role in ("query", "value")]
