"""What an image backbone consists of: its blocks and their parts, final norm, patch embedding and classifier.

A block is the module of a stack that owns an attention layer. A backbone without attention layers is a convolutional
network, whose matrices are all of its convolutions and linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..heads.detect import owns_projections
from ..heads.traversal import named_targets, own_modules
from .blocks import POSITION_NETWORKS, Block, find_blocks, is_inside
from .classifier import classifier_names
from .image_part import backbone_name
from .norms import is_norm


@dataclass(frozen=True)
class Backbone:
    """An image backbone, by the names of its modules in the model.

    Attributes:
        blocks: The blocks in the model's order; empty for a convolutional network.
        matrices: Linear layers of the blocks (query, key, value, attention output, MLP); for a convolutional network,
            all convolutions and linear layers.
        norms: Norms of the blocks, and those after them; for a convolutional network, all layer norms.
        final_norm: Last norm after the blocks; None if there is none.
        patch_embedding: Projection of the patches; None if there is none.
        classifiers: Modules that a task trains from scratch, part of the backbone or beside it.
    """

    blocks: tuple[Block, ...] = ()
    matrices: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    final_norm: str | None = None
    patch_embedding: str | None = None
    classifiers: tuple[str, ...] = ()


def find_backbone(model: nn.Module) -> Backbone:
    """Find the image backbone of a model, plain or with adapters in it; blocks and layers are empty if there is none."""
    classifiers = tuple(classifier_names(model))
    prefixes = tuple(f"{name}." for name in classifiers)
    modules = {
        name: getattr(module, "base_layer", module)
        for name, module in named_targets(model)
        if not f"{name}.".startswith(prefixes)
    }
    blocks = find_blocks(model)
    if blocks:
        return _transformer(model, modules, blocks, classifiers)
    # attention layers that are there but not recognised (quantised, say) do not make it a convolutional network
    if any(owns_projections(module) for _, module in own_modules(model)):
        return Backbone(classifiers=classifiers)
    return _convolutional(model, modules, classifiers)


def _transformer(
    model: nn.Module, modules: dict[str, nn.Module], blocks: tuple[Block, ...], classifiers: tuple[str, ...]
) -> Backbone:
    order = list(modules)
    inside = {name: module for name, module in modules.items() if any(is_inside(name, block.name) for block in blocks)}
    first, last = (at(map(order.index, inside)) for at in (min, max))
    backbone = backbone_name(model)
    tower = f"{backbone}." if all(block.name.startswith(f"{backbone}.") for block in blocks) else ""
    # an attention pooling (SigLIP's) is not the backbone's, and not called by every model that has one
    pooling = tuple(f"{n}." for n, m in own_modules(model) if any(map(_is_torch_attention, m.children())))
    after = [name for name in order[last + 1 :] if is_norm(modules[name]) and not name.startswith(pooling)]
    after = _within(tower, after)
    return Backbone(
        blocks=blocks,
        matrices=tuple(n for n, m in inside.items() if isinstance(m, nn.Linear) and not POSITION_NETWORKS.search(n)),
        norms=(*(name for name, module in inside.items() if is_norm(module)), *after),
        final_norm=after[-1] if after else None,
        patch_embedding=_patch_embedding(modules, order[:first], tower),
        classifiers=classifiers,
    )


def _convolutional(model: nn.Module, modules: dict[str, nn.Module], classifiers: tuple[str, ...]) -> Backbone:
    backbone = backbone_name(model)
    prefix = f"{backbone}." if backbone else ""
    modules = {name: module for name, module in modules.items() if name.startswith(prefix)}
    return Backbone(
        matrices=tuple(name for name, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))),
        norms=tuple(name for name, module in modules.items() if isinstance(module, nn.LayerNorm) and is_norm(module)),
        classifiers=classifiers,
    )


def _patch_embedding(modules: dict[str, nn.Module], before: list[str], tower: str) -> str | None:
    """The first convolution before the blocks, or linear layer where the patches are given as vectors."""
    for kind in (nn.Conv2d, nn.Linear):
        found = _within(tower, [name for name in before if isinstance(modules[name], kind)])
        if found:
            return found[0]
    return None


def _is_torch_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _within(tower: str, names: list[str]) -> list[str]:
    """Those in the tower that sees the image, if there are any (it may be the stack of blocks alone)."""
    return [name for name in names if name.startswith(tower)] or names
