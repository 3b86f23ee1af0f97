from .head_masked_lora import HeadMaskedLinear, HeadMaskedLoraConfig, HeadMaskedLoraModel


__all__ = ["HeadMaskedLinear", "HeadMaskedLoraConfig", "HeadMaskedLoraModel"]
