"""Residual low-rank rescaling: the mathematics, on plain tensors.

A frozen matrix `W` (out, in) acts as

    W' = W + (S_out S_in) ⊙ W        S_out (out, r), S_in (r, in)

The constant 1 in `(1 + S_out S_in) ⊙ W` is the *residual*. Without it `W' = (S_out S_in) ⊙ W`; without the frozen
weight in the term `W' = W + S_out S_in`, which is LoRA. With one factor alone the other is a row or column of ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rescaling:
    """The variant of the method.

    Attributes:
        residual: Whether the frozen weight is added to the rescaled one.
        rescale_weight: Whether the product of the factors multiplies the frozen weight; otherwise it is added to it.
    """

    residual: bool = True
    rescale_weight: bool = True


def factor_product(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """`S_out S_in`, (out, in); with one factor alone (out, 1) or (1, in), which broadcasts.

    Args:
        left: `S_out` (out, r), or None.
        right: `S_in` (r, in), or None.
    """
    if right is None:
        return left.sum(dim=1, keepdim=True)
    if left is None:
        return right.sum(dim=0, keepdim=True)
    return left * right if left.shape[1] == 1 else left @ right


def rescale(
    weight: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, variant: Rescaling
) -> torch.Tensor:
    """The matrix `W'` by which a layer acts, (out, in), in the wider of the dtypes.

    With the residual, a row for which `S_out` is zero comes back unchanged, bit for bit.

    Example:
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> rescale(W, torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5, 10.0]]), Rescaling()).tolist()
        [[1.5, 22.0], [3.0, 4.0]]
    """
    product = factor_product(left, right)
    weight = weight.to(torch.promote_types(weight.dtype, product.dtype))
    if not variant.rescale_weight:
        return weight + product
    return torch.addcmul(weight, product, weight) if variant.residual else product * weight


def delta(
    weight: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, variant: Rescaling
) -> torch.Tensor:
    """`W' - W`, the change of the frozen matrix."""
    product = factor_product(left, right)
    weight = weight.to(torch.promote_types(weight.dtype, product.dtype))
    if not variant.rescale_weight:
        return product.expand_as(weight)
    return product * weight if variant.residual else product * weight - weight


def factor_gradients(
    grad: torch.Tensor,
    weight: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    variant: Rescaling,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the factors, computed from that of `W'`, which is overwritten.

    Args:
        grad: (out, in), the gradient with respect to `W'`; used as working memory.
        weight: `W`, (out, in).
        left: `S_out` (out, r), or None.
        right: `S_in` (r, in), or None.
        variant: The variant.

    Returns:
        (out, r) and (r, in), in the factors' dtypes; None for a factor that is None.
    """
    factor = left if left is not None else right
    wide = torch.promote_types(grad.dtype, factor.dtype)
    grad = grad.to(wide)
    if variant.rescale_weight:
        grad = grad.mul_(weight)  # with respect to S_out S_in
    if right is None:
        return grad.sum(dim=1, keepdim=True).to(left.dtype).expand_as(left), None
    if left is None:
        return None, grad.sum(dim=0, keepdim=True).to(right.dtype).expand_as(right)
    return (grad @ right.to(wide).T).to(left.dtype), (left.to(wide).T @ grad).to(right.dtype)
