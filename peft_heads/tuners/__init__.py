from .._compat.loading import announce_loading
from .._compat.transformers_loading import announce_loading_by_transformers
from .common.method_registry import Method, register_method
from .common.saved_folder import check_before_writing
from .head_masked_lora import HeadMaskedLinear, HeadMaskedLoraConfig, HeadMaskedLoraModel, pack_adapter
from .rlrr import RLRRConfig, RLRRModel
from .stock import STOCK_METHODS


__all__ = [
    "HeadMaskedLinear",
    "HeadMaskedLoraConfig",
    "HeadMaskedLoraModel",
    "Method",
    "RLRRConfig",
    "RLRRModel",
    "pack_adapter",
    "register_method",
]

for method in STOCK_METHODS:
    register_method(method)
announce_loading(check_before_writing)
announce_loading_by_transformers()
