"""Find the attention projections of a model, their heads, and its classification head, by role.

An attention layer is recognised by its structure: a module that owns a query, a key and a value projection and says
how many heads it has. `num_heads * head_dim == out_features` alone would hold for the output projection as well, so
the role decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .layout import HeadLayout


# Attribute names of the projections inside an attention layer, by role: transformers >= 5.9 and CLIP, transformers
# before that (and SwinV2), plain names.
PROJECTION_ROLES = {
    "q_proj": "query",
    "query": "query",
    "q": "query",
    "k_proj": "key",
    "key": "key",
    "k": "key",
    "v_proj": "value",
    "value": "value",
    "v": "value",
}
NUM_HEADS_ATTRIBUTES = ("num_attention_heads", "num_heads")
CLASSIFIER_NAMES = ("classifier",)


def resolve_heads(model: nn.Module, num_heads: int | dict[str, int] | None = None) -> dict[str, HeadLayout]:
    """Find every query, key and value projection of a model.

    Modules that PEFT has wrapped already are looked through.

    Args:
        model: The model, plain or with adapters in it.
        num_heads: Overrides what the attention layers say. An int applies to every projection with a query, key or
            value name; a dict maps name patterns (read as `rank_pattern` reads them) to a number of heads and
            applies to any linear module it matches. A projection that the given number does not divide has no heads.

    Returns:
        `{module name: HeadLayout}` in the order of the model's modules.
    """
    layouts = {}
    for attention_name, attention in model.named_modules():
        detected = _attention_layouts(attention) if num_heads is None or isinstance(num_heads, dict) else {}
        for child_name, child in attention.named_children():
            name = f"{attention_name}.{child_name}" if attention_name else child_name
            out_features = _linear_out_features(child)
            if out_features is None:
                continue
            role = PROJECTION_ROLES.get(child_name)
            explicit = _explicit_num_heads(num_heads, name, role)
            if explicit is None:
                layout = detected.get(child_name)
            elif out_features % explicit == 0:
                layout = HeadLayout(role or "projection", explicit, out_features // explicit)
            else:
                layout = None
            if layout is not None:
                layouts[name] = layout
    return layouts


def default_targets(model: nn.Module) -> list[str]:
    """The query and value projections as PEFT `target_modules` (the papers adapt q and v, not k).

    The last components of the names where they are enough (`["q_proj", "v_proj"]`), full names where a module of
    the same last component is something else.
    """
    wanted = [name for name, layout in resolve_heads(model).items() if layout.role in ("query", "value")]
    suffixes = sorted({name.rpartition(".")[2] for name in wanted})
    matched = [name for name, _ in named_targets(model) if name.rpartition(".")[2] in suffixes]
    return suffixes if matched == wanted else wanted


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the model's classification head, for PEFT's `modules_to_save`; empty for a bare backbone."""
    heads = []
    for name in CLASSIFIER_NAMES:
        module = getattr(model, name, None)
        # `nn.Identity` is what transformers puts there for num_labels=0
        if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            heads.append(name)
    return heads


def named_targets(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules: what adapters have put inside is left out."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        if hasattr(module, "base_layer"):
            inside.append(name + ".")
        yield name, module


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a module name matches a key of `rank_pattern` or `num_heads`, as PEFT matches them."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _attention_layouts(attention: nn.Module) -> dict[str, HeadLayout]:
    """`{child name: HeadLayout}` of an attention layer's projections; empty if the module is no attention layer."""
    heads = next((getattr(attention, a) for a in NUM_HEADS_ATTRIBUTES if hasattr(attention, a)), None)
    if not isinstance(heads, int) or heads < 1:
        return {}
    rows = {}
    for child_name, child in attention.named_children():
        out_features = _linear_out_features(child)
        if child_name in PROJECTION_ROLES and out_features is not None:
            rows[child_name] = out_features
    by_role = {PROJECTION_ROLES[child_name]: out_features for child_name, out_features in rows.items()}
    if set(by_role) != {"query", "key", "value"} or by_role["query"] % heads:
        return {}
    head_dim = by_role["query"] // heads
    # keys and values may have fewer heads of the same width (grouped-query attention)
    return {
        child_name: HeadLayout(PROJECTION_ROLES[child_name], out_features // head_dim, head_dim)
        for child_name, out_features in rows.items()
        if out_features % head_dim == 0
    }


def _linear_out_features(module: nn.Module) -> int | None:
    """Output rows of a linear layer, PEFT-wrapped or not; None for anything else."""
    base_layer = getattr(module, "base_layer", module)
    return base_layer.out_features if isinstance(base_layer, nn.Linear) else None


def _explicit_num_heads(num_heads: int | dict[str, int] | None, name: str, role: str | None) -> int | None:
    if isinstance(num_heads, dict):
        return next((heads for pattern, heads in num_heads.items() if matches_pattern(pattern, name)), None)
    return num_heads if role is not None else None
