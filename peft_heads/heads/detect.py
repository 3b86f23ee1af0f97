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

from ..backbones.classifier import is_loss, label_sized_modules
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
    return {name: layouts[name] for name in in_image_part(model, list(layouts), list(layouts))}


def in_image_part(model: nn.Module, names: list[str], projections: list[str]) -> list[str]:
    """Those of the named modules that lie in the part of the model whose projections are adapted.

    Args:
        model: The model.
        names: Names of modules in it.
        projections: Names of the projections in the whole of it.
    """
    towers = tuple(f"{tower}." for tower in _text_towers(model))
    names, projections = ([n for n in some if not n.startswith(towers or ("\0",))] for some in (names, projections))
    backbone = backbone_name(model)
    has_towers = any(_config_of(model, key) is not None for key in TOWER_CONFIGS)
    # beside a convolutional backbone a detector's transformer is adapted, but not another tower
    if backbone and (has_towers or any(name.startswith(f"{backbone}.") for name in projections)):
        return [name for name in names if name.startswith(f"{backbone}.")]
    return names


def shortest_names(names: list[str], model: nn.Module) -> list[str]:
    """The last components of module names where they mean these modules and no others, else the names themselves."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    matched = [name for name, _ in named_targets(model) if name.rpartition(".")[2] in suffixes]
    return suffixes if set(matched) == set(names) else names


def exact_targets(names: list[str], model: nn.Module) -> list[str] | str:
    """`target_modules` that mean these modules and no others: the last components, the names, or a pattern of them.

    PEFT reads a name as the end of others: timm's final `norm` is `patch_embed.norm` as well.
    """
    targets = shortest_names(names, model)
    ends = tuple(f".{target}" for target in targets)
    reached = {name for name, _ in named_targets(model) if name in targets or name.endswith(ends)}
    return targets if reached == set(names) else "|".join(map(re.escape, names))


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

    In a model of transformers that takes labels, everything beside the backbone that is no model, stack of layers or
    loss itself: `classifier`, DeiT's two classifiers, `decode_head` of a segmentation model; and what inside of the
    backbone is as large as the number of labels (Perceiver, OneFormer). Elsewhere, and inside transformers' wrapper of
    timm, what bears a head's name (`HEAD_NAMES`), or what timm's `get_classifier` gives. If a model takes labels and no
    classifier is found, a warning says so.
    """
    backbone = backbone_name(model)
    names: list[str] = []
    is_transformers = hasattr(model, "base_model_prefix")
    takes_labels = is_transformers and bool(LABEL_ARGUMENTS & set(inspect.signature(model.forward).parameters))
    if is_transformers:
        names = [name for name, _ in model.named_children() if backbone and name != backbone.partition(".")[0]]
        if not takes_labels:
            return [name for name in names if name.endswith("classifier")]  # DeiT with teacher takes no labels
    if not names:
        owner = model.get_submodule(backbone)
        prefix = f"{backbone}." if backbone else ""
        heads = {name: getattr(owner, name, None) for name in HEAD_NAMES}
        names = [prefix + n for n, head in heads.items() if isinstance(head, nn.Module) and _has_parameters(head)]
        names = names or [prefix + name for name in _named_by_model(owner)]
    names = [name for name in names if _is_head(model, name)]
    if takes_labels:
        names += _heads_inside(model, names)
    return _unambiguous(model, names)


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
    stated_dim = getattr(attention, "head_dim", None)
    stated_dim = stated_dim if isinstance(stated_dim, int) and stated_dim > 0 else None
    rows = {name: _linear_out_features(child) for name, child in attention.named_children()}
    if heads is None and stated_dim is not None:  # DETR and its kin
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
    """How many heads of this width an attention layer's query, or its fused projection, has; None if it has no such."""
    for name, out_features in rows.items():
        parts = len(FUSED_PROJECTIONS.get(name, ())) or int(PROJECTION_ROLES.get(name) == "query")
        if out_features and parts and out_features % (parts * head_dim) == 0:
            return out_features // (parts * head_dim)
    return None


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
    return (
        _has_parameters(module)
        and not is_model
        and not is_stack
        and not is_loss(module)
        and module is not get_output_embeddings()
    )


def _named_by_model(model: nn.Module) -> list[str]:
    """The classifier that a model of timm names itself."""
    classifier = getattr(model, "get_classifier", lambda: None)()
    return [name for name, module in model.named_modules() if name and module is classifier]


def _heads_inside(model: nn.Module, names: list[str]) -> list[str]:
    """What is as large as the number of labels, beside the heads of these names; warns if there is no classifier."""
    inside, lost = label_sized_modules(model, names)
    if lost:
        warnings.warn(
            f"{', '.join(lost)} of {type(model).__name__} depend on the number of labels, but PEFT cannot train them "
            "without the modules beside them: they stay as they are. Name the modules to train in modules_to_save="
        )
    elif not names and not inside and _takes_classes(model):
        warnings.warn(
            f"no classifier was found in {type(model).__name__}, so that nothing but the adapter is trained and saved. "
            "Pass modules_to_save= with the modules that are new for the task, or modules_to_save=[] if there are none"
        )
    return inside


def _takes_classes(model: nn.Module) -> bool:
    """Whether the labels that a model takes are classes, and not the words of a language model inside."""
    models = [module for module in model.modules() if hasattr(module, "base_model_prefix")]
    speaks = any(getattr(part, "get_output_embeddings", lambda: None)() is not None for part in models)
    return not speaks and (getattr(getattr(model, "config", None), "num_labels", 0) or 0) > 0


def _text_towers(model: nn.Module) -> list[str]:
    """Names of the models inside a model that read text, and are neither a vision tower nor around or in one."""
    models = {name: getattr(module, "main_input_name", None) for name, module in own_modules(model) if name}
    vision = [name for name, main_input in models.items() if main_input == "pixel_values"]
    vision += [backbone] if (backbone := backbone_name(model)) else []
    return [
        name
        for name, main_input in models.items()
        if main_input == "input_ids"
        and hasattr(getattr(model.get_submodule(name), "config", None), "vocab_size")
        and not any(f"{tower}.".startswith(f"{name}.") for tower in vision)
        and not (backbone and name.startswith(f"{backbone}."))
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
