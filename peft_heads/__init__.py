"""Head-masked LoRA and RLRR for vision transformers, as an extension of Hugging Face PEFT.

Importing the package registers its tuners with PEFT.
"""

from .adapter_folder.card import set_image_processor
from .adapter_folder.checkpoints import last_complete_checkpoint
from .heads import get_head_masks, set_head_masks
from .image_classifier import load_image_classifier
from .scoring.callback import TaylorHeadScorer
from .scoring.scorer import HeadScorer
from .tuners import (
    HeadMaskedLoraConfig,
    HeadMaskedLoraModel,
    Method,
    RLRRConfig,
    RLRRModel,
    pack_adapter,
    register_method,
)


__all__ = [
    "HeadMaskedLoraConfig",
    "HeadMaskedLoraModel",
    "HeadScorer",
    "Method",
    "RLRRConfig",
    "RLRRModel",
    "TaylorHeadScorer",
    "get_head_masks",
    "last_complete_checkpoint",
    "load_image_classifier",
    "pack_adapter",
    "register_method",
    "set_head_masks",
    "set_image_processor",
]
