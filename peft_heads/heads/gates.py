"""Gates: how much the loss of an image would change, to first order, if a head or a neuron returned nothing.

Multiply the output of a unit (an attention head, or a neuron of an MLP) by a gate of 1. The derivative of an image's loss
with respect to that gate is `g = Σ activation · gradient`, over the image's tokens and the unit's channels; without the
unit the loss changes by about `-g` (Michel et al. 2019, Eq. 2; Molchanov et al. 2017). A step's loss is a mean over images,
so each image has a gate of its own: sums over images do not depend on how a batch was split.
"""

from __future__ import annotations

from typing import Any

import torch

from .._compat.torch import device_with_float64


GATE_STATISTICS = ("gate", "gate_signed", "gate_squared")


def gate_statistics(gradients: torch.Tensor) -> torch.Tensor:
    """The statistics of some images, as sums over them.

    Args:
        gradients: (images, units), the derivatives `g` of each image's loss with respect to the gates.

    Returns:
        float64 (3, units) in the order of `GATE_STATISTICS`: `Σ |g|`, `Σ g` and `Σ g²`; on the device of the gradients,
        or on the CPU where that has no float64.

    Example, two images and one unit:
        >>> gate_statistics(torch.tensor([[1.0], [-3.0]])).flatten().tolist()
        [4.0, -2.0, 10.0]
    """
    gradients = gradients.to(device_with_float64(gradients.device), torch.float64)
    return torch.stack([gradients.abs().sum(0), gradients.sum(0), gradients.square().sum(0)])


def new_gates(activation: torch.Tensor, num_images: int, num_units: int) -> torch.Tensor:
    """Gates of 1, (images, units), that require gradients; float32, or what is wider and the activation has."""
    dtype = torch.promote_types(activation.dtype, torch.float32)
    return torch.ones(num_images, num_units, dtype=dtype, device=activation.device, requires_grad=True)


def gated(activation: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """An activation times its gates, which are 1: the same numbers, and in a backward pass the gates' derivatives.

    Args:
        activation: (rows, …, channels): the rows of an image, one or several windows, lie side by side, and so do the
            channels of a unit.
        gates: (images, units) from `new_gates`.

    Example, one image of two tokens and two units of one channel:
        >>> activation, gates = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.ones(1, 2, requires_grad=True)
        >>> gated(activation, gates).sum().backward()
        >>> gates.grad.tolist()
        [[4.0, 6.0]]
    """
    return _Gated.apply(activation, gates)


class _Gated(torch.autograd.Function):
    """Not a product, which would keep a copy of the activation in float32 until the backward pass."""

    @staticmethod
    def forward(ctx: Any, activation: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(activation)
        ctx.gates = gates.shape, gates.dtype
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (activation,) = ctx.saved_tensors
        (num_images, num_units), dtype = ctx.gates
        product = activation.to(dtype) * gradient.to(dtype)
        product = product.reshape(num_images, -1, num_units, activation.shape[-1] // num_units)
        return gradient, product.sum(dim=(1, 3))
