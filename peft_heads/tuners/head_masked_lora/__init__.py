"""Head-masked LoRA (HEAT, Heart-LoRA)."""

from ..._compat.hotswap import allow_hotswap, extend_hotswap, extend_hotswap_check
from ..common.head_selection import ON_CARD
from ..common.method_registry import Method, register_method
from ..common.options import LORA_OPTIONS, PRUNING_OPTIONS, SCALES, SCORER_OPTIONS, head_options
from ..common.pruning_settings import NEURON_SETTINGS
from .config import HeadMaskedLoraConfig
from .hotswap import check_configs, check_padding, prepare
from .layer import HeadMaskedLinear
from .model import HeadMaskedLoraModel
from .packed import pack_adapter


__all__ = ["HeadMaskedLinear", "HeadMaskedLoraConfig", "HeadMaskedLoraModel", "pack_adapter"]

register_method(
    Method(
        name="head-masked-lora",
        help="LoRA, switched off for the attention heads that the task does not need",
        config=HeadMaskedLoraConfig,
        model=HeadMaskedLoraModel,
        options=(
            *head_options(HeadMaskedLoraConfig),
            *PRUNING_OPTIONS,
            *SCORER_OPTIONS,
            *LORA_OPTIONS,
            "bottleneck_dropout",
            "adapter_bits",
            "classifier_bits",
        ),
        grid={
            "r": 32,
            "adapter_bits": 1,
            "bottleneck_dropout": 0.1,
            "scale": SCALES,
            "ne": [0, 1, 3, 6],
            "criterion": ["absolute", "positive", "negative"],
        },
        shown=(*ON_CARD, "mask_scope", *NEURON_SETTINGS, "r", "lora_alpha", "use_dora"),
        pack=pack_adapter,
    )
)
allow_hotswap("head_masked_lora", "mask_scope", "num_heads", "fused_parts", "adapter_bits", "classifier_bits")
extend_hotswap_check(check_configs)
extend_hotswap(prepare, check_padding)
