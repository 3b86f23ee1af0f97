"""Head-masked LoRA (HEAT, Heart-LoRA)."""

from ..._compat import extend_model_card, register_tuner
from ...adapter_files import update_card
from .config import HeadMaskedLoraConfig
from .layer import HeadMaskedLinear
from .model import HeadMaskedLoraModel


__all__ = ["HeadMaskedLinear", "HeadMaskedLoraConfig", "HeadMaskedLoraModel"]

register_tuner(name="head_masked_lora", config_cls=HeadMaskedLoraConfig, model_cls=HeadMaskedLoraModel)
extend_model_card(update_card)
