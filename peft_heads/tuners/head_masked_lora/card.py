"""What the model card says of head-masked LoRA."""

from ...adapter_folder.card import CardText
from ..common.head_selection import ON_CARD
from ..common.pruning_settings import NEURON_SETTINGS


CARD = CardText(
    title="Head-masked LoRA",
    method="LoRA on {base}, switched off for the attention heads that the task does not need (HEAT, Heart-LoRA).",
    unmasked="plain LoRA",
    settings=(
        *ON_CARD,
        "mask_scope",
        *NEURON_SETTINGS,
        "r",
        "lora_alpha",
        "lora_dropout",
        "bottleneck_dropout",
        "adapter_bits",
        "classifier_bits",
    ),
    pruning=NEURON_SETTINGS,
    tags=("head-masked-lora", "lora"),
)
