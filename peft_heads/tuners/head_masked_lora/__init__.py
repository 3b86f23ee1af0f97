"""Head-masked LoRA (HEAT, Heart-LoRA)."""

from ..._compat import register_tuner
from .config import HeadMaskedLoraConfig
from .layer import HeadMaskedLinear
from .model import HeadMaskedLoraModel


__all__ = ["HeadMaskedLinear", "HeadMaskedLoraConfig", "HeadMaskedLoraModel"]

register_tuner(name="head_masked_lora", config_cls=HeadMaskedLoraConfig, model_cls=HeadMaskedLoraModel)
