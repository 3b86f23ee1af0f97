"""The parts of an image backbone by role: the linear layers and norms of its blocks, final norm, patch embedding.

A block is the module of a stack that owns an attention layer. A backbone without attention layers is a convolutional
network, all of whose convolutions and linear layers are its matrices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from ..heads.detect import FUSED_PROJECTIONS, PROJECTION_ROLES
from ..heads.traversal import named_targets, own_modules
from .classifier import classifier_names
from .image_part import backbone_name, image_projections


# Networks that compute an attention layer's position bias (SwinV2): linear layers, but none of the block's.
_POSITION_NETWORKS = re.compile(r"(^|\.)[^.]*(position|rel_pos|cpb)[^.]*\.")
# Modules that call a layer, then the batch norm, and nothing between.
_BEFORE_BATCH_NORM = {
    (module, "convolution"): "normalization"
    for module in (
        *("ResNetConvLayer", "ResNetShortCut", "RegNetConvLayer", "RegNetShortCut"),
        *("MobileViTConvLayer", "MobileViTV2ConvLayer", "HGNetV2ConvLayer"),
        *("MobileNetV1ConvLayer", "MobileNetV2ConvLayer"),
    )
} | {("LevitConvEmbeddings", "convolution"): "batch_norm", ("MLPLayerWithBN", "linear"): "batch_norm"}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class BackboneParts:
    """Module names, by role, in the model's order.

    Attributes:
        matrices: Linear layers of the blocks (query, key, value, attention output, MLP); of a convolutional network all
            convolutions and linear layers.
        norms: Norms of the blocks, and the final one; of a convolutional network all layer norms.
        patch_embedding: The projection of the patches; None if there is none.
    """

    matrices: tuple[str, ...]
    norms: tuple[str, ...]
    patch_embedding: str | None


def backbone_parts(model: nn.Module) -> BackboneParts:
    """Find the parts of the image backbone of a model, plain or with adapters in it; all empty if none is recognised."""
    modules = {name: getattr(module, "base_layer", module) for name, module in named_targets(model)}
    heads = tuple(f"{name}." for name in classifier_names(model))
    modules = {name: module for name, module in modules.items() if not f"{name}.".startswith(heads)}
    projections = list(image_projections(model))
    if not projections:
        # attention layers that are there but not recognised (quantised, say) do not make it a convolutional network
        return BackboneParts((), (), None) if _looks_like_attention(model) else _convolutional(model, modules)

    blocks = dict.fromkeys(_block_of(name) for name in projections)
    inside = {name: module for name, module in modules.items() if any(name.startswith(f"{b}.") for b in blocks)}
    order = list(modules)
    last = max(order.index(name) for name in inside)
    backbone = backbone_name(model)
    tower = f"{backbone}." if all(name.startswith(f"{backbone}.") for name in projections) else ""
    first = min(order.index(name) for name in inside)
    # an attention pooling (SigLIP's) is not the backbone's, and not called by every model that has one
    pooling = tuple(f"{n}." for n, m in own_modules(model) if any(map(_is_attention, m.children())))
    after = [name for name in order[last + 1 :] if is_norm(modules[name]) and not name.startswith(pooling)]
    return BackboneParts(
        tuple(name for name, m in inside.items() if isinstance(m, nn.Linear) and not _POSITION_NETWORKS.search(name)),
        (*(name for name, module in inside.items() if is_norm(module)), *_within(tower, after)),
        _patch_embedding(modules, order[:first], tower),
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its input by the input's own statistics, and scales it per channel.

    Those without parameters, and batch normalisation, whose statistics are the data set's, are not meant.
    """
    return (
        "Norm" in type(module).__name__
        and not isinstance(module, _BATCH_NORMS)
        and any(True for _ in module.parameters(recurse=False))
    )


def batch_norms(model: nn.Module) -> list[str]:
    """Names of the batch normalisations of a model, whose running statistics move while it trains."""
    return [name for name, module in named_targets(model) if isinstance(module, _BATCH_NORMS)]


def following_batch_norm(model: nn.Module, name: str) -> str | None:
    """Name of the batch norm to which the output of a layer goes, and nowhere else; None if none is known."""
    parent, _, child = name.rpartition(".")
    norm_name = _BEFORE_BATCH_NORM.get((type(model.get_submodule(parent)).__name__, child))
    norm = getattr(model.get_submodule(parent), norm_name or "", None)
    norm = getattr(norm, "original_module", norm)  # of one that is trained in full
    return f"{parent}.{norm_name}" if getattr(norm, "running_mean", None) is not None else None


def _looks_like_attention(model: nn.Module) -> bool:
    """Whether any module owns projections by name, whatever they are."""
    for _, module in own_modules(model):
        names = [name for name, _ in module.named_children()]
        if (
            FUSED_PROJECTIONS.keys() & set(names)
            or len({PROJECTION_ROLES[n] for n in names if n in PROJECTION_ROLES}) > 1
        ):
            return True
    return False


def _convolutional(model: nn.Module, modules: dict[str, nn.Module]) -> BackboneParts:
    backbone = backbone_name(model)
    prefix = f"{backbone}." if backbone else ""
    modules = {name: module for name, module in modules.items() if name.startswith(prefix)}
    return BackboneParts(
        tuple(name for name, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))),
        tuple(name for name, module in modules.items() if isinstance(module, nn.LayerNorm) and is_norm(module)),
        None,
    )


def _block_of(projection: str) -> str:
    """The module of a stack that an attention layer's projection lies in.

    Example:
        >>> _block_of("swin.encoder.layers.0.blocks.1.attention.q_proj")
        'swin.encoder.layers.0.blocks.1'
    """
    match = re.match(r"(.*\.\d+)\.", projection)
    return match.group(1) if match else projection.rpartition(".")[0].rpartition(".")[0]


def _patch_embedding(modules: dict[str, nn.Module], before: list[str], tower: str) -> str | None:
    """The first convolution before the blocks, or linear layer where the patches are given as vectors."""
    for kind in (nn.Conv2d, nn.Linear):
        found = _within(tower, [name for name in before if isinstance(modules[name], kind)])
        if found:
            return found[0]
    return None


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _within(tower: str, names: list[str]) -> list[str]:
    """Those in the tower that sees the image, if there are any (it may be the stack of blocks alone)."""
    return [name for name in names if name.startswith(tower)] or names
