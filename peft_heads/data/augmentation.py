"""Random changes of training images, on tensors: crop and flip in torch, colour jitter and RandAugment by kornia."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images, made in the order of the attributes; `to_dict()` belongs in every result.

    Every image has changes of its own, drawn from torch's global generator, which a DataLoader seeds in each worker.

    Attributes:
        random_crop: Whether to cut `size` x `size` from anywhere in the image (see `Preprocessing(crop="random")`).
        flip: Whether to mirror half of the images.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        rand_augment: (n, m), the number of RandAugment's operations and their magnitude, out of 30.
        size: Height and width of the result.

    Raises:
        ValueError: A setting out of range, or kornia is needed and not installed.
    """

    random_crop: bool = False
    flip: bool = False
    color_jitter: float = 0.0
    rand_augment: tuple[int, int] | None = None
    size: int = 224

    def __post_init__(self):
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter={self.color_jitter} must lie between 0 and 1")
        if self.rand_augment is not None:
            object.__setattr__(self, "rand_augment", tuple(self.rand_augment))  # JSON and YAML have lists
            if len(self.rand_augment) != 2 or self.rand_augment[0] < 1 or not 0 < self.rand_augment[1] < 30:
                raise ValueError(f"rand_augment={self.rand_augment} must be (n, m) with n >= 1 and 0 < m < 30")
        if (self.color_jitter or self.rand_augment) and find_spec("kornia") is None:
            raise ValueError("colour jitter and RandAugment need kornia: pip install 'peft-heads[augment]'")

    def __call__(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Turn uint8 images (3, H, W), on any device, into float32 values in [0, 1] (images, 3, size, size)."""
        return torch.stack([self._augment(image) for image in images])

    def to_dict(self) -> dict:
        return asdict(self)

    def _augment(self, image: torch.Tensor) -> torch.Tensor:
        if self.random_crop:
            image = random_crop(image, self.size)
        if tuple(image.shape[-2:]) != (self.size, self.size):
            raise ValueError(
                f"an image of {tuple(image.shape[-2:])} is not {self.size} x {self.size}: preprocess it to that size, "
                "or set random_crop"
            )
        image = image.to(torch.float32) / 255
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        # one by one: kornia's RandAugment chooses the same operations for all images of a batch
        for operation in _kornia_operations(self.color_jitter, self.rand_augment):
            image = operation(image[None])[0].clamp(0, 1)
        return image


# The papers' augmentations for training. For VTAB-1K they have none.
FEW_SHOT = {"color_jitter": 0.4, "rand_augment": (2, 9)}
FGVC = {"random_crop": True, "flip": True}


def random_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """A random part (…, size, size) of an image (…, H, W); every place is equally likely.

    Raises:
        ValueError: The image is smaller.
    """
    height, width = image.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"an image of {height} x {width} has no part of {size} x {size}")
    top, left = (int(torch.randint(side - size + 1, ())) for side in (height, width))
    return image[..., top : top + size, left : left + size]


@lru_cache
def _kornia_operations(color_jitter: float, rand_augment: tuple[int, int] | None) -> tuple:
    operations = []
    if color_jitter:
        from kornia.augmentation import ColorJitter

        operations.append(ColorJitter(color_jitter, color_jitter, color_jitter))
    if rand_augment:
        from kornia.augmentation.auto import RandAugment

        operations.append(RandAugment(n=rand_augment[0], m=rand_augment[1]))
    return tuple(operations)
