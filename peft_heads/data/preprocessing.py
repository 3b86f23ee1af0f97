"""From an image to the model's input, in two halves: pixels, which can be cached, and their normalisation."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import PIL.Image
import torch

from .deep_images import check_image_range


NORMALIZATIONS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
RESIZES = ("squash", "shorter_side")
CROPS = ("center", "random")
FILTERS = {name.lower(): value for name, value in PIL.Image.Resampling.__members__.items()}


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every image; `to_dict()` belongs in every result.

    Attributes:
        size: Height and width of the model's input, in pixels.
        resize: Way of resizing: "squash" to a square whatever the aspect ratio; "shorter_side" keeps the ratio.
        resize_size: Length of the square's or the shorter side after resizing. Default: `size` for "squash" (nothing
            is left to crop), `size * 256 // 224` for "shorter_side".
        crop: Part of a larger image that becomes `size` x `size`: its "center"; or "random": the image stays as large
            as it is, and the random crop of `augmentation` chooses.
        filter: Filter of Pillow: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
        normalization: Way of normalising: "none" (values in [0, 1]), "imagenet", "half" (mean and deviation 0.5), or "checkpoint" with
            that model's own `mean` and `std`, one value per channel.
        image_range: (LOW, HIGH), the values that become black and white in images of more than 8 bits per channel, see
            `decode_image`; None takes unsigned 16-bit values as they are, and refuses others.

    Raises:
        ValueError: An unknown or contradictory setting.
    """

    size: int = 224
    resize: str = "squash"
    resize_size: int | None = None
    crop: str = "center"
    filter: str = "bicubic"
    normalization: str = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_range: tuple[float, float] | None = None

    def __post_init__(self):
        choices = {
            "resize": RESIZES,
            "crop": CROPS,
            "filter": tuple(FILTERS),
            "normalization": (*NORMALIZATIONS, "checkpoint"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.size < 1 or self.resized < self.size:
            raise ValueError(f"size={self.size} must be at least 1, and not above resize_size={self.resized}")
        if (self.normalization == "checkpoint") != (self.mean is not None and self.std is not None):
            raise ValueError(
                f"mean and std are given with normalization='checkpoint', and only with it; got "
                f"normalization={self.normalization!r}, mean={self.mean}, std={self.std}"
            )
        object.__setattr__(self, "image_range", check_image_range(self.image_range))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(map(float, values)))  # the processors keep lists
                if len(values) != 3 or (name == "std" and min(values) <= 0):
                    raise ValueError(f"{name}={values} must have three values (std: above 0), one per channel")

    @classmethod
    def from_processor(cls, processor, **settings) -> Preprocessing:
        """The preprocessing with a checkpoint's own normalisation and `image_range`; "none" if it does not normalise."""
        settings = {"image_range": getattr(processor, "image_range", None)} | settings
        if not getattr(processor, "do_normalize", False):
            return cls(normalization="none", **settings)
        return cls(normalization="checkpoint", mean=processor.image_mean, std=processor.image_std, **settings)

    @property
    def resized(self) -> int:
        """`resize_size`, or its default."""
        if self.resize_size is not None:
            return self.resize_size
        return self.size if self.resize == "squash" else self.size * 256 // 224

    def pixels(self, image: PIL.Image.Image) -> np.ndarray:
        """Resize and crop an image in RGB mode to uint8 (3, H, W); H = W = `size` unless `crop` is "random".

        Raises:
            ValueError: It is so long and narrow that it would become too large ("shorter_side").
        """
        width = height = self.resized
        if self.resize == "shorter_side":
            width, height = resized_by_shorter_side(image.size, self.resized)
        image = image.resize((width, height), FILTERS[self.filter])
        if self.crop == "center" and (width, height) != (self.size, self.size):
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Turn uint8, or float values in [0, 1] (…, 3, H, W), into the model's `pixel_values`, float32."""
        if images.dtype == torch.uint8:
            images = images.to(torch.float32).div_(255)
        if self.normalization == "none":
            return images
        mean, std = (images.new_tensor(values)[:, None, None] for values in self.statistics)
        return images.sub(mean).div_(std)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel with which `normalize` changes values in [0, 1]."""
        return NORMALIZATIONS.get(self.normalization) or (self.mean, self.std)

    def pixel_settings(self) -> dict:
        """The settings on which `pixels` depends, for the key of a cache."""
        settings = self.to_dict()
        names = ("size", "resize", "resize_size", "crop", "filter", "image_range")
        return {name: settings[name] for name in names if name in settings}

    def to_dict(self) -> dict:
        """All settings as plain values, defaults filled in, and always with mean and std.

        `image_range` is left out where there is none: earlier results do not have it, and must stay the same runs.
        """
        mean, std = self.statistics
        settings = {**asdict(self), "resize_size": self.resized, "mean": list(mean), "std": list(std)}
        image_range = settings.pop("image_range")
        return settings if image_range is None else settings | {"image_range": list(image_range)}


def resized_by_shorter_side(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height of an image after resizing, so that the shorter side has `shorter` pixels.

    Raises:
        ValueError: That is more than `PIL.Image.MAX_IMAGE_PIXELS`: a line of 20,000 x 1 would take gigabytes.
    """
    scale = shorter / min(size)
    width, height = (max(shorter, round(side * scale)) for side in size)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"it has {size[0]} x {size[1]} pixels, and {width} x {height} with the shorter side resized to {shorter}: "
            f"above the {limit:,} of PIL.Image.MAX_IMAGE_PIXELS. Cut it, or resize by squashing"
        )
    return width, height
