"""Head-masked LoRA and RLRR for vision transformers, as an extension of Hugging Face PEFT.

Importing the package registers its tuners with PEFT.
"""

from .adapter_folder.checkpoints import last_complete_checkpoint
from .adapter_folder.contents import set_image_processor
from .heads import get_head_masks, get_neuron_masks, register_criterion, set_head_masks, set_neuron_masks
from .image_classifier import load_image_classifier
from .plugins import import_plugin, load_plugins_at_import, loaded_plugins
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
    "get_neuron_masks",
    "import_plugin",
    "last_complete_checkpoint",
    "load_image_classifier",
    "loaded_plugins",
    "pack_adapter",
    "register_criterion",
    "register_method",
    "set_head_masks",
    "set_image_processor",
    "set_neuron_masks",
]

# Last, since plugins import the package; and now, since PEFT must know their types before an adapter is read.
load_plugins_at_import()
