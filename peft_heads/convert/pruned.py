"""Removes deactivated heads from a model: an ordinary, smaller checkpoint of transformers with the same outputs.

This is exact under `mask_scope="head"`, where a deactivated head's value is zero, bias included. The weights to slice
are found by their shapes, which differ from those of a model that is built with fewer heads, and not by their names.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from peft import LoraConfig

from ..adapter_folder.atomic import new_folder
from ..adapter_folder.settings import read_settings
from ..heads.detect import resolve_heads
from ..heads.layout import HeadLayout
from ..heads.protocol import get_head_masks
from ..image_classifier import fetch_adapter
from ..tuners.common.method_registry import adapter_types
from .merged import load_whole_model, merge, save_checkpoint
from .source import check_type, sources


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_pruned(
    adapter: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Merge an adapter with `mask_scope="head"` and write the model without its deactivated heads.

    The checkpoint can be read by the installed version of transformers (see [`prune_heads`]). Arguments, result and
    errors are those of [`peft_heads.convert.lora.export_lora`].
    """
    with new_folder(target, overwrite, sources(adapter, base_model)) as folder:
        source = fetch_adapter(adapter)
        settings = read_settings(source)
        check_type(source, settings, adapter_types(LoraConfig))
        if settings.get("mask_scope") != "head":
            raise ValueError(
                f"{source} has mask_scope={settings.get('mask_scope')!r}, under which the frozen heads go on working "
                "and cannot be removed (expected 'head'); use --to lora or --to merged"
            )
        model = load_whole_model(source, base_model)
        masks = get_head_masks(model)
        save_checkpoint(folder, prune_heads(merge(model, source), masks), source, base_model)
    return Path(target)


