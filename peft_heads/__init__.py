"""Head-masked LoRA and RLRR for vision transformers, as an extension of Hugging Face PEFT.

Importing the package registers its tuners with PEFT.
"""

from .adapter_folder.checkpoints import last_complete_checkpoint
from .adapter_folder.contents import set_image_processor
from .heads import get_head_masks, set_head_masks
from .image_classifier import load_image_classifier
from .scoring.callback import TaylorHeadScorer
from .scoring.scorer import HeadScorer
from .tuners import HeadMaskedLoraConfig, HeadMaskedLoraModel, RLRRConfig, RLRRModel, pack_adapter


__all__ = [
    "HeadMaskedLoraConfig",
    "HeadMaskedLoraModel",
    "HeadScorer",
    "RLRRConfig",
    "RLRRModel",
    "TaylorHeadScorer",
    "get_head_masks",
    "last_complete_checkpoint",
    "load_image_classifier",
    "pack_adapter",
    "set_head_masks",
    "set_image_processor",
]
