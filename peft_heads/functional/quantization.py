"""k-bit weights: every entry of a matrix becomes its nearest code in a fixed code book (Bi-LoRA).

A weight matrix `W` with mean `μ` and unbiased standard deviation `σ` over its entries acts as

    Ŵ = c[k]·σ + μ,    k = argmin_j |w − c_j|,    w = (W − μ)/(σ + 1e-5)

where the codes `c` are the L1-optimal quantiser of a standard normal. The gradient passes the rounding unchanged
(straight-through) and flows through `μ` and `σ` as well: with `G = ∂L/∂Ŵ`, `n` entries and `a = σ/(σ + 1e-5)`,

    ∂L/∂W = a·G + (1 − a)·mean(G) + (W − μ)/((n − 1)·σ) · Σ G·(ŵ − a·w),    ŵ = c[k]

Rows may be left out: they do not enter `μ` and `σ`, become zeros and get no gradient, whatever they hold. All functions
take one matrix (rows, columns) or a stack of them (…, rows, columns), each with statistics of its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


BITS = (1, 2, 4, 8)
EPSILON = 1e-5
ROUNDS = 500
LATENT_ROUNDS = 30
_CODE_BOOKS: dict[int, torch.Tensor] = {}


class Decision(NamedTuple):
    """How a matrix is quantised, and what its gradient needs. It depends on the matrix alone.

    Attributes:
        values: (…, rows, columns), the quantised weight `Ŵ`, float32 (float64 of a float64 matrix).
        codes: uint8 (…, rows, columns), indices into the code book; 0 in rows that are left out.
        mean, std: (…, 1, 1), `μ` and `σ`.
        slope: (…, 1, 1), `a`.
        share: (…, rows or 1, 1), `(1 − a)/n`; 0 in rows that are left out.
        residual: (…, rows, columns), `ŵ − a·w`; 0 in rows that are left out.
        direction: (…, rows, columns), `∂σ/∂W`.
        rows: bool (…, rows, 1), False where a row is left out; None if none is.
    """

    values: torch.Tensor
    codes: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    slope: torch.Tensor
    share: torch.Tensor
    residual: torch.Tensor
    direction: torch.Tensor
    rows: torch.Tensor | None

    def matrix(self, index: int) -> Decision:
        """One matrix of a stack."""
        return Decision(*(None if tensor is None else tensor[index] for tensor in self))


def code_book(bits: int) -> torch.Tensor:
    """The `2**bits` codes, ascending, float64 on the CPU. Do not write to them: they are computed once per bit width.

    Each code is the median of the normal mass between its two boundaries, and each boundary is midway between two
    codes. The two rules are applied in turn, 500 times from all zeros, as the method's authors do.

    Raises:
        ValueError: `bits` is none of 1, 2, 4, 8.

    Example:
        >>> code_book(1)
        tensor([-0.6745,  0.6745], dtype=torch.float64)
    """
    if bits not in _CODE_BOOKS:
        if bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; got {bits!r}")
        codes = torch.zeros(2**bits, dtype=torch.float64, device="cpu")  # the default device may be another just now
        zero, one = codes.new_zeros(1), codes.new_ones(1)
        for _ in range(ROUNDS):
            mass = torch.cat([zero, torch.special.ndtr(_midpoints(codes)), one])
            codes = torch.special.ndtri((mass[:-1] + mass[1:]) / 2)
        _CODE_BOOKS[bits] = codes
    return _CODE_BOOKS[bits]


def quantize(weight: torch.Tensor, bits: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The quantised weight, with the straight-through gradient.

    Args:
        weight: (…, rows, columns).
        bits: 1, 2, 4 or 8.
        rows: bool (…, rows), False where a row is left out.

    Returns:
        A tensor of the weight's shape and dtype.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [4.0, 5.0]])
        >>> quantize(weight, bits=1)  # one value above the mean of 3, and one below it
        tensor([[1.7686, 1.7686],
                [4.2314, 4.2314]])
    """
    return straight_through(weight, decide(weight, bits, rows))


@torch.no_grad()
def decide(weight: torch.Tensor, bits: int, rows: torch.Tensor | None = None) -> Decision:
    """Quantise without a gradient. Arguments as for `quantize`."""
    kept = None if rows is None else rows.unsqueeze(-1)
    mean, std, count = _moments(weight, kept)
    centred = weight.to(mean.dtype) - mean
    standard = centred / (std + EPSILON)
    codes = torch.bucketize(standard, _midpoints(code_book(bits)).to(standard))
    slope = std / (std + EPSILON)
    # Where σ is 0, every centred entry is 0 as well.
    direction = centred / ((count - 1).clamp(min=1) * std).clamp(min=torch.finfo(std.dtype).tiny)
    coded = code_book(bits).to(standard)[codes]
    values, residual, share = coded * std + mean, coded - slope * standard, (1 - slope) / count.clamp(min=1)
    if kept is not None:
        codes, values, residual, direction, share = (
            torch.where(kept, tensor, 0) for tensor in (codes, values, residual, direction, share)
        )
    return Decision(values, codes.to(torch.uint8), mean, std, slope, share, residual, direction, kept)