def prune_heads(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of a model without the heads whose value projection is masked, in evaluation mode.

    The configuration has to say that heads are missing: in transformers since 5.9 (DINOv2: 5.18) by
    `num_attention_heads` and `head_dim`, in 4.57 by `pruned_heads`, and neither version reads the other's. Both are
    tried. The result is compared with `model` on a random image, for which `model` is set to evaluation mode.

    Args:
        model: A model of transformers in which the value of a masked head is zero: the adapter is merged.
        masks: `{projection: bool (num_heads,)}`, True = active, from `get_head_masks`. A head can be removed if its
            value is masked; a masked query or key is not enough.

    Raises:
        ValueError: The heads cannot be removed, with the reason.
    """
    config = type(model.config).__name__
    values = _value_projections(model)
    if not isinstance(getattr(model.config, "num_attention_heads", None), int) or not values:
        raise ValueError(
            f"heads cannot be removed from a {type(model).__name__}: its {config} has no number of heads that holds "
            "for all layers (num_attention_heads); use --to merged"
        )
    kept = {
        name: masks.get(projection, torch.ones(part.num_heads, dtype=torch.bool))
        for name, (projection, part) in values.items()
    }
    removed = {values[name][0]: int((~mask).sum()) for name, mask in kept.items()}
    if len(set(removed.values())) > 1 or not any(removed.values()):
        raise ValueError(
            "the same number of heads must be deactivated in the value projections of all layers, and at least one; "
            f"found {', '.join(f'{number} in {name}' for name, number in removed.items())}; use --to merged"
        )
    part = next(iter(values.values()))[1]
    number, head_dim = part.num_heads - next(iter(removed.values())), part.head_dim
    if number == 0:
        raise ValueError("all heads are deactivated, and a layer without heads cannot be built; use --to merged")
    problems = []
    for way, small in _smaller_models(model, kept, number, head_dim):
        problem = small if isinstance(small, str) else _difference(model, small)
        if problem is None:
            return small
        problems.append(f"{way}: {problem}")
    raise ValueError(
        f"transformers {transformers.__version__} cannot build a {type(model).__name__} with {number} heads of "
        f"{head_dim} rows ({'; '.join(problems)}); use --to merged, or, where the version is at fault, transformers "
        "4.57, or 5.18 and later, for both export and use"
    )


def slice_heads(
    weights: dict[str, torch.Tensor], smaller: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], head_dim: int
) -> dict[str, torch.Tensor]:
    """The weights of a model with fewer heads.

    Dimensions that differ are sliced: those of `num_heads * head_dim` by rows, those of `num_heads` (a position bias)
    by heads.

    Args:
        weights: State dict of the model as it is.
        smaller: State dict with the same names and the shapes wanted.
        kept: `{attention layer: bool (num_heads,)}`, True = kept. A weight follows the layer nearest to it by name.
        head_dim: Rows per head.

    Raises:
        ValueError: A weight is shared by layers that keep different heads, or differs in another way.

    Example:
        >>> kept = {"layers.0.attention": torch.tensor([True, False, True])}
        >>> smaller = {"layers.0.attention.v_proj.bias": torch.zeros(4)}
        >>> slice_heads({"layers.0.attention.v_proj.bias": torch.arange(6)}, smaller, kept, head_dim=2)
        {'layers.0.attention.v_proj.bias': tensor([0, 1, 4, 5])}
    """
    sliced = {}
    for key, weight in weights.items():
        for dim, size in enumerate(smaller[key].shape):
            if weight.shape[dim] == size:
                continue
            heads = _nearest(key, kept)
            rows = heads.repeat_interleave(head_dim)
            chosen = next((mask for mask in (rows, heads) if len(mask) == weight.shape[dim]), None)
            if chosen is None or int(chosen.sum()) != size:
                raise ValueError(f"{key} is {tuple(weight.shape)}, and {tuple(smaller[key].shape)} with fewer heads")
            weight = weight.index_select(dim, chosen.nonzero().flatten())
        sliced[key] = weight
    return sliced


def _value_projections(model: PreTrainedModel) -> dict[str, tuple[str, HeadLayout]]:
    """`{attention layer: (its value projection, the heads of it)}`."""
    return {
        name.rpartition(".")[0]: (name, layout.parts[0])
        for name, layout in resolve_heads(model).items()
        if layout.parts[0].role == "value"
    }


def _smaller_models(
    model: PreTrainedModel, kept: dict[str, torch.Tensor], number: int, head_dim: int
) -> Iterator[tuple[str, PreTrainedModel | str]]:
    """The ways to say that heads are missing, each with the smaller model, or with the reason why there is none."""
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.head_dim = number, head_dim
    yield "num_attention_heads and head_dim", _from_config(model, config, kept, number, head_dim)
    if hasattr(model, "prune_heads"):
        yield "pruned_heads", _by_pruned_heads(model, kept)


def _by_pruned_heads(model: PreTrainedModel, kept: dict[str, torch.Tensor]) -> PreTrainedModel | str:
    """The model after transformers' own `prune_heads`."""
    small = copy.deepcopy(model)
    try:
        small.prune_heads({i: (~mask).nonzero().flatten().tolist() for i, mask in enumerate(kept.values())})
    except (AttributeError, NotImplementedError) as error:
        return str(error)
    return small.to(model.dtype)  # the smaller layers are made in float32


def _from_config(
    model: PreTrainedModel, config: transformers.PretrainedConfig, kept: dict[str, torch.Tensor], number: int, dim: int
) -> PreTrainedModel | str:
    """A model of `config`, which has `number` heads of `dim` rows, with the weights of the kept heads."""
    try:
        small = type(model)(config).to(model.dtype)
    except (ValueError, RuntimeError) as error:
        return " ".join(str(error).split())
    parts = [part for layout in resolve_heads(small).values() for part in layout.parts]
    if not parts or any((part.num_heads, part.head_dim) != (number, dim) for part in parts):
        return f"{type(config).__name__} does not heed them"
    try:
        small.load_state_dict(slice_heads(model.state_dict(), small.state_dict(), kept, dim))
    except ValueError as error:
        return str(error)
    return small


def _difference(model: PreTrainedModel, small: PreTrainedModel) -> str | None:
    """How the outputs of the models differ on a random image; None if they agree in half of their digits."""
    size = model.config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    images = torch.randn(1, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            expected, actual = (m.eval()(images.to(m.dtype))[0] for m in (model, small))
    except RuntimeError as error:
        return f"it cannot be run ({' '.join(str(error).split())})"
    error = float((actual - expected).norm() / expected.norm())
    return None if error < torch.finfo(model.dtype).eps ** 0.5 else f"its outputs differ by {error:.1%}"


def _nearest(key: str, kept: dict[str, torch.Tensor]) -> torch.Tensor:
    """The heads kept by the attention layer that shares most of a weight's name."""
    shared = {name: _common_parts(name.split("."), key.split(".")) for name in kept}
    nearest = [mask for name, mask in kept.items() if shared[name] == max(shared.values())]
    if any(not torch.equal(mask, nearest[0]) for mask in nearest):
        raise ValueError(
            f"{key} is shared by layers that keep different heads; the same must be deactivated in all "
            "(granularity='global')"
        )
    return nearest[0]


def _common_parts(one: list[str], other: list[str]) -> int:
    """The number of leading parts that two names have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
