"""Finds attention layers of an image backbone that are not recognised, although others in it are."""

from __future__ import annotations

import re

from torch import nn

from ..heads.detect import is_called_attention, resolve_heads
from ..heads.traversal import own_modules
from .image_part import image_projections, in_image_part


# Words in the name of a projection beside those that tell its role: `to_kv`, `proj_q`, `Wqkv`, `qkv_conv`.
_AFFIXES = {"to", "in", "proj", "projection", "linear", "fc", "conv", "dw", "w", "weight", "layer"}
_ROLE = re.compile("w?([qkv]+)|(q)uer(?:y|ies)|(k)eys?|(v)alues?")
# A pooling by attention is not one of the backbone's layers (SigLIP's, timm's AttentionPoolLatent).
_POOLING = re.compile("pool", re.IGNORECASE)
_HEADS = ("head_dim", "num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "attention_heads")


def overlooked_attention(model: nn.Module) -> list[str]:
    """Names of the attention layers of the image backbone that are not recognised; empty if none is recognised.

    Here an attention layer is a module that owns projections for at least two of query, key and value, by their names,
    or one that states a number of heads and whose class is named after attention.
    """
    recognised = image_projections(model)
    if not recognised:
        return []
    owners = {name.rpartition(".")[0] for name in resolve_heads(model)}
    found: list[str] = []
    pooling: tuple[str, ...] = ("\0",)
    for name, module in own_modules(model):
        inside_one = any(name.startswith(f"{other}.") for other in (*owners, *found))
        if _POOLING.search(type(module).__name__) or _POOLING.search(name.rpartition(".")[2]):
            pooling += (f"{name}.", name) if name else ()
        around_one = any(owner.startswith(f"{name}.") for owner in owners)
        if not name or inside_one or around_one or name in owners or name.startswith(pooling):
            continue
        if _looks_like_attention(module):
            found.append(name)
    return in_image_part(model, found, list(resolve_heads(model)))


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    modules = [name for name, child in module.named_children() if _has_matrix(child)]
    own = [name for name, param in module.named_parameters(recurse=False) if param.dim() > 1]
    roles = set().union(*(_roles(name) for name in (*modules, *own)), set())
    if len(roles) > 1:
        return True
    states_heads = any(isinstance(getattr(module, name, None), int) for name in _HEADS)
    return states_heads and bool(modules) and is_called_attention(module)


def _roles(name: str) -> set[str]:
    """Which of q, k and v a projection of that name computes.

    Example:
        >>> [sorted(_roles(name)) for name in ("to_kv", "qkv_proj", "projection_query", "in_proj_weight", "proj", "key")]
        [['k', 'v'], ['k', 'q', 'v'], ['q'], ['k', 'q', 'v'], [], ['k']]
    """
    if name.startswith("in_proj"):
        return set("qkv")
    words = [word for word in name.lower().split("_") if word and word not in _AFFIXES]
    matches = [_ROLE.fullmatch(word) for word in words]
    return set("".join("".join(filter(None, match.groups())) for match in matches)) if all(matches) else set()


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, in whatever wrapper, and no larger network."""
    weights = [param for param in module.parameters() if param.dim() > 1]
    return 0 < len(weights) <= 2
