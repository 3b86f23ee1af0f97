"""Modules that an adapter changes by default, and how PEFT's `target_modules` names exactly these."""

from __future__ import annotations

import re

from torch import nn

from ..heads.traversal import named_targets
from .image_part import image_projections


def default_targets(model: nn.Module) -> list[str]:
    """The query, value and fused projections of the image backbone as PEFT `target_modules`.

    Keys are left out, as in the papers. The last components of the names are returned where they are enough
    (`["q_proj", "v_proj"]`), and full names where other modules end in the same (the text tower of CLIP).
    """
    wanted = [
        name
        for name, layout in image_projections(model).items()
        if layout.is_fused or layout.parts[0].role in ("query", "value")
    ]
    return shortest_names(wanted, model)


def shortest_names(names: list[str], model: nn.Module) -> list[str]:
    """The last components of module names where they mean these modules and no others, else the names themselves."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    matched = [name for name, _ in named_targets(model) if name.rpartition(".")[2] in suffixes]
    return suffixes if set(matched) == set(names) else names


def exact_targets(names: list[str], model: nn.Module) -> list[str] | str:
    """`target_modules` that mean these modules and no others: the last components, the names, or a pattern of them.

    PEFT reads a name as the end of others: to it, timm's final `norm` means `patch_embed.norm` as well.
    """
    targets = shortest_names(names, model)
    ends = tuple(f".{target}" for target in targets)
    reached = {name for name, _ in named_targets(model) if name in targets or name.endswith(ends)}
    return targets if reached == set(names) else "|".join(map(re.escape, names))
