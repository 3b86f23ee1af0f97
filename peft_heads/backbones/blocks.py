"""The blocks of an image backbone and the parts of each: what attends, what follows, and what stands around both."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..heads.layout import ProjectionLayout
from ..heads.traversal import named_targets, unwrapped
from .bypass import child_uses
from .image_part import image_projections
from .norms import normalises


# Networks that compute an attention layer's position bias (SwinV2): linear layers, but none of the block's.
POSITION_NETWORKS = re.compile(r"(^|\.)[^.]*(position|rel_pos|cpb)[^.]*\.")
# Names of layer scales (of a module or of a parameter) and of stochastic depth, each with the number of its branch:
# `layer_scale1`, `ls1`, `lambda_1`, `gamma_1`; `drop_path1`, or `drop_path` for both branches.
_SCALE = re.compile(r"(layer_?scale|ls|lambda|gamma)_?([12])")
_DROP_PATH = re.compile(r"(drop_path|stochastic_depth)_?([12]?)")
_SCALINGS = ("scaling", "scale")
_LEARNED_SCALINGS = ("logit_scale", "temperature")


@dataclass(frozen=True)
class Block:
    """One block: a residual branch with an attention layer, then a residual branch with an MLP.

    Every part is named as in the model, also where an adapter is wrapped around it. A part that the block does not
    have is None.

    Attributes:
        name: Name of the block itself.
        query, key, value: Projections of their own; None where they are fused.
        out: Output projection of the attention layer.
        fused: Projection for query, key and value together; None where they are not fused.
        num_heads: Number of query heads.
        scaling: Factor of the products of queries and keys; None where it is learned (SwinV2).
        norm1, norm2: Norms of the attention branch and of the MLP branch, before the branch or (SwinV2) at its end.
            Batch norms are not meant.
        mlp: Module that computes the MLP; None where the block calls the layers of the MLP one by one.
        mlp_layers: Linear layers of the MLP in the model's order; the last one ends the branch.
        scale1, scale2: Layer scales of the branches: names of modules, or of parameters of the block (BEiT).
        drop_path1, drop_path2: Modules that leave out the branches at random. They may be the same module; one whose
            rate is 0, which is an `nn.Identity`, is None.
        problem: What is missing, for a message that begins with the block's name; None if all is there.
    """

    name: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    out: str | None = None
    fused: str | None = None
    num_heads: int | None = None
    scaling: float | None = None
    norm1: str | None = None
    norm2: str | None = None
    mlp: str | None = None
    mlp_layers: tuple[str, ...] = ()
    scale1: str | None = None
    scale2: str | None = None
    drop_path1: str | None = None
    drop_path2: str | None = None
    problem: str | None = None


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of a model's image backbone in the model's order, whole or not; adapters are looked through."""
    layouts = image_projections(model)
    modules = {name: unwrapped(module) for name, module in named_targets(model)}
    by_block: dict[str, dict[str, ProjectionLayout]] = {}
    for name, layout in layouts.items():
        by_block.setdefault(block_of(name), {})[name] = layout
    return tuple(_block(model, modules, name, projections) for name, projections in by_block.items())


