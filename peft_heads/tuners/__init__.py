from .._compat import announce_loading, announce_loading_by_transformers
from .head_masked_lora import HeadMaskedLinear, HeadMaskedLoraConfig, HeadMaskedLoraModel, pack_adapter
from .rlrr import RLRRConfig, RLRRModel
from .saved_config import SavedConfig
from .saved_folder import check_before_writing
from .saved_settings import is_settings_key


__all__ = [
    "HeadMaskedLinear",
    "HeadMaskedLoraConfig",
    "HeadMaskedLoraModel",
    "RLRRConfig",
    "RLRRModel",
    "pack_adapter",
]

announce_loading(
    check_before_writing,
    is_ours=lambda config: isinstance(config, SavedConfig),
    take_weights=lambda weights: {key: value for key, value in weights.items() if not is_settings_key(key)},
)
announce_loading_by_transformers()
