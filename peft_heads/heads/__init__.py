"""Attention heads and MLP neurons: where, how responsive, which are deactivated. Depends on torch alone."""

from .criterion_registry import CRITERIA, HeadStatistics, register_criterion
from .detect import resolve_heads
from .layout import HeadLayout, ProjectionLayout
from .neurons import get_neuron_masks, neuron_layers, set_neuron_masks
from .protocol import HeadMaskable, ScoredParameter, get_head_masks, set_head_masks
from .scores import head_scores
from .selection import plan_groups, select_heads
from .taylor import head_statistics


__all__ = [
    "CRITERIA",
    "HeadLayout",
    "HeadMaskable",
    "HeadStatistics",
    "ProjectionLayout",
    "ScoredParameter",
    "get_head_masks",
    "get_neuron_masks",
    "head_scores",
    "head_statistics",
    "neuron_layers",
    "plan_groups",
    "register_criterion",
    "resolve_heads",
    "select_heads",
    "set_head_masks",
    "set_neuron_masks",
]
