"""How responsive heads are: gradients in, masks out. Knows no tuner."""

from .scorer import HeadScorer


__all__ = ["HeadScorer"]
