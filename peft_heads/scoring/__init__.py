"""The responsiveness of attention heads: gradients in, masks out. Imports no tuner."""

from .scorer import HeadScorer


__all__ = ["HeadScorer"]
