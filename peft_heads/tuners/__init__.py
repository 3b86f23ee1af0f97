from .head_masked_lora import HeadMaskedLinear, HeadMaskedLoraConfig, HeadMaskedLoraModel, pack_adapter
from .rlrr import RLRRConfig, RLRRModel


__all__ = [
    "HeadMaskedLinear",
    "HeadMaskedLoraConfig",
    "HeadMaskedLoraModel",
    "RLRRConfig",
    "RLRRModel",
    "pack_adapter",
]
