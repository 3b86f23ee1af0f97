"""Which modules RLRR adapts, how, and where their heads are: decided before anything is replaced."""

from __future__ import annotations

import torch
from torch import nn

from ...backbones.norms import batch_norms
from ...backbones.structure import Backbone
from ...heads.detect import interleaved_projections, resolve_heads
from ...heads.layout import ProjectionLayout
from ..common.targets import check_called, check_head_groups, module_patterns
from .config import RLRRConfig


# Roles of the projections, single or fused, whose heads are masked; keys are adapted in full.
_MASKED = {"query", "value", "projection"}


def default_modules(model: nn.Module, config: RLRRConfig, backbone: Backbone) -> list[str]:
    """Names of the modules that are adapted unless `target_modules` names others.

    Raises:
        ValueError: No backbone was recognised.
    """
    names = list(backbone.matrices)
    if config.norms:
        names += backbone.norms
    if config.patch_embedding and backbone.patch_embedding is not None:
        names.append(backbone.patch_embedding)
    if not names:
        linear = module_patterns(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        raise ValueError(
            f"no block with an attention layer, and no convolution, was recognised in {type(model).__name__}. Its linear "
            f"layers: {linear or 'none'}. Name the modules yourself: RLRRConfig(target_modules=[…])"
        )
    return names


def check_module(name: str, module: nn.Module, patch_embedding: str | None) -> str:
    """What a target becomes: `"linear"`, `"convolution"` or `"scale"`.

    Args:
        name: Name of the target.
        module: The target, without adapters around it.
        patch_embedding: Name of the patch embedding, if its output is scaled and shifted.

    Raises:
        ValueError: RLRR is not defined for it.
    """
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    way_out = f"exclude the module (exclude_modules=[{name!r}])"
    if isinstance(module, nn.LayerNorm):
        missing = [what for what in ("weight", "bias") if getattr(module, what) is None]
        if missing:
            raise ValueError(
                f"{name} is a {kind} without {' and '.join(missing)} (expected both): there is nothing that a scale and "
                f"a shift could be merged into; {way_out}, or pass norms=False"
            )
        return "scale"
    is_plain = type(module) in (nn.Linear, nn.Conv2d) and type(weight.data) is torch.Tensor
    if is_plain and weight.dtype.is_floating_point:
        if name == patch_embedding:
            return "scale"
        return "linear" if isinstance(module, nn.Linear) else "convolution"
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        expected = "Linear" if isinstance(module, nn.Linear) else "Conv2d"
        if type(weight.data) is torch.Tensor and weight.dtype.is_floating_point:
            raise ValueError(
                f"{name} is a {kind}, which may use its weight in a way of its own (expected torch.nn.{expected} itself); "
                f"if it is quantised, load the model without quantization, else {way_out}"
            )
        raise ValueError(
            f"{name} is a {kind} with a {type(weight.data).__name__} of {weight.dtype} for a weight, which RLRR cannot "
            f"rescale (expected torch.nn.{expected} itself, not quantised, with numbers of floating point); load the "
            f"model without quantization, or {way_out}"
        )
    hint = ", or pass norms=False" if "Norm" in kind else ""
    raise ValueError(
        f"{name} is a {kind}, for which RLRR is not defined (expected torch.nn.Linear, torch.nn.Conv2d or "
        f"torch.nn.LayerNorm); {way_out}{hint}"
    )


def find_head_layouts(model: nn.Module, config: RLRRConfig, targets: list[str]) -> dict[str, ProjectionLayout]:
    """The heads of every q and v of the model, targeted or not.

    Args:
        model: The base model, possibly with adapters in it.
        config: The new adapter's configuration.
        targets: Names of the modules it targets.

    Raises:
        ValueError: The adapter could not work as its configuration says.
    """
    check_called(model, targets)
    layouts = {
        name: layout
        for name, layout in resolve_heads(model, config.num_heads, "qv").items()
        if layout.parts and {part.role for part in layout.parts} <= _MASKED
    }
    interleaved = [name for name in interleaved_projections(model) if name in layouts]
    if config.masks_heads:
        if any(name in targets for name in interleaved):
            raise ValueError(
                f"{module_patterns(interleaved)}: the rows of this projection are q, k and v of one head after the "
                "other, which head masks do not know (expected all of q, then k, then v); pass ne=0"
            )
        check_head_groups(config, layouts, targets)
    return {name: layout for name, layout in layouts.items() if name not in interleaved}


def moving_statistics(model: nn.Module) -> str | None:
    """Warning about batch norms, whose running statistics no adapter saves; None if there are none."""
    names = batch_norms(model)
    if not names:
        return None
    return (
        f"{type(model).__name__} has batch norms ({module_patterns(names)}): their running statistics move while the "
        "model trains and are not saved with the adapter. Put them into evaluation mode while training, or name them "
        "in modules_to_save"
    )
