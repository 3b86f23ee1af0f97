"""Which modules head-masked LoRA adapts, and where their heads are: decided before anything is replaced."""

from __future__ import annotations

import warnings

from torch import nn

from ...heads.detect import (
    FUSED_PROJECTIONS,
    NUM_HEADS_ATTRIBUTES,
    PROJECTION_ROLES,
    interleaved_projections,
    resolve_heads,
)
from ...heads.layout import ProjectionLayout
from ..common.targets import check_called, check_head_groups, module_patterns
from .config import HeadMaskedLoraConfig


def unknown_architecture(model: nn.Module) -> ValueError:
    """The error where no attention layer is recognised: what was found, and the way out."""
    linear = module_patterns(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return ValueError(
        f"no attention layer was recognised in {type(model).__name__}: no module owns a query, a key and a value "
        f"projection ({', '.join(PROJECTION_ROLES)}) or a fused one ({', '.join(FUSED_PROJECTIONS)}) and says its "
        f"number of heads ({', '.join(NUM_HEADS_ATTRIBUTES)}). Its linear layers: {linear or 'none'}. Name the query "
        "and value projections and their heads yourself, e.g. "
        'HeadMaskedLoraConfig(target_modules=["to_q", "to_v"], num_heads={"to_q": 12, "to_v": 12})'
    )


def find_head_layouts(
    model: nn.Module, config: HeadMaskedLoraConfig, targets: list[str]
) -> dict[str, ProjectionLayout]:
    """The heads of every projection of the model, targeted or not; warns of targets that will not be masked.

    Args:
        model: The base model, possibly with adapters in it.
        config: The new adapter's configuration.
        targets: Names of the modules it targets.

    Raises:
        ValueError: The adapter could not work as its configuration says.
    """
    layouts = resolve_heads(model, config.num_heads, config.fused_parts)
    if config.prunes_neurons:  # with its value and bias zero, a head is silent whatever its key is
        layouts = {name: layout for name, layout in layouts.items() if not _is_key(layout)}
    check_called(model, targets)
    # again, and with what is known of the model: options may have been set since the configuration was made
    config.check_compatible(freezes_rows=any(not layouts[n].covers_all_rows for n in targets if n in layouts))
    interleaved = [name for name in interleaved_projections(model) if name in targets and name in layouts]
    if interleaved and (config.masks_heads or not all(layouts[name].covers_all_rows for name in interleaved)):
        raise ValueError(
            f"{module_patterns(interleaved)}: the rows of this projection are q, k and v of one head after the other, "
            "which head masks do not know (expected all of q, then k, then v); exclude the module, or pass ne=0 with "
            'fused_parts="qkv"'
        )
    if config.masks_heads:
        _check_parameters(config, layouts)
        _check_targets(config, layouts, targets)
    return layouts


def needs_masks(config: HeadMaskedLoraConfig, layout: ProjectionLayout | None) -> bool:
    """Whether the adapter must leave rows of a projection alone: deactivated heads, or parts of a fused one."""
    return layout is not None and (config.masks_heads or not layout.covers_all_rows)


def check_plain_lora(
    name: str, layer: nn.Module, config: HeadMaskedLoraConfig, layout: ProjectionLayout | None
) -> None:
    """Raise ValueError if PEFT's own LoRA layer, which is all that a module can get, would not do what is asked for."""
    if needs_masks(config, layout):
        raise ValueError(
            f"{name} is a {type(layer).__name__} with weights of type {type(layer.weight).__name__}, "
            "for which head masks are not implemented (expected torch.nn.Linear); load the model without "
            "quantization, exclude the module, or pass ne=0 (on a fused projection with fused_parts=qkv)"
        )
    if config.changes_lora:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, for which adapter_bits={config.adapter_bits} and "
            f"bottleneck_dropout={config.bottleneck_dropout} are not implemented (expected torch.nn.Linear); "
            "exclude the module, or pass adapter_bits=32, bottleneck_dropout=0"
        )


def _check_parameters(config: HeadMaskedLoraConfig, layouts: dict[str, ProjectionLayout]) -> None:
    unmasked = [
        parameter
        for parameter in config.target_parameters or []
        if any(f".{name}".endswith(f".{parameter.rpartition('.')[0]}") for name in layouts)
    ]
    if unmasked:
        raise ValueError(
            f"target_parameters={unmasked} cannot be combined with head masks: PEFT's wrapper of a single parameter "
            "carries none; name the modules in target_modules, or pass ne=0"
        )


def _check_targets(config: HeadMaskedLoraConfig, layouts: dict[str, ProjectionLayout], targets: list[str]) -> None:
    check_head_groups(config, layouts, targets)
    headless = [name for name in targets if name not in layouts]
    if headless and not config.prunes_neurons:  # which adapts all layers on purpose
        warnings.warn(
            f"these targets have no attention heads and get a plain LoRA layer, never masked: {module_patterns(headless)}"
        )


def _is_key(layout: ProjectionLayout) -> bool:
    return not layout.is_fused and layout.parts[0].role == "key"
