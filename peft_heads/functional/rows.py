"""Rows of a tensor: values per row, and rows that are replaced by zero."""

from __future__ import annotations

import torch


def per_row(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """One value per row, (rows,), in the shape that broadcasts against `tensor`, (rows, …).

    Example:
        >>> per_row(torch.tensor([1, 2]), torch.zeros(2, 3)).shape
        torch.Size([2, 1])
    """
    return values.view(-1, *[1] * (tensor.dim() - 1))


def without_rows(tensor: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """A tensor, (rows, …), with zeros in the rows that `off`, bool (rows,), names.

    `torch.where` rather than a product: a row that has become inf or nan is zero as well, and the gradient of a
    replaced row is exactly zero. The other rows come back unchanged, bit for bit.

    Example:
        >>> without_rows(torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]), torch.tensor([False, True])).tolist()
        [[1.0, 2.0], [0.0, 0.0]]
    """
    return torch.where(per_row(off, tensor), 0, tensor)
