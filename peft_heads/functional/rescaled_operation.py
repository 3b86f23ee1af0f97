"""A linear layer or a convolution that acts by a rescaled frozen weight, and its gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .._compat.torch import transforms_are_active
from .rescaling import Rescaling, delta, factor_gradients, rescale


def kernel_to_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """The kernels of a convolution, (out, in, k, k), side by side as a matrix (out·k, in·k).

    Example:
        >>> kernel_to_matrix(torch.arange(8.0).view(1, 2, 2, 2)).tolist()
        [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    out, into, height, width = kernel.shape
    return kernel.permute(0, 2, 1, 3).reshape(out * height, into * width)


def matrix_to_kernel(matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `kernel_to_matrix`: (out·k, in·k) to `shape`, (out, in, k, k)."""
    out, into, height, width = shape
    return matrix.view(out, height, into, width).permute(0, 2, 1, 3)


class LinearOperation:
    """`F.linear`, its gradients, and its weight as a matrix, for `rescaled_operation`."""

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """The input as the operation itself takes it."""
        return x

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def weight(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return matrix

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, grad: torch.Tensor, x_shape: torch.Size, weight: torch.Tensor) -> torch.Tensor:
        return grad @ weight

    def weight_gradient(self, grad: torch.Tensor, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def bias_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(dim=0)


def _padding_of_each_side(layer: nn.Conv2d) -> list[int]:
    """What `F.pad` adds before and behind each dimension, the last one first."""
    sides = []
    for i in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[i] * (layer.kernel_size[i] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += 2 * [0 if layer.padding == "valid" else layer.padding[i]]
    return sides


class ConvolutionOperation:
    """The same for a two-dimensional convolution, whose kernels are laid out as a matrix.

    Args:
        layer: The frozen layer, which says stride, padding, dilation and groups.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self.settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        self.padding: dict[str, Any] | None = None
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):  # as a step of its own
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            self.padding = {"pad": _padding_of_each_side(layer), "mode": mode}
            self.settings["padding"] = 0

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.padding is None else F.pad(x, **self.padding)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return kernel_to_matrix(weight)

    def weight(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return matrix_to_kernel(matrix, shape)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(x, weight, bias, **self.settings)

    def input_gradient(self, grad: torch.Tensor, x_shape: torch.Size, weight: torch.Tensor) -> torch.Tensor:
        return nn.grad.conv2d_input(x_shape, weight, grad, **self.settings)

    def weight_gradient(self, grad: torch.Tensor, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return nn.grad.conv2d_weight(x, shape, grad, **self.settings)

    def bias_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return grad.sum(dim=(0, 2, 3))


class Change(NamedTuple):
    """The change that one adapter makes to a weight.

    Attributes:
        left: `S_out` (out, r), for a convolution (out·k, r); or None.
        right: `S_in` (r, in), for a convolution (r, in·k); or None.
        variant: The variant.
    """

    left: torch.Tensor | None
    right: torch.Tensor | None
    variant: Rescaling = Rescaling()


def rescaled_operation(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    changes: list[Change],
    shift: torch.Tensor | None,
    operation: LinearOperation | ConvolutionOperation,
) -> torch.Tensor:
    """`operation(x, W', b + f)` with a frozen weight; `W'` is not kept for the backward pass.

    It is computed again there, and its gradient lives only until the factors' gradients are formed from it. The dense
    product is used rather than two products with `W`, since it needs three matrix products per step (forward, input
    gradient, weight gradient) instead of four.

    Args:
        x: (…, in), or (batch, in, height, width).
        weight: The frozen weight, (out, in) or (out, in, k, k).
        bias: The frozen bias (out,), or None.
        changes: Changes of the active adapters, at least one; they add up.
        shift: `f` (out,), or None.
        operation: The operation.
    """
    # The operation runs in autocast's dtype, or without autocast in the weight's. W' is formed in the wider of the
    # weight's and the factors' dtypes.
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # not on the meta device
    autocast = has_autocast and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        x, factors = operation.prepare(x).to(dtype), [factor for change in changes for factor in change[:2]]
        variants = [change.variant for change in changes]
        # Plain operations where the function below is not needed or cannot be used: without gradients (they can be
        # exported), in a trace (which cannot hold a Python function), and under torch.func (which does not know it).
        plain = not torch.is_grad_enabled() or torch.jit.is_tracing() or transforms_are_active()
        if plain:
            return _apply(x, weight, bias, shift, operation, variants, factors)
        return _Rescaled.apply(x, weight, bias, shift, operation, variants, *factors)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, shift, operation: Any, variants: list[Rescaling], *factors) -> torch.Tensor:
        needs_x = any(factor is not None and factor.requires_grad for factor in factors)
        ctx.save_for_backward(x if needs_x else None, weight, *factors)
        ctx.operation, ctx.variants, ctx.x_shape = operation, variants, x.shape
        ctx.shift_dtype = None if shift is None else shift.dtype
        return _apply(x, weight, bias, shift, operation, variants, factors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight, *factors = ctx.saved_tensors
        operation, variants = ctx.operation, ctx.variants
        needs_x, _, _, needs_shift, _, _, *needs_factors = ctx.needs_input_grad
        of_x = of_shift = None
        of_factors = [None] * len(factors)
        with torch.autocast(grad.device.type, enabled=False):
            if needs_x:
                acting = _acting_weight(grad.dtype, weight, operation, variants, factors)
                of_x = operation.input_gradient(grad, ctx.x_shape, acting)
                del acting
            if any(needs_factors):
                dense = operation.matrix(operation.weight_gradient(grad, x, weight.shape))
                for i, change in enumerate(_changes(variants, factors)):
                    is_last = i == len(variants) - 1
                    memory = dense if is_last else dense.clone()
                    of_factors[2 * i : 2 * i + 2] = factor_gradients(memory, operation.matrix(weight), *change)
                del dense, memory
            if needs_shift:
                of_shift = operation.bias_gradient(grad).to(ctx.shift_dtype)
        return of_x, None, None, of_shift, None, None, *of_factors


def _apply(x, weight, bias, shift, operation: Any, variants: list[Rescaling], factors) -> torch.Tensor:
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return operation(x, _acting_weight(x.dtype, weight, operation, variants, factors), _cast(bias, x.dtype))


def _acting_weight(dtype: torch.dtype, weight, operation: Any, variants: list[Rescaling], factors) -> torch.Tensor:
    matrix, (first, *rest) = operation.matrix(weight), _changes(variants, factors)
    acting = rescale(matrix, *first)
    for change in rest:
        acting = acting + delta(matrix, *change)
    return operation.weight(acting.to(dtype), weight.shape)


def _changes(variants: list[Rescaling], factors) -> list[Change]:
    return [Change(*pair) for pair in zip(factors[::2], factors[1::2], variants, strict=True)]


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)
