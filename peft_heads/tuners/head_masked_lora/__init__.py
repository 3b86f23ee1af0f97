"""Head-masked LoRA (HEAT, Heart-LoRA)."""

from ..._compat import (
    allow_hotswap,
    delegate_config_loading,
    extend_hotswap,
    extend_hotswap_check,
    extend_model_card,
    extend_weight_mapping,
    register_tuner,
)
from ...adapter_folder.card import update_card
from .config import HeadMaskedLoraConfig
from .hotswap import check_configs, check_padding, prepare
from .layer import HeadMaskedLinear
from .model import HeadMaskedLoraModel
from .packed import pack_adapter


__all__ = ["HeadMaskedLinear", "HeadMaskedLoraConfig", "HeadMaskedLoraModel", "pack_adapter"]

register_tuner(name="head_masked_lora", config_cls=HeadMaskedLoraConfig, model_cls=HeadMaskedLoraModel)
allow_hotswap("head_masked_lora", "mask_scope", "num_heads", "fused_parts", "adapter_bits", "classifier_bits")
extend_hotswap_check(check_configs)
extend_hotswap(prepare, check_padding)
extend_weight_mapping("head_masked_lora")
delegate_config_loading()
extend_model_card(update_card)
