"""What the model card says of RLRR."""

from ...adapter_folder.card import CardText
from ..common.head_selection import ON_CARD


CARD = CardText(
    title="RLRR",
    method="Residual low-rank rescaling of the weights of {base}.",
    unmasked="plain RLRR",
    settings=(
        "r",
        "left",
        "right",
        "residual",
        "rescale_weight",
        "norms",
        "patch_embedding",
        "init",
        *ON_CARD,
    ),
    tags=("rlrr",),
)
