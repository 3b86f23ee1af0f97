"""Where a model's gates stand: on the inputs of the modules that follow its heads and its neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..backbones.blocks import Block, find_blocks
from ..backbones.units import neurons_of
from ..heads.criterion_registry import CRITERIA
from ..heads.layout import HeadLayout
from ..heads.neuron_scores import neurons_need_gates
from ..heads.protocol import name_in_base_model


KINDS = ("head", "neuron")


@dataclass(frozen=True, eq=False)
class GatedModule:
    """A module whose input is the output of a block's heads or neurons.

    Attributes:
        kind: One of `KINDS`.
        name: The block's name for heads; for neurons, that of the MLP's first layer; both in the base model.
        module: An attention layer's output projection, or an MLP's second layer, as it is called: with its adapters.
        num_units: Number of heads or neurons.
        projections: For heads, the names in the base model of query, key and value, or of the fused projection.
        first: For neurons, the MLP's first layer, with its adapters.
    """

    kind: str
    name: str
    module: nn.Module
    num_units: int
    projections: tuple[str, ...] = ()
    first: nn.Module | None = None


def gated_modules(model: nn.Module) -> list[GatedModule]:
    """All of a model's, in its order; adapters are looked through. Empty if it has no blocks."""
    return [each for block in find_blocks(model) for each in _of_block(model, block)]


def modules_around_blocks(model: nn.Module) -> list[nn.Module]:
    """The model, its blocks, and every module on the way from one to the other."""
    names = {"", *(name for block in find_blocks(model) for name in _path(block.name))}
    return [model.get_submodule(name) for name in sorted(names)]


def gates_of_heads(
    modules: list[GatedModule], module_of: dict[str, str], layouts: dict[str, HeadLayout]
) -> dict[str, str]:
    """`{projection: name of its attention layer's GatedModule}`, for projections with a gate for each of their heads.

    Args:
        modules: From `gated_modules`.
        module_of: `{projection: name of its module}`; they differ where projections are fused.
        layouts: `{projection: HeadLayout}`.
    """
    by_module = {name: each for each in modules for name in each.projections}
    found = {key: by_module[name] for key, name in module_of.items() if name in by_module}
    return {key: each.name for key, each in found.items() if each.num_units == layouts[key].num_heads}


def needs_gates(config: Any) -> bool:
    """Whether the settings of an adapter ask for gates: by a criterion, or by sharing a budget of operations.

    Args:
        config: The adapter's configuration, of whatever method.
    """
    heads = CRITERIA.get(config.criterion)
    if (heads is not None and heads.needs_gates) or getattr(config, "target_speed", None):
        return True
    return bool(getattr(config, "neuron_ratio", None)) and neurons_need_gates(config.neuron_criterion)


def _of_block(model: nn.Module, block: Block) -> list[GatedModule]:
    """Those of one block, as far as it has them; an MLP whose neurons are no rows of its first layer has none."""
    found = []
    if block.out is not None:
        names = (block.query, block.key, block.value, block.fused)
        projections = tuple(name_in_base_model(name) for name in names if name is not None)
        name, module = name_in_base_model(block.name), model.get_submodule(block.out)
        found.append(GatedModule("head", name, module, block.num_heads, projections))
    num_neurons, _ = neurons_of(model, block)
    if num_neurons:
        first, second = (model.get_submodule(name) for name in block.mlp_layers)
        name = name_in_base_model(block.mlp_layers[0])
        found.append(GatedModule("neuron", name, second, num_neurons, first=first))
    return found


def _path(name: str) -> list[str]:
    """A module's name and those of all modules around it.

    Example:
        >>> _path("vit.layers.0")
        ['vit', 'vit.layers', 'vit.layers.0']
    """
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
