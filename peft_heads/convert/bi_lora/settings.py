"""The `.yaml` of a Bi-LoRA adapter: what it says, and which values it may have."""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import yaml

from ...adapter_folder.ordinary import check_ordinary
from ...functional.quantization import BITS


WIDTH, NUM_BLOCKS, PATCH_SIZE = 768, 12, 16
# The one backbone of the published files, and the Hub's name for it.
BACKBONE, BASE_MODEL = "vit_base_patch16_224_in21k", "google/vit-base-patch16-224-in21k"
CLASSIFIER_BITS = {"lora": 32, "lora-bihead": 1}
MAX_SETTINGS_BYTES = 2048
MATRICES = ("lora_q down", "lora_q up", "lora_v down", "lora_v up")
# Mean and deviation behind each matrix.
MOMENTS = struct.Struct("<ff")
# The end of an error about an adapter that the form has no place for.
OTHER_FORMS = "; or use --to packed, --to lora or --to merged"


@dataclass(frozen=True)
class Settings:
    """The values of the `.yaml`.

    Attributes:
        dataset: Data set that the adapter was trained for.
        num_class: C, the number of classes.
        backbone: timm's name of the base model.
        method: "lora", or "lora-bihead" with a classifier of 1 bit.
        dim: R, the rank.
        bit: B, bits per entry of the factors.
        scale: s.

    Raises:
        ValueError: A setting has a wrong type, or belongs to another method or backbone.
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
            ("method", isinstance(self.method, str) and self.method in CLASSIFIER_BITS, " or ".join(CLASSIFIER_BITS)),
            ("bit", type(self.bit) is int and self.bit in BITS, f"one of {', '.join(map(str, BITS))}"),
            ("dim", type(self.dim) is int and 0 < self.dim < 2**31, "a positive integer"),
            ("num_class", type(self.num_class) is int and 0 < self.num_class < 2**31, "a positive integer"),
            ("scale", is_number and 0 < self.scale <= largest, "a positive number (1.0e-05, not 1e-5)"),
            ("dataset", isinstance(self.dataset, str), "a name"),
        ):
            if not is_right:
                value = getattr(self, name)
                # by YAML's references, printing a collection may never end
                shown = repr(value)[:80] if isinstance(value, (str, float, int)) else f"a {type(value).__name__}"
                raise ValueError(f"{name} must be {expected}; got {shown}")

    @property
    def num_bytes(self) -> int:
        """The size of the `.bin`."""
        matrix = self.dim * WIDTH * self.bit // 8 + MOMENTS.size
        moments = MOMENTS.size if self.has_quantized_classifier else 0
        bias = 0 if self.has_quantized_classifier else 4 * self.num_class
        classifier = self.num_class * WIDTH * CLASSIFIER_BITS[self.method] // 8 + moments + bias
        return NUM_BLOCKS * len(MATRICES) * matrix + classifier

    @property
    def has_quantized_classifier(self) -> bool:
        return CLASSIFIER_BITS[self.method] == 1


def read_settings(path: Path) -> Settings:
    """Read a `.yaml`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or its values are not those of a Bi-LoRA adapter.
    """
    if existing(path).stat().st_size > MAX_SETTINGS_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: no settings of an adapter")
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeys)
    # an impossible date raises ValueError, a thousand brackets RecursionError
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


def encode_settings(settings: Settings) -> str:
    """The text of a `.yaml`, in the authors' form: one setting a line, sorted."""
    return yaml.safe_dump(asdict(settings))


def shortest_scale(lora_alpha: float, dim: int) -> float:
    """The number of fewest digits that is `lora_alpha` when multiplied by the rank.

    The quotient of the two may differ from it by a rounding error.

    Example:
        >>> 0.1 * 3 / 3, shortest_scale(0.1 * 3, 3)
        (0.10000000000000002, 0.1)
    """
    quotient = lora_alpha / dim
    rounded = (float(f"{quotient:.{digits}g}") for digits in range(1, 18))
    return next((scale for scale in rounded if scale * dim == lora_alpha), quotient)


def existing(path: Path) -> Path:
    """The path; raises FileNotFoundError if no file is there, and ValueError if it is no ordinary one."""
    check_ordinary(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; a Bi-LoRA adapter is a .bin and a .yaml of the same name")
    return path


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice; YAML's own loader silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise ValueError(f"{twice[:40]} is there twice")
        return super().construct_mapping(node, deep)