def straight_through(weight: torch.Tensor, decision: Decision) -> torch.Tensor:
    """`decision.values` in the weight's dtype, with the gradient by the module's formula.

    The decision must have been made for the weight as it is now; it can serve any number of passes.
    """
    return _StraightThrough.apply(weight, decision)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, decision: Decision) -> torch.Tensor:
        ctx.dtype = weight.dtype
        ctx.decision = decision  # neither an input nor an output, so that save_for_backward is not needed
        return decision.values.to(weight.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        _, _, _, _, slope, share, residual, direction, rows = ctx.decision
        grad = grad.to(residual.dtype)
        if rows is not None:
            grad = torch.where(rows, grad, 0)
        along_std = (grad * residual).sum((-2, -1), keepdim=True)
        along_mean = grad.sum((-2, -1), keepdim=True)
        return (grad * slope + share * along_mean).addcmul_(direction, along_std).to(ctx.dtype), None


def quantize_by_autograd(weight: torch.Tensor, bits: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """`quantize` as one plain expression, which a compiler can trace: autograd finds the gradient by itself.

    Values and gradient are those of `quantize` up to rounding.
    """
    kept = None if rows is None else rows.unsqueeze(-1)
    mean, std, _ = _moments(weight, kept)
    standard = (weight.to(mean.dtype) - mean) / (std + EPSILON)
    nearest = torch.bucketize(standard.detach(), _midpoints(code_book(bits)).to(standard))
    coded = code_book(bits).to(standard)[nearest] + (standard - standard.detach())
    values = coded * std + mean
    return (values if kept is None else torch.where(kept, values, 0)).to(weight.dtype)


def dequantize(
    codes: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, bits: int, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight that codes stand for, in the dtype of `mean`, bit for bit what `quantize` returns.

    Args:
        codes: uint8 (…, rows, columns).
        mean, std: (…, 1, 1).
        bits: 1, 2, 4 or 8.
        rows: bool (…, rows), False where a row is left out and becomes zero.
    """
    values = code_book(bits).to(mean)[codes.int()] * std + mean
    return values if rows is None else torch.where(rows.unsqueeze(-1), values, 0)


def latents(
    codes: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, bits: int, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Full-precision weights from which training can go on: `μ + σ·(z − mean z)/std z` with `z` the codes' values.

    They have the given mean and standard deviation, and are quantised to the same codes. The dequantised values are
    not: quantising twice would change the adapter. Where the formula would carry an entry over the boundary of its
    code (narrow codes: 8 bits), the entry stays within and the others make up for it. Arguments as for `dequantize`.

    Within 1e-7·σ of the mean, 8 bits have dozens of codes that are closer to each other than float32 can tell. There
    the codes may differ, but their values agree to 1e-7·σ.
    """
    kept = None if rows is None else rows.unsqueeze(-1)
    wide = mean.double()
    book = code_book(bits).to(wide)
    edges = torch.cat([book.new_tensor([-math.inf]), _midpoints(book), book.new_tensor([math.inf])])
    z, indices = book[codes.int()], codes.int()
    mean_z, std_z, _ = _moments(z, kept)
    plain = wide + std.double() * (z - mean_z) / std_z.clamp(min=torch.finfo(std_z.dtype).tiny)
    plain = plain.to(mean.dtype) if kept is None else torch.where(kept, plain.to(mean.dtype), 0)
    if torch.equal(decide(plain, bits, rows).codes, codes):
        return plain
    low, high = z + 0.9 * (edges[indices] - z), z + 0.9 * (edges[indices + 1] - z)
    standard, scale = z, std.double() + EPSILON
    for _ in range(LATENT_ROUNDS):
        mean_z, std_z, _ = _moments(standard, kept)
        standard = (standard - mean_z) / std_z.clamp(min=torch.finfo(std_z.dtype).tiny) * (std.double() / scale)
        standard = standard.clamp(low, high)
    result = (wide + scale * standard).to(mean.dtype)
    return result if kept is None else torch.where(kept, result, 0)


def _midpoints(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:-1] + codes[1:]) / 2


def _moments(weight: torch.Tensor, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, unbiased standard deviation and number of entries (…, 1, 1) of each matrix, without rows that are left out.

    The sums are in float64, so that neither the order of summation nor the device changes a bit of the float32 result:
    a matrix has the same in a stack as alone, and on every process.
    """
    # Apple's GPUs have no float64.
    wide = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    rows, columns = weight.shape[-2:]
    if kept is None:
        count = wide.new_full((1, 1), rows * columns)
    else:
        count = kept.sum((-2, -1), keepdim=True).to(wide) * columns
        wide = torch.where(kept, wide, 0)
    mean = wide.sum((-2, -1), keepdim=True) / count.clamp(min=1)
    centred = wide - mean if kept is None else torch.where(kept, wide - mean, 0)
    variance = centred.square().sum((-2, -1), keepdim=True) / (count - 1).clamp(min=1)
    # The root of zero has no finite derivative.
    spread = variance > 0
    std = torch.where(spread, torch.where(spread, variance, 1).sqrt(), 0)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return mean.to(dtype), std.to(dtype), count.to(dtype)
