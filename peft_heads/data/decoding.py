"""From a file, or its bytes, to an image with 8 bits per channel in RGB, or its pixels; every error names the file."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps

from ..adapter_folder.ordinary import check_regular
from .deep_images import check_image_range, eight_bits, is_deep
from .preprocessing import Preprocessing


ORIENTATION = PIL.Image.ExifTags.Base.Orientation
_alpha = threading.Lock()
_alpha_was_said = False  # in this process


def decode_image(image, image_range: tuple[float, float] | None = None) -> PIL.Image.Image:
    """An image in RGB mode, 8 bits per channel, the right way up (EXIF). Transparency is dropped, with one warning.

    Args:
        image: Path; or row of a `datasets.Image` column that is not decoded, `{"path": …, "bytes": …}`; or one of
            Pillow's images, taken as it is, EXIF ignored. (Of 16-bit colours it has only 8 bits: give the path.)
        image_range: (LOW, HIGH), the values that become black and white in images of more than 8 bits per channel;
            what lies outside is clipped. Without it unsigned 16-bit values are divided by 257. Images of 8 bits are
            taken as they are.

    Raises:
        ValueError: It cannot be decoded, is no regular file, or has more than twice the pixels of
            `PIL.Image.MAX_IMAGE_PIXELS`; or it needs an `image_range`: 32-bit integers, signed or floating-point
            numbers, and 16-bit values below 4096. The message names the file.
    """
    check_image_range(image_range)
    try:
        picture = _decode(image, image_range)
        transparent = not _alpha_was_said and _is_transparent(picture)
        if "transparency" in picture.info:  # Pillow would warn that it is lost
            picture = picture.copy()
            del picture.info["transparency"]
        picture = picture.convert("RGB")
    # Pillow raises whatever comes up in a damaged file; DecompressionBombWarning where warnings are errors
    except Exception as error:
        raise ValueError(f"image {name_of(image)} cannot be read: {error or type(error).__name__}") from error
    if transparent:
        _say_alpha_is_dropped(name_of(image))
    return picture


def read_pixels(image, preprocessing: Preprocessing) -> np.ndarray:
    """Decode and resize an image of a column that is not decoded: uint8 (3, H, W).

    Raises:
        ValueError: It cannot be decoded or resized; the message names its file.
    """
    picture = decode_image(image, preprocessing.image_range)
    try:
        return preprocessing.pixels(picture)
    except ValueError as error:
        raise ValueError(f"image {name_of(image)} cannot be resized: {error}") from error


def check_values(path: str, image_range: tuple[float, float] | None = None) -> None:
    """Check the values of a file with more than 8 bits per channel, which takes decoding it.

    Raises:
        ValueError: As for `decode_image`, without the file's name.
        OSError, SyntaxError: The file is damaged.
    """
    with PIL.Image.open(path) as picture:
        if is_deep(picture):
            eight_bits(picture, lambda: PIL.Image.open(path), image_range)


def name_of(image) -> str:
    """The name, for messages, of an image that `decode_image` accepts."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    name = image["path"] if isinstance(image, dict) else getattr(image, "filename", None)
    return name or "(without a file name)"


class NamingImage(datasets.Image):
    """`datasets.Image` that decodes by `decode_image`, so that errors name the file. It is saved as `datasets.Image`."""

    def __init__(self, feature: datasets.Image, image_range: tuple[float, float] | None = None):
        super().__init__(mode=feature.mode, decode=feature.decode)
        self.image_range = image_range

    def decode_example(self, value, token_per_repo_id=None) -> PIL.Image.Image:
        image = decode_image(value, self.image_range)
        return image.convert(self.mode) if self.mode else image

    def __eq__(self, other) -> bool:
        """Equal to `datasets.Image`, so that data sets with either feature can be joined."""
        return isinstance(other, datasets.Image) and (self.mode, self.decode) == (other.mode, other.decode)

    __hash__ = None


def _decode(image, image_range) -> PIL.Image.Image:
    """The image with 8 bits per channel, the right way up."""
    if isinstance(image, (str, os.PathLike)):
        image = {"path": os.fspath(image), "bytes": None}
    if not isinstance(image, dict):
        return eight_bits(image, None, image_range) if is_deep(image) else image
    if image["bytes"] is None and image["path"] is None:
        raise ValueError("it has neither a path nor bytes")
    if image["bytes"] is None and "://" in image["path"]:  # of a streamed data set
        picture = datasets.Image().decode_example(image)
        return eight_bits(picture, None, image_range) if is_deep(picture) else picture
    reopen = _opener(image)
    with reopen() as picture:
        result = eight_bits(picture, reopen, image_range) if is_deep(picture) else picture
        picture.load()
        turn = picture.getexif().get(ORIENTATION)
        if turn is None:
            return result
        if result is not picture:
            exif = PIL.Image.Exif()
            exif[ORIENTATION] = turn
            result.info["exif"] = exif.tobytes()
        return PIL.ImageOps.exif_transpose(result)


def _opener(image: dict) -> Callable[[], PIL.Image.Image]:
    if image["bytes"] is not None:
        return lambda: PIL.Image.open(io.BytesIO(image["bytes"]))
    check_regular(image["path"])
    return lambda: PIL.Image.open(image["path"])


def _is_transparent(picture: PIL.Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    if not picture.has_transparency_data:
        return False
    if picture.getbands()[-1] not in ("A", "a"):
        picture = picture.convert("RGBA")
    return picture.getchannel(len(picture.getbands()) - 1).getextrema()[0] < 255


def _say_alpha_is_dropped(name: str) -> None:
    global _alpha_was_said
    with _alpha:
        said, _alpha_was_said = _alpha_was_said, True
    if not said:
        warnings.warn(
            f"image {name} is transparent in places: transparency is dropped, as transformers does, and the colours "
            "behind it are seen (said once). If the picture is in the transparency, save the images on a ground first"
        )
