"""The files of Bi-LoRA's authors: k-bit LoRA on q and v of a ViT-B/16, and its classification head.

`NAME-bitB-dimR.bin` holds, little-endian and without a header, for blocks 0 to 11 in turn

    lora_q down (R, 768), lora_q up (768, R), lora_v down (R, 768), lora_v up (768, R)

each as its codes, row by row, `8/B` per byte, least significant bits first, then `μ` and `σ` (float32). After them the
head: of method "lora" its weight (C, 768) and bias (C,) in float32, of method "lora-bihead" one more such matrix
(C, 768), of 1 bit whatever B is, and no bias. `NAME-bitB-dimR.yaml` beside it says what R, B and C are, and the scale
`s` of the update `s · up · down`.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

from ...adapter_folder.ordinary import check_ordinary
from ...functional.packing import PackedWeight, pack, unpack
from ...functional.quantization import BITS


WIDTH, NUM_BLOCKS, PATCH_SIZE = 768, 12, 16
# The one backbone of the published files, and the Hub's name for it.
BACKBONE, BASE_MODEL = "vit_base_patch16_224_in21k", "google/vit-base-patch16-224-in21k"
HEAD_BITS = {"lora": 32, "lora-bihead": 1}
MATRICES = ("lora_q down", "lora_q up", "lora_v down", "lora_v up")
MAX_SETTINGS_BYTES = 2048
# What is read is held in memory: a file of zeros that takes no place on the disk can be of any size.
MAX_CLASSES = 2**16
_MOMENTS = struct.Struct("<ff")


@dataclass(frozen=True)
class Settings:
    """What the `.yaml` says.

    Attributes:
        dataset: What the adapter was trained for.
        num_class: C, the number of classes.
        backbone: timm's name of the base model.
        method: "lora", or "lora-bihead" with a head of 1 bit.
        dim: R, the rank.
        bit: B, bits per entry of the factors.
        scale: s.

    Raises:
        ValueError: A setting is not of its kind, or belongs to another method or backbone.
    """

    dataset: str
    num_class: int
    backbone: str
    method: str
    dim: int
    bit: int
    scale: float

    def __post_init__(self) -> None:
        largest = torch.finfo(torch.float32).max
        is_number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        for name, is_right, expected in (
            ("backbone", self.backbone == BACKBONE, BACKBONE),
            ("method", isinstance(self.method, str) and self.method in HEAD_BITS, " or ".join(HEAD_BITS)),
            ("bit", type(self.bit) is int and self.bit in BITS, f"one of {', '.join(map(str, BITS))}"),
            ("dim", type(self.dim) is int and 0 < self.dim < 2**31, "a positive integer"),
            ("num_class", type(self.num_class) is int and 0 < self.num_class < 2**31, "a positive integer"),
            ("scale", is_number and 0 < self.scale <= largest, "a positive number (1.0e-05, not 1e-5)"),
            ("dataset", isinstance(self.dataset, str), "a name"),
        ):
            if not is_right:
                value = getattr(self, name)
                # a collection can be endless in print, by YAML's references
                shown = repr(value)[:80] if isinstance(value, (str, float, int)) else f"a {type(value).__name__}"
                raise ValueError(f"{name} must be {expected}; got {shown}")

    @property
    def num_bytes(self) -> int:
        """The size of the `.bin`."""
        matrix = self.dim * WIDTH * self.bit // 8 + _MOMENTS.size
        moments = _MOMENTS.size if self.has_quantized_head else 0
        bias = 0 if self.has_quantized_head else 4 * self.num_class
        head = self.num_class * WIDTH * HEAD_BITS[self.method] // 8 + moments + bias
        return NUM_BLOCKS * len(MATRICES) * matrix + head

    @property
    def has_quantized_head(self) -> bool:
        return HEAD_BITS[self.method] == 1


class Weights(NamedTuple):
    """What the `.bin` holds.

    Attributes:
        factors: Of q of block 0, v of block 0, q of block 1, …: down (R, 768) and up (768, R).
        head: (C, 768), float32 or packed.
        bias: float32 (C,); None where the head is packed.
    """

    factors: list[tuple[PackedWeight, PackedWeight]]
    head: PackedWeight | torch.Tensor
    bias: torch.Tensor | None

    @property
    def num_class(self) -> int:
        return len(self.head.codes if self.bias is None else self.head)


def read(file: str | os.PathLike) -> tuple[Settings, Weights]:
    """Read a `.bin`, and the `.yaml` beside it.

    Raises:
        FileNotFoundError: One of the two is missing.
        ValueError: One of the two is not of this form, or the name says something else. Sizes are looked at before anything is read.
    """
    file = Path(file)
    settings_file = settings_beside(file)
    settings = _read_settings(settings_file)
    with open(_existing(file), "rb") as stream:
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
    if settings.has_quantized_head:
        return Weights(factors, _decode_matrix(stream, shape, 1, "the head"), None)
    numbers = torch.from_numpy(np.frombuffer(stream.read(), "<f4").astype(np.float32))
    if not numbers.isfinite().all():
        raise ValueError("the head has entries that are not finite")
    return Weights(factors, numbers[: math.prod(shape)].view(shape), numbers[math.prod(shape) :])


def encode(weights: Weights) -> bytes:
    """The bytes of a `.bin`: what `decode` reads."""
    matrices = [matrix for pair in weights.factors for matrix in pair]
    if weights.bias is None:
        return b"".join(map(_encode_matrix, [*matrices, weights.head]))
    numbers = torch.cat([weights.head.flatten(), weights.bias])
    return b"".join(map(_encode_matrix, matrices)) + numbers.numpy().astype("<f4").tobytes()


def encode_settings(settings: Settings) -> str:
    """The text of a `.yaml`, as the authors' is: sorted, a line each."""
    return yaml.safe_dump(asdict(settings))


