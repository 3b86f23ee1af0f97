"""Finds the attention layers of a model, their projections by role, and the heads of each projection.

An attention layer is recognised by its structure: a module that owns a query, a key and a value projection, or a fused
one, and states how many heads it has. The number of rows alone would not do: `num_heads * head_dim == out_features`
holds for the output projection as well.
"""

from __future__ import annotations

import re

from torch import nn

from .layout import HeadLayout, ProjectionLayout
from .traversal import own_modules


# Roles of the projections of an attention layer by their names, in today's models, in older ones, and plain ones.
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
# One projection for all three, and the order of its rows.
FUSED_PROJECTIONS = {"qkv": ("query", "key", "value")}
NUM_HEADS_ATTRIBUTES = ("num_attention_heads", "num_heads")
_ATTENTION_CLASS = re.compile("attention|attn", re.IGNORECASE)


def resolve_heads(
    model: nn.Module, num_heads: int | dict[str, int] | None = None, fused_parts: str = "qkv"
) -> dict[str, ProjectionLayout]:
    """Find every query, key, value and fused projection of a model; adapters in it are looked through.

    Args:
        model: The model, plain or with adapters in it.
        num_heads: Numbers of heads, instead of those that the attention layers state. An int applies to every projection with a query, key,
            value or fused (`qkv`) name; a dict maps name patterns (read as `rank_pattern` reads them) to a number of heads
            and applies to any linear module it matches. A projection that the given number does not divide has no
            heads.
        fused_parts: Initials of the wanted parts of fused projections.

    Returns:
        `{module name: ProjectionLayout}` in the order of the model's modules.
    """
    layouts = {}
    for attention_name, attention in own_modules(model):
        detected = _attention_layouts(attention) if num_heads is None or isinstance(num_heads, dict) else {}
        for child_name, child in attention.named_children():
            name = f"{attention_name}.{child_name}" if attention_name else child_name
            out_features = _linear_out_features(child)
            if out_features is None:
                continue
            heads = _explicit_num_heads(num_heads, name, child_name)
            layout = detected.get(child_name) if heads is None else _layout(child_name, out_features, heads)
            if layout is not None:
                layouts[name] = layout.restricted_to(fused_parts)
    return layouts


def interleaved_projections(model: nn.Module) -> list[str]:
    """Names of the fused projections whose rows are q, k and v of the first head, then of the second, and so on.

    A `ProjectionLayout` cannot describe them: it has one block of rows for each of q, k and v. Attention layers with
    `head_first` (timm's MaxViT) or `key_dim` (TinyViT, LeViT) have such rows.
    """
    return [
        f"{name}.{child_name}"
        for name, attention in own_modules(model)
        for child_name in FUSED_PROJECTIONS
        if isinstance(getattr(attention, child_name, None), nn.Module)
        and (getattr(attention, "head_first", False) or hasattr(attention, "key_dim"))
    ]


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a module name matches a key of `rank_pattern` or `num_heads`, as PEFT matches them."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer by any sign: the name of its class, or those of its projections."""
    names = {name for name, _ in module.named_children()}
    return (
        is_called_attention(module)
        or bool(names & FUSED_PROJECTIONS.keys())
        or (len(names & PROJECTION_ROLES.keys()) > 1 and any(hasattr(module, name) for name in NUM_HEADS_ATTRIBUTES))
    )


def is_called_attention(module: nn.Module) -> bool:
    """Whether the name of a module's class says that it is an attention layer."""
    return _ATTENTION_CLASS.search(type(module).__name__) is not None


def owns_projections(module: nn.Module) -> bool:
    """Whether a module's children are projections by name, whatever kind of layer they are."""
    names = {name for name, _ in module.named_children()}
    return bool(names & FUSED_PROJECTIONS.keys()) or len({PROJECTION_ROLES.get(name) for name in names} - {None}) > 1


def _attention_layouts(attention: nn.Module) -> dict[str, ProjectionLayout]:
    """`{child name: layout}` of an attention layer's projections; empty if the module is no attention layer."""
    heads = next((getattr(attention, a) for a in NUM_HEADS_ATTRIBUTES if hasattr(attention, a)), None)
    stated_dim = getattr(attention, "head_dim", None)
    stated_dim = stated_dim if isinstance(stated_dim, int) and stated_dim > 0 else None
    rows = {name: _linear_out_features(child) for name, child in attention.named_children()}
    if heads is None and stated_dim is not None:  # some state the width of their heads alone (DETR)
        heads = _heads_of_width(rows, stated_dim)
    if not isinstance(heads, int) or heads < 1:
        return {}
    kv_heads = getattr(attention, "num_key_value_heads", heads)
    fused = {name: _layout(name, rows[name], heads, kv_heads) for name in FUSED_PROJECTIONS if rows.get(name)}
    # a "qkv" of heads of another width holds something else: keys and values alone (GCViT)
    fused = {n: layout for n, layout in fused.items() if layout and stated_dim in (None, layout.parts[0].head_dim)}
    if fused:
        return fused

    rows = {name: rows[name] for name in rows if name in PROJECTION_ROLES and rows[name]}
    by_role = {PROJECTION_ROLES[name]: out_features for name, out_features in rows.items()}
    if set(by_role) != {"query", "key", "value"} or by_role["query"] % heads:
        return {}
    head_dim = by_role["query"] // heads
    # keys and values may have fewer heads of the same width (grouped-query attention)
    return {
        name: _layout(name, out_features, out_features // head_dim)
        for name, out_features in rows.items()
        if out_features % head_dim == 0
    }


def _heads_of_width(rows: dict[str, int | None], head_dim: int) -> int | None:
    """Number of heads of this width in an attention layer's query or fused projection; None if it has neither."""
    for name, out_features in rows.items():
        parts = len(FUSED_PROJECTIONS.get(name, ())) or int(PROJECTION_ROLES.get(name) == "query")
        if out_features and parts and out_features % (parts * head_dim) == 0:
            return out_features // (parts * head_dim)
    return None


def _layout(child_name: str, out_features: int, heads: int, kv_heads: int | None = None) -> ProjectionLayout | None:
    """The layout of a projection of that name; None if its rows do not divide into so many heads.

    Args:
        child_name: Name that tells the role, or that the projection is fused.
        out_features: Number of its rows.
        heads: Number of its heads; for a fused projection, of its query heads.
        kv_heads: Number of key heads, and of value heads, of a fused projection; as many as query heads if None.
    """
    roles = FUSED_PROJECTIONS.get(child_name) or (PROJECTION_ROLES.get(child_name, "projection"),)
    counts = [heads if role == "query" or kv_heads is None else kv_heads for role in roles]
    if len(roles) == 1:
        counts = [heads]
    head_dim, rest = divmod(out_features, sum(counts))
    if rest or not head_dim:
        return None
    parts, row = [], 0
    for role, count in zip(roles, counts, strict=True):
        parts.append(HeadLayout(role, count, head_dim, first_row=row))
        row += count * head_dim
    return ProjectionLayout(out_features, tuple(parts))


def _linear_out_features(module: nn.Module) -> int | None:
    """Output rows of a linear layer, PEFT-wrapped or not; None for anything else."""
    base_layer = getattr(module, "base_layer", module)
    return base_layer.out_features if isinstance(base_layer, nn.Linear) else None


def _explicit_num_heads(num_heads: int | dict[str, int] | None, name: str, child_name: str) -> int | None:
    if isinstance(num_heads, dict):
        return next((heads for pattern, heads in num_heads.items() if matches_pattern(pattern, name)), None)
    return num_heads if child_name in PROJECTION_ROLES or child_name in FUSED_PROJECTIONS else None
