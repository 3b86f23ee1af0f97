"""What the tuners of our methods check of their targets, and how they name modules."""

from __future__ import annotations

import warnings

from torch import nn

from ..heads.layout import ProjectionLayout
from ..heads.maskable import module_patterns
from ..heads.resolve import bypassed_projections, matches_pattern
from ..heads.selection import groups_kept_whole, plan_groups
from .saved_config import SavedConfig


def check_called(model: nn.Module, targets: list[str]) -> None:
    """Raise ValueError if a target is never called, so that no adapter can work there."""
    bypassed = [name for name in bypassed_projections(model) if name in targets]
    if bypassed:
        raise ValueError(
            f"{module_patterns(bypassed)}: the attention layer reads the weight of this projection instead of calling "
            "it, because it keeps a bias of its own, so that no adapter can work there. With timm, set "
            "qkv_bias_separate = True on each of these attention layers first; the outputs stay the same"
        )


def check_head_groups(config: SavedConfig, layouts: dict[str, ProjectionLayout], targets: list[str]) -> None:
    """Raise ValueError if heads are to be deactivated and no target has any; warn of groups that keep all of theirs.

    Args:
        config: The configuration of an adapter that deactivates heads.
        layouts: Projections of the model that have heads.
        targets: Names of the modules that the adapter targets.
    """
    if not any(name in layouts for name in targets):
        raise ValueError(
            "no target has attention heads, so there is nothing to deactivate. "
            f"Targets: {module_patterns(targets) or 'none'}. Projections with heads in this model: "
            f"{module_patterns(layouts) or 'none found'}. Target those; where heads are not found, say how many there "
            f'are, e.g. num_heads=12 or num_heads={{"to_q": 12}}; or pass ne=0 for {config.card.unmasked}'
        )
    targeted = {name: layout for name, layout in layouts.items() if name in targets}
    groups = plan_groups(
        {key: part for name, layout in targeted.items() for key, part in layout.named_parts(name).items()},
        ne=config.ne,
        ratio=config.ratio,
        granularity=config.granularity,
        joint=config.joint,
    )
    kept = groups_kept_whole(groups, config.ne)
    if kept:
        warnings.warn(kept)
    patterns = config.num_heads if isinstance(config.num_heads, dict) else {}
    unmatched = [pattern for pattern in patterns if not any(matches_pattern(pattern, name) for name in targets)]
    if unmatched:
        warnings.warn(f"these num_heads keys did not match any target and were ignored: {', '.join(unmatched)}")
