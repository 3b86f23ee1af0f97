"""Checks that all tuners make of their targets, and how they name modules in messages."""

from __future__ import annotations

import warnings

from torch import nn

from ...backbones.bypass import bypassed_modules
from ...backbones.overlooked import overlooked_attention
from ...heads.detect import FUSED_PROJECTIONS, matches_pattern
from ...heads.layout import ProjectionLayout
from ...heads.protocol import module_patterns
from ...heads.selection import groups_kept_whole, plan_groups
from .head_selection import HeadSelectionConfig


def check_called(model: nn.Module, targets: list[str]) -> None:
    """Raise ValueError if a target is never called, by what is known of the module around it.

    The first forward pass shows the rest, see `watch_calls`.
    """
    bypassed = bypassed_modules(model, targets)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in bypassed}
    if not bypassed:
        return
    patterns = module_patterns(bypassed)
    if any(hasattr(owner, "q_bias") and name.endswith(tuple(FUSED_PROJECTIONS)) for name, owner in owners.items()):
        raise ValueError(
            f"{patterns}: the attention layer reads the weight of this projection instead of calling it, because it "
            "keeps a bias of its own, so that no adapter can work there. With timm, set qkv_bias_separate = True on "
            "each of these attention layers first; the outputs stay the same"
        )
    if any(isinstance(owner, nn.TransformerEncoderLayer) for owner in owners.values()):
        raise ValueError(
            f"{patterns}: in evaluation mode torch.nn.TransformerEncoderLayer reads the weight of this layer instead of "
            "calling it, so that no adapter can work there. Call torch.backends.mha.set_fastpath_enabled(False) first, "
            "here and wherever the adapter is used; or exclude these modules"
        )
    kinds = ", ".join(dict.fromkeys(type(owner).__name__ for owner in owners.values()))
    raise ValueError(
        f"{patterns}: {kinds} reads the weight of this layer instead of calling it, so that no adapter can work there "
        "(expected a call of the layer). Exclude these modules (exclude_modules, or other target_modules), or take an "
        "implementation that calls them, such as transformers' or timm's of the same architecture"
    )


def warn_of_overlooked(model: nn.Module) -> None:
    """Warn of the attention layers that the default targets leave out, where only some are recognised."""
    overlooked = overlooked_attention(model)
    if overlooked:
        kinds = dict.fromkeys(type(model.get_submodule(name)).__name__ for name in overlooked)
        warnings.warn(
            f"{len(overlooked)} attention layers of {type(model).__name__} are not recognised and stay without an "
            f"adapter ({', '.join(kinds)}): {', '.join(overlooked)}. Name their projections in target_modules, "
            'and their heads in num_heads={"to_q": 12}, if they are to be adapted'
        )


def check_head_groups(config: HeadSelectionConfig, layouts: dict[str, ProjectionLayout], targets: list[str]) -> None:
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
    if config.target_speed is None:  # by which the number is chosen later
        _check_number(config, {name: layout for name, layout in layouts.items() if name in targets})
    patterns = config.num_heads if isinstance(config.num_heads, dict) else {}
    unmatched = [pattern for pattern in patterns if not any(matches_pattern(pattern, name) for name in targets)]
    if unmatched:
        warnings.warn(f"these num_heads keys did not match any target and were ignored: {', '.join(unmatched)}")


def _check_number(config: HeadSelectionConfig, targeted: dict[str, ProjectionLayout]) -> None:
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
