"""At most one scorer listens to an adapter: a second one, left behind by a run that broke off, would go unnoticed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn


if TYPE_CHECKING:
    from .recorder import HeadRecorder

# `{layer: {adapter name: its scorer}}`. Layers and scorers are known weakly: a scorer that is dropped is gone.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[HeadRecorder]]] = weakref.WeakKeyDictionary()


class TwoScorersError(ValueError):
    """Another scorer listens to the adapter.

    Attributes:
        other: That scorer.
    """

    def __init__(self, other: HeadRecorder) -> None:
        super().__init__(
            f"another scorer is attached to adapter {other.adapter_name!r}; use one, or call close() on the other "
            "(a HeadScorer, or the TaylorHeadScorer of a run that broke off) first"
        )
        self.other = other


def attach(scorer: HeadRecorder, layers: Iterable[nn.Module]) -> None:
    """Reserve an adapter's layers for a scorer.

    Raises:
        TwoScorersError: Another scorer has one of them; none is reserved then.
    """
    layers = list(layers)
    for layer in layers:
        other = _attached_to(layer, scorer.adapter_name)
        if other is not None:
            raise TwoScorersError(other)
    for layer in layers:
        _ATTACHED.setdefault(layer, {})[scorer.adapter_name] = weakref.ref(scorer)


def detach(scorer: HeadRecorder, layers: Iterable[nn.Module]) -> None:
    """Free the layers that are reserved for a scorer; those of another one stay reserved."""
    for layer in layers:
        if _attached_to(layer, scorer.adapter_name) is scorer:
            del _ATTACHED[layer][scorer.adapter_name]


def _attached_to(layer: nn.Module, adapter_name: str) -> HeadRecorder | None:
    scorer = _ATTACHED.get(layer, {}).get(adapter_name)
    return None if scorer is None else scorer()
