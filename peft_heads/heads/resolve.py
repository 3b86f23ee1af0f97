"""Find the attention projections of a model, their heads, its image backbone and its trained head, by role.

An attention layer is recognised by its structure: a module that owns a query, a key and a value projection, or a fused
one, and says how many heads it has. `num_heads * head_dim == out_features` alone would hold for the output projection
as well, so the role decides.
"""

from __future__ import annotations

import inspect
import re
import warnings

from torch import nn

from .layout import HeadLayout, ProjectionLayout
from .traversal import named_targets, own_modules


# Attribute names of the projections inside an attention layer, by role: transformers >= 5.9 and CLIP, transformers
# before that (and SwinV2, PVT-v2), plain names.
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
# One projection for all three, in this order of rows: timm, Hiera, SAM, BLIP.
FUSED_PROJECTIONS = {"qkv": ("query", "key", "value")}
NUM_HEADS_ATTRIBUTES = ("num_attention_heads", "num_heads")
# Configurations of transformers name the part that sees the image where there are other parts: towers for other inputs
# (`encoder` in a vision encoder-decoder), or what a task adds to a backbone.
TOWER_CONFIGS = ("vision_config", "image_config", "encoder")
BACKBONE_CONFIGS = (*TOWER_CONFIGS, "backbone_config")
# Where the backbone is no module of its own: timm (`head`, and `head_dist` of a distilled one), EoMT.
HEAD_NAMES = ("classifier", "head", "head_dist", "decode_head", "auxiliary_head", "class_predictor", "mask_head")
# By which a model of transformers shows that it computes a task's loss (SAM's `input_labels` are no labels of a task).
LABEL_ARGUMENTS = {"labels", "mask_labels", "class_labels"}
# Modules that are never called themselves, hence cannot be wrapped in `modules_to_save`.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def resolve_heads(
    model: nn.Module, num_heads: int | dict[str, int] | None = None, fused_parts: str = "qkv"
) -> dict[str, ProjectionLayout]:
    """Find every query, key, value and fused projection of a model.

    Modules that PEFT has wrapped already are looked through.

    Args:
        model: The model, plain or with adapters in it.
        num_heads: Overrides what the attention layers say. An int applies to every projection with a query, key,
            value or fused (`qkv`) name; a dict maps name patterns (read as `rank_pattern` reads them) to a number of heads
            and applies to any linear module it matches. A projection that the given number does not divide has no
            heads.
        fused_parts: Initials of the parts of fused projections that are wanted.

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


def default_targets(model: nn.Module) -> list[str]:
    """The query, value and fused projections of the image backbone as PEFT `target_modules`.

    The papers adapt q and v, not k. The last components of the names where they are enough (`["q_proj", "v_proj"]`),
    full names where a module of the same last component is something else (the text tower of CLIP).
    """
    wanted = [
        name
        for name, layout in image_projections(model).items()
        if layout.is_fused or layout.parts[0].role in ("query", "value")
    ]
    return shortest_names(wanted, model)


def image_projections(model: nn.Module) -> dict[str, ProjectionLayout]:
    """`{module name: ProjectionLayout}` of every query, key, value and fused projection of the image backbone."""
    layouts = resolve_heads(model)
    wanted = list(layouts)
    for tower in _text_towers(model):
        wanted = [name for name in wanted if not name.startswith(tower + ".")]
    backbone = backbone_name(model)
    if backbone:
        inside = [name for name in wanted if name.startswith(backbone + ".")]
        has_towers = any(_config_of(model, key) is not None for key in TOWER_CONFIGS)
        # beside a convolutional backbone a detector's transformer is adapted, but not another tower
        wanted = inside if has_towers else inside or wanted
    return {name: layouts[name] for name in wanted}


def shortest_names(names: list[str], model: nn.Module) -> list[str]:
    """The last components of module names where they mean these modules and no others, else the names themselves."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    matched = [name for name, _ in named_targets(model) if name.rpartition(".")[2] in suffixes]
    return suffixes if set(matched) == set(names) else names


def backbone_name(model: nn.Module) -> str:
    """Name of the image backbone in a model that has more than that (a task's head, a text tower); else `""`."""
    for key in BACKBONE_CONFIGS:
        config = _config_of(model, key)
        if config is not None:
            for name, module in own_modules(model):
                if name and type(getattr(module, "config", None)) is type(config):
                    return name
    prefix = getattr(model, "base_model_prefix", "")  # transformers: the attribute that holds the headless model
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def task_head_names(model: nn.Module) -> list[str]:
    """Names of the modules that a task trains from scratch, for PEFT's `modules_to_save`; empty for a bare backbone.

    In a model of transformers that takes labels, everything beside the backbone that is no model or stack of layers
    itself: `classifier`, DeiT's two classifiers, `decode_head` of a segmentation model. Elsewhere, and inside
    transformers' wrapper of timm, what bears a head's name (`HEAD_NAMES`).
    """
    backbone = backbone_name(model)
    names: list[str] = []
    if hasattr(model, "base_model_prefix"):
        names = [name for name, _ in model.named_children() if backbone and name != backbone.partition(".")[0]]
        if not LABEL_ARGUMENTS & set(inspect.signature(model.forward).parameters):
            return [name for name in names if name.endswith("classifier")]  # DeiT with teacher takes no labels
    prefix = ""
    if not names:
        owner = model.get_submodule(backbone)
        prefix = f"{backbone}." if backbone else ""
        names = [prefix + name for name in HEAD_NAMES if isinstance(getattr(owner, name, None), nn.Module)]
    return _unambiguous(model, [name for name in names if _is_head(model, name)])


