"""Reserves an adapter for one scorer.

Two would select twice, and one that was left behind by an interrupted run would go unnoticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn


if TYPE_CHECKING:
    from .recorder import HeadRecorder

# `{layer: {adapter name: its scorer}}`, by weak references: a scorer that nobody holds any more stands in nobody's way.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[HeadRecorder]]] = weakref.WeakKeyDictionary()


def attach(scorer: HeadRecorder, layers: Iterable[nn.Module]) -> None:
    """Reserve an adapter's layers for a scorer.

    The scorer of a Trainer's run takes them from one that an earlier run has left behind.

    Raises:
        ValueError: Another scorer has one of them; none is reserved then.
    """
    layers = list(layers)
    for layer in layers:
        other = _attached_to(layer, scorer.adapter_name)
        if other is None:
            continue
        if scorer.run is None or other.run is None or other.run is scorer.run:
            raise ValueError(
                f"another scorer is attached to adapter {other.adapter_name!r}; use one, or call close() on the other "
                "(a HeadScorer, or the TaylorHeadScorer of a run that broke off) first"
            )
        other.close()
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
