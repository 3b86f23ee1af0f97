"""RLRR: residual low-rank rescaling."""

from ..common.head_selection import ON_CARD
from ..common.method_registry import Method, register_method
from ..common.options import SCORER_OPTIONS, head_options
from .config import RLRRConfig
from .layer import RLRRConv2d, RLRRLinear, RLRRScale
from .model import RLRRModel


__all__ = ["RLRRConfig", "RLRRConv2d", "RLRRLinear", "RLRRModel", "RLRRScale"]

VARIANT = ("left", "right", "residual", "rescale_weight", "norms", "patch_embedding", "init")

register_method(
    Method(
        name="rlrr",
        help="factors that rescale the frozen weights, norms and the patch embedding",
        config=RLRRConfig,
        model=RLRRModel,
        options=("r", *VARIANT, "shift_without_bias", *head_options(RLRRConfig), *SCORER_OPTIONS),
        grid={"r": 1},
        shown=(*ON_CARD, "r", *VARIANT),
        masked_parts="qv",
        head_rows=("rlrr_left", "rlrr_shift"),
        no_norms="the update of RLRR depends on the frozen weights, which are not read",
    )
)