def bypassed_projections(model: nn.Module) -> list[str]:
    """Fused projections whose attention layer reads their weight instead of calling them: no adapter can work there.

    timm's BEiT, EVA and Swin V2 do, because they keep the bias of q and v apart.
    """
    return [
        f"{name}.{child_name}"
        for name, attention in own_modules(model)
        for child_name in FUSED_PROJECTIONS
        if isinstance(getattr(attention, child_name, None), nn.Module)
        and getattr(attention, "q_bias", None) is not None
        and not getattr(attention, "qkv_bias_separate", False)
    ]


def interleaved_projections(model: nn.Module) -> list[str]:
    """Fused projections whose rows are q, k and v of the first head, then of the second, …: not laid out part by part.

    timm's MaxViT (`head_first`), TinyViT and LeViT (`key_dim`) have them.
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


def _attention_layouts(attention: nn.Module) -> dict[str, ProjectionLayout]:
    """`{child name: layout}` of an attention layer's projections; empty if the module is no attention layer."""
    heads = next((getattr(attention, a) for a in NUM_HEADS_ATTRIBUTES if hasattr(attention, a)), None)
    if not isinstance(heads, int) or heads < 1:
        return {}
    rows = {name: _linear_out_features(child) for name, child in attention.named_children()}
    kv_heads = getattr(attention, "num_key_value_heads", heads)
    fused = {name: _layout(name, rows[name], heads, kv_heads) for name in FUSED_PROJECTIONS if rows.get(name)}
    if any(fused.values()):
        return {name: layout for name, layout in fused.items() if layout is not None}

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


def _layout(child_name: str, out_features: int, heads: int, kv_heads: int | None = None) -> ProjectionLayout | None:
    """The layout of a projection of that name; None if its rows do not divide into so many heads.

    Args:
        child_name: Says the role, or that it is fused.
        out_features: Its rows.
        heads: Its heads, or a fused projection's query heads.
        kv_heads: The key and the value heads of a fused projection (grouped-query attention), if not as many.
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


def _is_head(model: nn.Module, name: str) -> bool:
    """Whether a module beside the backbone can be what a task trains from scratch.

    Not a model of its own (a text decoder), not a stack of attention layers, not the output layer of a language
    model, and not the `nn.Identity` that stands there for num_labels=0.
    """
    module = model.get_submodule(name)
    # transformers before 5.0 makes a model of SegFormer's `decode_head` as well
    is_model = name not in HEAD_NAMES and any(hasattr(inner, "base_model_prefix") for _, inner in own_modules(module))
    is_stack = isinstance(module, _CONTAINERS) and any(_attention_layouts(inner) for _, inner in own_modules(module))
    get_output_embeddings = getattr(model, "get_output_embeddings", lambda: None)
    return _has_parameters(module) and not is_model and not is_stack and module is not get_output_embeddings()


def _text_towers(model: nn.Module) -> list[str]:
    """Names of the models inside a model that read text."""
    return [
        name
        for name, module in own_modules(model)
        if name
        and getattr(module, "main_input_name", None) == "input_ids"
        and hasattr(getattr(module, "config", None), "vocab_size")
    ]


def _config_of(model: nn.Module, key: str) -> object | None:
    return getattr(getattr(model, "config", None), key, None)


def _unambiguous(model: nn.Module, heads: list[str]) -> list[str]:
    """Names for `modules_to_save` that stand for the heads and nothing else.

    PEFT reads a name as the end of module names ("head" is "decode_head.head" as well) and wraps what it finds, which
    must not be a mere container, nor contain something else that is wrapped. A name that leads there is replaced by
    those of the modules inside; one that PEFT could not wrap at all is left out, with a warning.
    """
    names = list(heads)
    while True:
        matched = [key for key, _ in own_modules(model) if key.endswith(tuple(names))]
        for name in names:
            mine = [key for key in matched if key.endswith(name)]
            inner = [f"{name}.{c}" for c, m in model.get_submodule(name).named_children() if _has_parameters(m)]
            if inner and not all(_stands_alone(model, key, heads, matched) for key in mine):
                names = [other for other in names if other != name] + inner
                break
            if any(isinstance(model.get_submodule(key), _CONTAINERS) for key in mine):
                warnings.warn(
                    f"{name} looks like a part of the task's head, but PEFT cannot train it in full, because its name "
                    f"also means {', '.join(mine)}; pass modules_to_save= with what is to be trained"
                )
                names = [other for other in names if other != name]
                break
        else:
            return names


def _stands_alone(model: nn.Module, key: str, heads: list[str], matched: list[str]) -> bool:
    return (
        any(key == head or key.startswith(head + ".") for head in heads)
        and not isinstance(model.get_submodule(key), _CONTAINERS)
        and not any(other.startswith(key + ".") for other in matched)
    )


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
