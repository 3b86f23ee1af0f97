"""What the model card says of RLRR."""

from ...adapter_folder.card import CardText


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
        "ne",
        "ratio",
        "granularity",
        "joint",
        "criterion",
    ),
    tags=("rlrr",),
)
