"""Finds a module under another name: transformers renames modules of vision models from version to version.

The query projection that 4.57 calls `vit.encoder.layer.0.attention.attention.query` is `vit.layers.0.attention.q_proj`
in 5.9. Its place stays: the numbers in the name, and its role in the block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..heads.detect import PROJECTION_ROLES


# Endings of the names of a block's other linear layers, by role.
_BLOCK_ROLES = {
    "attention output": r"(attention\.output\.dense|attention\.o_proj)",
    "mlp in": r"(intermediate\.dense|mlp\.fc1)",
    "mlp out": r"(output\.dense|mlp\.fc2)",
}


def place_of(name: str) -> tuple:
    """The place of a module, which a renaming keeps: the first part of its name, the numbers in it, and its role.

    Example:
        >>> place_of("vit.encoder.layer.0.attention.attention.query")
        ('vit', (0,), 'query')
        >>> place_of("vit.layers.0.attention.q_proj") == place_of("vit.encoder.layer.0.attention.attention.query")
        True
    """
    parts = name.split(".")
    first, last = parts[0], parts[-1]
    numbers = tuple(int(part) for part in parts if part.isdigit())
    role = PROJECTION_ROLES.get(last)
    if role is None:
        role = next((r for r, ending in _BLOCK_ROLES.items() if re.search(rf"(^|\.){ending}$", name)), last)
    # a bare backbone has no first part of its own: `encoder.layer.0…` became `layers.0…`
    return ("" if first in ("encoder", "layer", "layers") else first), numbers, role


def match_renamed(saved: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """`{saved name: the model's name}` of modules that a model has under another name.

    Args:
        saved: Module names of an adapter's file.
        present: Module names of the model.

    Returns:
        Names that the model has are left out. So are names for which it has no module at the same place, or several.
    """
    present = dict.fromkeys(present)
    unknown = [name for name in saved if name not in present]
    by_place: dict[tuple, list[str]] = {}
    for name in present if unknown else ():
        by_place.setdefault(place_of(name), []).append(name)
    candidates = {name: by_place.get(place_of(name), []) for name in unknown}
    return {name: found[0] for name, found in candidates.items() if len(found) == 1}
