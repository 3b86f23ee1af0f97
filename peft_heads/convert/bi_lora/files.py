"""The files of Bi-LoRA's authors: k-bit LoRA on q and v of a ViT-B/16, and its classifier.

`NAME-bitB-dimR.bin` holds, little-endian and without a header, for blocks 0 to 11 in turn

    lora_q down (R, 768), lora_q up (768, R), lora_v down (R, 768), lora_v up (768, R)

each as its codes, row by row, `8/B` per byte, least significant bits first, then `μ` and `σ` (float32). After them the
classifier: of method "lora" its weight (C, 768) and bias (C,) in float32, of method "lora-bihead" one more such matrix
(C, 768), of 1 bit whatever B is, and no bias. `NAME-bitB-dimR.yaml` beside it says what R, B and C are, and the scale
`s` of the update `s · up · down`.
"""

from __future__ import annotations

import io
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ...functional.packing import PackedWeight, pack, unpack
from .settings import MATRICES, MOMENTS, NUM_BLOCKS, WIDTH, Settings, existing, read_settings


# What is read is held in memory: a sparse file, which takes no space on the disk, can have any size.
MAX_CLASSES = 2**16


class Weights(NamedTuple):
    """What the `.bin` holds.

    Attributes:
        factors: Down (R, 768) and up (768, R), of q of block 0, v of block 0, q of block 1, …
        classifier: Its weight, (C, 768), float32 or packed.
        bias: float32 (C,); None where the classifier is packed.
    """

    factors: list[tuple[PackedWeight, PackedWeight]]
    classifier: PackedWeight | torch.Tensor
    bias: torch.Tensor | None

    @property
    def num_class(self) -> int:
        return len(self.classifier.codes if self.bias is None else self.classifier)


def read(file: str | os.PathLike) -> tuple[Settings, Weights]:
    """Read a `.bin`, and the `.yaml` beside it.

    Raises:
        FileNotFoundError: One of the two is missing.
        ValueError: One of the two is not of this form, or the name contradicts them. Sizes are checked before anything
            is read.
    """
    file = Path(file)
    settings_file = settings_beside(file)
    settings = read_settings(settings_file)
    with open(existing(file), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != settings.num_bytes:
            raise ValueError(
                f"{file} has {size:,} bytes, but method {settings.method}, bit {settings.bit}, dim {settings.dim} and "
                f"num_class {settings.num_class} of {settings_file.name} make {settings.num_bytes:,}: the file is "
                f"{'cut short' if size < settings.num_bytes else 'too long'}, or the two do not belong together"
            )
        dataset_in_name(file, settings.bit, settings.dim)
        if settings.dim > WIDTH or settings.num_class > MAX_CLASSES:
            raise ValueError(
                f"{file} has rank {settings.dim:,} and {settings.num_class:,} classes (expected {WIDTH} and "
                f"{MAX_CLASSES:,} at most): no file of Bi-LoRA has, and it would be held in memory"
            )
        data = stream.read()
    try:
        return settings, decode(data, settings)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def decode(data: bytes, settings: Settings) -> Weights:
    """The weights in the bytes of a `.bin`.

    Raises:
        ValueError: There are too few or too many bytes, or a number in them is not finite.
    """
    if len(data) != settings.num_bytes:
        raise ValueError(f"expected {settings.num_bytes:,} bytes, got {len(data):,}")
    stream, factors = io.BytesIO(data), []
    for block in range(NUM_BLOCKS):
        matrices = [
            _decode_matrix(stream, shape, settings.bit, f"{name} of block {block}")
            for name, shape in zip(MATRICES, 2 * [(settings.dim, WIDTH), (WIDTH, settings.dim)], strict=True)
        ]
        factors += [(matrices[0], matrices[1]), (matrices[2], matrices[3])]
    shape = (settings.num_class, WIDTH)
    if settings.has_quantized_classifier:
        return Weights(factors, _decode_matrix(stream, shape, 1, "the head"), None)
    numbers = torch.from_numpy(np.frombuffer(stream.read(), "<f4").astype(np.float32))
    if not numbers.isfinite().all():
        raise ValueError("the head has entries that are not finite")
    return Weights(factors, numbers[: math.prod(shape)].view(shape), numbers[math.prod(shape) :])


def encode(weights: Weights) -> bytes:
    """The bytes of a `.bin`: what `decode` reads."""
    matrices = [matrix for pair in weights.factors for matrix in pair]
    if weights.bias is None:
        return b"".join(map(_encode_matrix, [*matrices, weights.classifier]))
    numbers = torch.cat([weights.classifier.flatten(), weights.bias])
    return b"".join(map(_encode_matrix, matrices)) + numbers.numpy().astype("<f4").tobytes()


def settings_beside(file: Path) -> Path:
    """The `.yaml` that belongs to a `.bin`.

    Raises:
        ValueError: The file's name does not end in `.bin`.
    """
    if file.suffix != ".bin":
        raise ValueError(f"{file}: Bi-LoRA's files are called NAME-bitB-dimR.bin, with NAME-bitB-dimR.yaml beside")
    return file.with_suffix(".yaml")


def dataset_in_name(file: Path, bit: int, dim: int) -> str:
    """The dataset that a `.bin` is named after.

    Args:
        file: The `.bin`.
        bit: Bits of the adapter that it holds, or is to hold.
        dim: Rank of that adapter.

    Raises:
        ValueError: The name has other bits or another rank, by which the authors' programs find the file.

    Example:
        >>> dataset_in_name(Path("kitti-bit1-dim32.bin"), bit=1, dim=32)
        'kitti'
    """
    dataset, _, rest = file.stem.partition("-bit")
    said = re.fullmatch(r"(\d+)-dim(\d+)", rest)
    if said and (int(said[1]), int(said[2])) != (bit, dim):
        raise ValueError(
            f"{file}: the name says bit {said[1]} and dim {said[2]}, but the adapter has {bit} bits and rank {dim}; "
            f"call it {dataset}-bit{bit}-dim{dim}.bin"
        )
    return dataset


def _decode_matrix(stream: io.BytesIO, shape: tuple[int, int], bits: int, name: str) -> PackedWeight:
    packed = torch.frombuffer(bytearray(stream.read(math.prod(shape) * bits // 8)), dtype=torch.uint8)
    mean, std = MOMENTS.unpack(stream.read(MOMENTS.size))
    if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
        raise ValueError(f"{name} has mean {mean} and deviation {std}")
    return PackedWeight.from_codes(bits, unpack(packed, bits, shape), torch.tensor([[mean]]), torch.tensor([[std]]))


def _encode_matrix(matrix: PackedWeight) -> bytes:
    moments = MOMENTS.pack(matrix.mean.item(), matrix.std.item())
    return pack(matrix.codes, matrix.bits).numpy().tobytes() + moments