def whole_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The same blocks where each has all that makes a block: one attention layer with its output, and an MLP.

    Raises:
        ValueError: A block misses one of these, or the model has no blocks.
    """
    blocks = find_blocks(model)
    for block in blocks:
        if block.problem is not None:
            raise ValueError(f"{block.name} {block.problem}")
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks with attention heads")
    return blocks


def block_of(projection: str) -> str:
    """Name of the block that an attention layer's projection belongs to: the module of a stack that it lies in.

    Example:
        >>> block_of("swin.encoder.layers.0.blocks.1.attention.q_proj")
        'swin.encoder.layers.0.blocks.1'
    """
    match = re.match(r"(.*\.\d+)\.", projection)
    return match.group(1) if match else projection.rpartition(".")[0].rpartition(".")[0]


def _block(
    model: nn.Module, modules: dict[str, nn.Module], name: str, projections: dict[str, ProjectionLayout]
) -> Block:
    """A block with all that is found of it.

    Args:
        model: The model.
        modules: Its modules by name, without adapters around them.
        name: Name of the block.
        projections: Query, key and value, or fused projections in it.
    """
    others = [
        other
        for other, module in modules.items()
        if isinstance(module, nn.Linear) and is_inside(other, name) and other not in projections
    ]
    others = [other for other in others if not POSITION_NETWORKS.search(other)]
    block = Block(name)
    attention_layers = {projection.rpartition(".")[0] for projection in projections}
    if len(attention_layers) == 1:
        attention = attention_layers.pop()
        query = next(part for layout in projections.values() for part in layout.parts if part.role == "query")
        block = replace(
            block,
            **{"fused" if layout.is_fused else layout.parts[0].role: key for key, layout in projections.items()},
            num_heads=query.num_heads,
            scaling=_scaling(model.get_submodule(attention), query.head_dim),
        )
        block = _with_ends(block, modules, _scope(attention, name, others), others, query.num_rows)
        block = _with_surroundings(block, model.get_submodule(name))
    if block.out is None or not block.mlp_layers:
        block = replace(block, problem=_problem(modules, others, modules[next(iter(projections))].in_features))
    return block


def _problem(modules: dict[str, nn.Module], others: list[str], width: int) -> str:
    ends = [other for other in others if modules[other].out_features == width]
    return (
        f"has {len(ends)} linear layers with {width} outputs ({', '.join(ends) or 'none'}) beside query, key and "
        "value; expected two, the ends of attention and MLP"
    )


def _scaling(attention: nn.Module, head_dim: int) -> float | None:
    """The factor that an attention layer states, else that of scaled dot products; None if it has a learned one."""
    stated = [getattr(attention, name, None) for name in _SCALINGS]
    if any(hasattr(attention, name) for name in _LEARNED_SCALINGS) or any(isinstance(s, torch.Tensor) for s in stated):
        return None
    return next((float(value) for value in stated if isinstance(value, (int, float))), head_dim**-0.5)


def _scope(attention: str, block: str, others: list[str]) -> str:
    """The smallest module around an attention layer, or itself, that holds a linear layer beside the projections.

    transformers' ViT before 5.9 has its output projection beside the attention layer: `attention.attention.query` and
    `attention.output.dense`. The block itself is returned if nothing smaller does.
    """
    scope = attention
    while is_inside(scope, block) and not any(is_inside(other, scope) for other in others):
        scope = scope.rpartition(".")[0]
    return scope


def _with_ends(block: Block, modules: dict[str, nn.Module], scope: str, others: list[str], width: int) -> Block:
    """The block with the output of its attention layer and its MLP, as far as it is clear which they are.

    Args:
        block: The block.
        modules: The model's modules by name.
        scope: The part of the block in which the output projection lies.
        others: Linear layers of the block beside query, key and value.
        width: Inputs of the output projection: what all heads return together.
    """
    around = [other for other in others if is_inside(other, scope)] if is_inside(scope, block.name) else []
    outputs = [other for other in around if modules[other].in_features == width]
    if len(outputs) != 1:
        return block
    layers = _mlp_layers([other for other in others if other not in around])
    if not layers or modules[layers[-1]].out_features != modules[outputs[0]].out_features:
        return replace(block, out=outputs[0])
    mlp = _common_module(layers)
    return replace(block, out=outputs[0], mlp=mlp if is_inside(mlp, block.name) else None, mlp_layers=tuple(layers))


def _mlp_layers(names: list[str]) -> list[str]:
    """Which of a block's linear layers are the MLP's: two or more in one module, else two by themselves.

    A layer beside them stands for something else (Hiera widens the tokens where a stage begins).
    """
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    groups = [group for group in by_module.values() if len(group) > 1]
    if len(groups) == 1:
        return groups[0]
    return names if not groups and len(names) == 2 else []


def _with_surroundings(block: Block, module: nn.Module) -> Block:
    """The block with the norms, layer scales and drop paths that are its own children or parameters."""
    prefix = f"{block.name}." if block.name else ""
    children = {
        name: unwrapped(child) for name, child in module.named_children() if not isinstance(child, nn.Identity)
    }
    norms = [name for name, child in children.items() if normalises(child)]
    branches = 1 + bool(block.mlp_layers)
    norms = norms if len(norms) == branches else []
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    scales = _by_branch(_SCALE, [*children, *parameters])
    drop_paths = _by_branch(_DROP_PATH, list(children))
    if drop_paths[0] == drop_paths[1] and drop_paths[0] in child_uses(type(module)).called_once:
        drop_paths[1] = None  # transformers' Swin
    found = [*(*norms, None, None)[:2], *scales, *drop_paths]
    fields = ("norm1", "norm2", "scale1", "scale2", "drop_path1", "drop_path2")
    return replace(block, **{f: None if n is None else prefix + n for f, n in zip(fields, found, strict=True)})


def _by_branch(pattern: re.Pattern, names: list[str]) -> list[str | None]:
    """Names that match, for each of the two branches; one without a number is for both."""
    matches = {name: match[2] for name in names if (match := pattern.fullmatch(name))}
    return [next((name for name, number in matches.items() if number in ("", branch)), None) for branch in "12"]


def is_inside(name: str, module: str) -> bool:
    """Whether a module lies in another; `""` is the model."""
    return name.startswith(f"{module}.") if module else name != ""


def _common_module(names: list[str]) -> str:
    """The smallest module around all of the named ones.

    Example:
        >>> _common_module(["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"])
        'blocks.0.mlp'
    """
    return os.path.commonpath([name.replace(".", "/") for name in names]).replace("/", ".")