def settings_beside(file: Path) -> Path:
    """The `.yaml` of a `.bin`.

    Raises:
        ValueError: The file is no `.bin` by its name.
    """
    if file.suffix != ".bin":
        raise ValueError(f"{file}: Bi-LoRA's files are called NAME-bitB-dimR.bin, with NAME-bitB-dimR.yaml beside")
    return file.with_suffix(".yaml")


def dataset_in_name(file: Path, bit: int, dim: int) -> str:
    """The dataset that a `.bin` is called after.

    Args:
        file: The `.bin`.
        bit, dim: Of the adapter that it holds, or is to hold.

    Raises:
        ValueError: The name speaks of other bits, or another rank: the authors' programs find the file by them.

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


def shortest_scale(lora_alpha: float, dim: int) -> float:
    """The number of fewest digits that, times the rank, is `lora_alpha`: the quotient may miss it by rounding.

    Example:
        >>> 0.1 * 3 / 3, shortest_scale(0.1 * 3, 3)
        (0.10000000000000002, 0.1)
    """
    quotient = lora_alpha / dim
    rounded = (float(f"{quotient:.{digits}g}") for digits in range(1, 18))
    return next((scale for scale in rounded if scale * dim == lora_alpha), quotient)


def _read_settings(path: Path) -> Settings:
    if _existing(path).stat().st_size > MAX_SETTINGS_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: no settings of an adapter")
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeys)
    # dates that are none raise ValueError, a thousand brackets RecursionError
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no YAML: {' '.join(str(error).split())}") from error
    names = [field.name for field in fields(Settings)]
    if not isinstance(values, dict) or set(values) != set(names):
        found = ", ".join(str(key)[:40] for key in values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{path} must have the keys {', '.join(sorted(names))}; got {found}")
    try:
        return Settings(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """Of two values for a key YAML's loader would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise ValueError(f"{twice[:40]} is there twice")
        return super().construct_mapping(node, deep)


def _existing(path: Path) -> Path:
    check_ordinary(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; a Bi-LoRA adapter is a .bin and a .yaml of the same name")
    return path


def _decode_matrix(stream: io.BytesIO, shape: tuple[int, int], bits: int, name: str) -> PackedWeight:
    packed = torch.frombuffer(bytearray(stream.read(math.prod(shape) * bits // 8)), dtype=torch.uint8)
    mean, std = _MOMENTS.unpack(stream.read(_MOMENTS.size))
    if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
        raise ValueError(f"{name} has mean {mean} and deviation {std}")
    return PackedWeight.from_codes(bits, unpack(packed, bits, shape), torch.tensor([[mean]]), torch.tensor([[std]]))


def _encode_matrix(matrix: PackedWeight) -> bytes:
    moments = _MOMENTS.pack(matrix.mean.item(), matrix.std.item())
    return pack(matrix.codes, matrix.bits).numpy().tobytes() + moments
