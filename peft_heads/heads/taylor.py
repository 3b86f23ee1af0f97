"""Taylor scores of heads: how much the loss would change, to first order, if a head's adapter parameters were zero.

`head_statistics` is computed at each optimizer step. The mean over a window of steps is what `scores.head_scores` turns
into one score per head. So one pass over the data serves every criterion.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .._compat.torch import device_with_float64
from .layout import HeadLayout


STATISTICS = ("absolute", "signed", "grad_norm")


def head_statistics(params: torch.Tensor, grads: torch.Tensor, layout: HeadLayout) -> torch.Tensor:
    """The statistics of one optimizer step.

    Args:
        params: The head-wise adapter parameters (num_rows, n) of a projection *before* the step.
        grads: Their gradient (num_rows, n) for the loss of the global batch, neither clipped nor scaled.
        layout: Heads of the projection.

    Returns:
        float64 (3, num_heads) in the order of `STATISTICS`.

    Example, one head of one row:
        >>> layout = HeadLayout("query", num_heads=1, head_dim=1)
        >>> head_statistics(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, -4.0]]), layout).flatten().tolist()
        [10.0, 2.0, 5.0]
    """
    params, grads = params.double(), grads.double()
    product = params * grads
    return torch.stack(
        [layout.sum_rows(product.abs()), layout.sum_rows(product), layout.sum_rows(grads.square()).sqrt()]
    )


def all_head_statistics(
    params: dict[str, torch.Tensor],
    grads: dict[str, torch.Tensor],
    layouts: dict[str, HeadLayout],
    loss_scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """The statistics of one optimizer step of many projections: those of `head_statistics` in fewer calls.

    A head's statistics depend on its rows alone, so projections whose heads have equally many rows, and rows equally
    many parameters, are computed one below the other as one projection with all their heads. On the CPU the numbers
    are the same to the bit, unless a projection has a single head of 2**15 numbers or more, whose sum threads share; a
    GPU may add a head's numbers in another order if there are more heads.

    Args:
        params: `{projection: (num_rows, n)}`, as `head_statistics` takes them.
        grads: `{projection: (num_rows, n)}`, the gradients of the loss times `loss_scale`.
        layouts: `{projection: HeadLayout}`.
        loss_scale: Factor by which the gradients are too large.

    Returns:
        `{projection: float64 (3, num_heads)}` in the order of `layouts`, on the device of the gradients, or on the CPU
        where that has no float64.

    Example, two projections of one head:
        >>> layouts = dict.fromkeys("qv", HeadLayout("query", num_heads=1, head_dim=1))
        >>> params = {"q": torch.tensor([[2.0, 1.0]]), "v": torch.tensor([[0.0, 1.0]])}
        >>> grads = {"q": torch.tensor([[3.0, -4.0]]), "v": torch.tensor([[0.0, 2.0]])}
        >>> {name: step.flatten().tolist() for name, step in all_head_statistics(params, grads, layouts).items()}
        {'q': [10.0, 2.0, 5.0], 'v': [2.0, 2.0, 2.0]}
    """
    alike: dict[tuple, list[str]] = {}
    for name, layout in layouts.items():
        grad = grads[name]
        key = (layout.head_dim, grad.shape[1:], grad.dtype, grad.device, params[name].device)
        alike.setdefault(key, []).append(name)
    statistics = {}
    for names in alike.values():
        device = device_with_float64(grads[names[0]].device)
        num_heads = [layouts[name].num_heads for name in names]
        step = head_statistics(
            torch.cat([params[name] for name in names]).to(device),
            torch.cat([grads[name] for name in names]).to(device) / loss_scale,
            replace(layouts[names[0]], num_heads=sum(num_heads)),
        )
        statistics |= zip(names, step.split(num_heads, dim=1), strict=True)
    return {name: statistics[name] for name in layouts}
