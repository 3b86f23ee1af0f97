"""RLRR: residual low-rank rescaling."""

from ..._compat import delegate_config_loading, extend_model_card, extend_weight_mapping, register_tuner
from ...adapter_folder.card import update_card
from .config import RLRRConfig
from .layer import RLRRConv2d, RLRRLinear, RLRRScale
from .model import RLRRModel


__all__ = ["RLRRConfig", "RLRRConv2d", "RLRRLinear", "RLRRModel", "RLRRScale"]

register_tuner(name="rlrr", config_cls=RLRRConfig, model_cls=RLRRModel)
extend_weight_mapping("rlrr")
delegate_config_loading()
extend_model_card(update_card)
