"""The size of an adapter's update in every head, and whether it is zero where a mask says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from ..heads.layout import HeadLayout, ProjectionLayout
from ..tuners.common.head_mask import contradiction
from ..tuners.common.saved_keys import module_of


def update_norms(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, layout: HeadLayout) -> torch.Tensor:
    """Frobenius norm of each head's rows of `scaling · B · A`.

    The product, which is as large as the frozen weight, is never formed.

    Args:
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: Factor of the update.
        layout: The heads.

    Returns:
        float64 (num_heads,).

    Example:
        >>> layout = HeadLayout("query", num_heads=2, head_dim=1)
        >>> update_norms(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), 2.0, layout).tolist()
        [10.0, 0.0]
    """
    A, B = lora_A.double(), layout.rows(lora_B).double()
    squares = ((B @ (A @ A.T)) * B).sum(dim=1).clamp(min=0)  # (num_rows,)
    return scaling * layout.sum_rows(squares).sqrt()


def norms_by_head(
    tensors: dict[str, torch.Tensor], layouts: dict[str, ProjectionLayout], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """`{projection: float64 (num_heads,)}`, the `update_norms` of every LoRA module whose heads are known.

    Args:
        tensors: The tensors of the file, unpacked.
        layouts: `{module, by its name in the file: its heads}`.
        settings: The adapter's configuration, for the scaling.
    """
    norms = {}
    for key, lora_A in tensors.items():
        name = module_of(key)
        lora_B = tensors.get(key.replace("lora_A", "lora_B"))
        if not key.endswith("lora_A.weight") or name not in layouts or lora_B is None:
            continue
        rank = lora_A.shape[0]
        alphas = settings.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key(alphas, name), settings.get("lora_alpha", rank))
        scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        for part_name, part in layouts[name].named_parts(name).items():
            norms[part_name] = update_norms(lora_A, lora_B, scaling, part)
    return norms


def check_deactivated_updates(weights: Path, norms: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if a head that its mask deactivates has an update.

    Args:
        weights: The adapter's file of weights, for the message.
        norms: `{projection: (num_heads,)}` of the update, where they are known.
        masks: `{projection: bool (num_heads,)}`, True = active.
    """
    for name, mask in masks.items():
        if name in norms and norms[name][~mask].count_nonzero():
            heads = (~mask & (norms[name] != 0)).nonzero().flatten().tolist()
            raise contradiction(weights, f"the mask of {name} deactivates heads {heads}, whose update is not zero")


def check_deactivated_rows(
    weights: Path,
    tensors: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
    layouts: dict[str, ProjectionLayout],
    head_rows: tuple[str, ...],
) -> None:
    """Raise ValueError if an adapter's file has values in the rows of heads that its masks deactivate.

    Args:
        weights: The file, for the message.
        tensors: Its tensors.
        masks: `{projection: bool (num_heads,)}`.
        layouts: `{module, by its name in the file: its heads}`.
        head_rows: Names of the parameters whose rows belong to heads.
    """
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        layout = layouts.get(module_of(key))
        if layout is None or part not in head_rows:
            continue
        for name, heads in layout.named_parts(module_of(key)).items():
            if name not in masks:
                continue
            off = heads.rows(tensor)[heads.expand(~masks[name])]
            if off.count_nonzero():
                indices = (~masks[name]).nonzero().flatten().tolist()
                raise contradiction(
                    weights, f"the mask of {name} deactivates heads {indices}, whose rows of {part} are not zero"
                )
