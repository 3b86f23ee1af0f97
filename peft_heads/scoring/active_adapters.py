"""Which adapters of a model are active, and which of them is scored."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer


def active_adapters(model: Any) -> list[str]:
    """Names of the active adapters, whoever has put them into the model: PEFT, or transformers' `add_adapter`."""
    active = getattr(model, "active_adapters", None)
    if isinstance(active, list):
        return active
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return list(layer.active_adapters) if layer is not None else []


def adapter_to_score(model: Any, wanted: str | None) -> str:
    """The adapter that is wanted, else the first active one.

    Raises:
        ValueError: The adapter that is wanted does not exist or is not active.
    """
    active = active_adapters(model)
    if wanted is None:
        return active[0] if active else "default"
    existing = getattr(model, "peft_config", {})
    if existing and wanted not in existing:
        raise ValueError(f"the model has no adapter {wanted!r}; it has: {', '.join(existing)}")
    if existing and wanted not in active:
        raise ValueError(
            f"adapter {wanted!r} is not active, so that no gradient would reach it (active: "
            f"{', '.join(active) or 'none'}); call model.set_adapter({wanted!r}) before training, or pass another "
            "adapter_name"
        )
    return wanted
