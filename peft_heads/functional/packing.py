"""k-bit matrices as bytes: the codes, `μ` and `σ` of a module in one uint8 tensor.

A tensor holds, little-endian,

    version (1 byte), bits (1), num_heads (2), the head mask (1 bit per head, filled up to whole bytes), then per matrix
    rows (4 bytes), columns (4), mean (float32), std (float32), codes of the rows that are there

with codes and mask bits from the least significant bit on. Rows of deactivated heads have no codes. All matrices but the
last have all their rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .quantization import BITS, Decision, dequantize, latents


VERSION = 1
_MODULE, _MATRIX = struct.Struct("<BBH"), struct.Struct("<IIff")


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into bytes, `8/bits` codes per byte, least significant bits first; zeros fill the last byte.

    Args:
        codes: uint8, of any shape, each below `2**bits`.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 (number of bytes,).

    Example:
        >>> pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.uint8), bits=1).tolist()
        [129, 1]
    """
    per_byte = 8 // bits
    flat = codes.flatten()
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % per_byte)]).unflatten(0, (-1, per_byte))
    shifts = torch.arange(0, 8, bits, device=codes.device)
    return (flat.int() << shifts).sum(dim=1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 (number of bytes,).
        bits: 1, 2, 4 or 8.
        shape: Shape of the codes.

    Returns:
        uint8, of that shape.

    Raises:
        ValueError: The number of bytes does not fit.

    Example:
        >>> unpack(torch.tensor([129, 1], dtype=torch.uint8), bits=1, shape=(3, 3)).tolist()
        [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    """
    numel = math.prod(shape)
    expected = -(-numel * bits // 8)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise ValueError(
            f"{numel} codes of {bits} bits, shape {tuple(shape)}, are {expected} bytes (uint8); got "
            f"{packed.numel()} of {packed.dtype}"
        )
    shifts = torch.arange(0, 8, bits, device=packed.device)
    codes = (packed.int().view(-1, 1) >> shifts) & (2**bits - 1)
    return codes.flatten()[:numel].view(shape).to(torch.uint8)


class PackedWeight(NamedTuple):
    """A k-bit matrix as it is stored, with the full-precision weight from which training can go on.

    Attributes:
        bits: 1, 2, 4 or 8.
        codes: uint8 (rows, columns), 0 in rows that are left out.
        mean, std: float32 (1, 1), `μ` and `σ`.
        rows: bool (rows,), False where a row is left out; None if none is.
        latents: float32 (rows, columns), the full-precision weight; it is quantised to these codes.
    """

    bits: int
    codes: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    rows: torch.Tensor | None
    latents: torch.Tensor

    @classmethod
    def from_codes(
        cls, bits: int, codes: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, rows: torch.Tensor | None = None
    ) -> PackedWeight:
        """Complete stored codes; `mean` and `std` are rounded to float32, as they are stored."""
        mean, std = mean.float(), std.float()
        return cls(bits, codes, mean, std, rows, latents(codes, mean, std, bits, rows))

    @classmethod
    def from_decision(cls, decision: Decision, bits: int) -> PackedWeight:
        rows = None if decision.rows is None else decision.rows.squeeze(-1)
        # Copies: a view would keep the whole stack alive that was decided together.
        parts = [None if x is None else x.clone() for x in (decision.codes, decision.mean, decision.std, rows)]
        return cls.from_codes(bits, *parts)

    def to(self, device: torch.device) -> PackedWeight:
        return PackedWeight(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in self))

    def values(self) -> torch.Tensor:
        """The weight that the codes stand for, float32 (rows, columns)."""
        return dequantize(self.codes, self.mean, self.std, self.bits, self.rows)

    def is_behind(self, weight: torch.Tensor, rows: torch.Tensor | None) -> bool:
        """Whether `weight` is still what these codes were unpacked to, with the same rows left out."""
        same_rows = rows is None if self.rows is None else rows is not None and torch.equal(rows, self.rows.to(rows))
        if not same_rows or self.codes.shape != weight.shape:
            return False
        # The latter two: the weight may have been cast to 16 bits and back.
        casts = (weight.dtype, torch.bfloat16, torch.float16)
        return any(torch.equal(weight, self.latents.to(weight.device, dtype).to(weight)) for dtype in casts)


def pack_module(matrices: Sequence[PackedWeight], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pack the matrices of a module, and its head mask, into bytes.

    Args:
        matrices: One or two of the same bits; only the last may leave rows out.
        mask: bool (num_heads,), True = active; None where there is none.

    Returns:
        uint8 (number of bytes,).
    """
    bits = matrices[0].bits
    heads = torch.zeros(0, dtype=torch.uint8) if mask is None else mask.cpu().to(torch.uint8)
    parts = [_bytes(_MODULE.pack(VERSION, bits, len(heads))), pack(heads, 1)]
    for matrix in matrices:
        header = _MATRIX.pack(*matrix.codes.shape, matrix.mean.item(), matrix.std.item())
        codes = matrix.codes if matrix.rows is None else matrix.codes[matrix.rows]
        parts += [_bytes(header), pack(codes.cpu(), bits)]
    return torch.cat(parts)


def unpack_module(
    data: torch.Tensor,
    num_matrices: int,
    find_rows: Callable[[tuple[int, int], torch.Tensor], torch.Tensor | None] = lambda shape, mask: None,
) -> tuple[list[PackedWeight], torch.Tensor | None]:
    """The inverse of `pack_module`.

    Args:
        data: uint8 (number of bytes,).
        num_matrices: Number of matrices that are expected.
        find_rows: Called where there is a mask, with the last matrix's shape and the mask. Returns bool (rows,), True
            for rows that are there, or None for all of them.

    Returns:
        The matrices, and the mask (None where there is none).

    Raises:
        ValueError: The bytes are not of this form. Each size is checked before anything of that size is made.
    """
    reader, bits, mask = _read_header(data)
    matrices = []
    for index in range(num_matrices):
        *shape, mean, std = reader.struct(_MATRIX)
        shape = tuple(shape)
        rows = find_rows(shape, mask) if mask is not None and index == num_matrices - 1 else None
        kept = shape[0] if rows is None else int(rows.sum())
        part = unpack(reader.take(-(-kept * shape[1] * bits // 8)), bits, (kept, shape[1]))
        codes = part
        if rows is not None:
            codes = part.new_zeros(shape)
            codes[rows] = part
        mean, std = torch.tensor([[mean]]), torch.tensor([[std]])
        if not (mean.isfinite() and std.isfinite() and std >= 0):
            raise ValueError(f"a packed matrix of shape {shape} has mean {mean.item()} and deviation {std.item()}")
        matrices.append(PackedWeight.from_codes(bits, codes, mean, std, rows))
    if reader.left:
        raise ValueError(f"{reader.left} bytes more than {num_matrices} matrices take; the last is {shape}")
    return matrices, mask


def read_mask(data: torch.Tensor) -> torch.Tensor | None:
    """The head mask of a packed module, bool (num_heads,), True = active; None where it has none.

    Raises:
        ValueError: The bytes are not of this form.
    """
    _, _, mask = _read_header(data)
    return mask


def _read_header(data: torch.Tensor) -> tuple[_Reader, int, torch.Tensor | None]:
    """Read what precedes the matrices: the reader behind it, the bits, and the head mask."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"a packed module is a flat uint8 tensor; got {data.dtype} of shape {tuple(data.shape)}")
    reader = _Reader(data.cpu())
    version, bits, num_heads = reader.struct(_MODULE)
    if version != VERSION or bits not in BITS:
        raise ValueError(
            f"packed with format {version} and {bits} bits; this peft_heads reads format {VERSION} and bits "
            f"{', '.join(map(str, BITS))}"
        )
    mask = unpack(reader.take(-(-num_heads // 8)), 1, (num_heads,)).bool() if num_heads else None
    return reader, bits, mask


class _Reader:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> torch.Tensor:
        if size > self.left:
            raise ValueError(f"{size} bytes were to follow at byte {self.at}, but only {self.left} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def struct(self, form: struct.Struct) -> tuple:
        return form.unpack(bytes(self.take(form.size).tolist()))


def _bytes(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)
