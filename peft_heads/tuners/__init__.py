from .._compat import announce_loading, announce_loading_by_transformers
from .common.saved_folder import check_before_writing
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

announce_loading(check_before_writing)
announce_loading_by_transformers()
