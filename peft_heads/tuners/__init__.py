from .head_masked_lora import HeadMaskedLinear, HeadMaskedLoraConfig, HeadMaskedLoraModel, pack_adapter


__all__ = ["HeadMaskedLinear", "HeadMaskedLoraConfig", "HeadMaskedLoraModel", "pack_adapter"]
