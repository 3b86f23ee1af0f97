"""Images of more than 8 bits per channel (16-bit PNG and TIFF, 32-bit integers, floats) as 8 bits.

Pillow's own conversion clips such values at 255. What is black and what is white must be the same for all images of a
data set, so it comes from the format (unsigned 16-bit values that use their range) or from the user, never from the
image's own minimum and maximum.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image


FULL = 65535  # white in 16 bits
TWELVE_BITS = 4096  # values of cameras and scanners are often 12 bits wide, in files that have 16
ROWS = 256  # converted at a time: float64 takes four times the memory of 16 bits
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
UNSIGNED, SIGNED = (1,), (2,)
# Unpackers of Pillow keep the more significant of two bytes. In the other byte order that is the less significant one.
OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}


def check_image_range(image_range: Any) -> tuple[float, float] | None:
    """`image_range` as two plain numbers, or None.

    Raises:
        ValueError: It is not two finite numbers, the lower first.
    """
    if image_range is None:
        return None
    if isinstance(image_range, (list, tuple)) and len(image_range) == 2:
        numbers = all(isinstance(x, Real) and not isinstance(x, bool) for x in image_range)
        if numbers and all(map(math.isfinite, image_range)) and image_range[0] < image_range[1]:
            return tuple(int(x) if isinstance(x, Integral) else float(x) for x in image_range)  # not NumPy's
    raise ValueError(f"image_range={image_range!r} must be two finite numbers, LOW HIGH, with LOW below HIGH")


def is_deep(picture: PIL.Image.Image) -> bool:
    """Whether an image has more than 8 bits per channel, or signed ones. The header says so; nothing is decoded."""
    return _is_grey(picture) or _is_colour(picture) or _is_signed_byte(picture)


def eight_bits(
    picture: PIL.Image.Image,
    reopen: Callable[[], AbstractContextManager[PIL.Image.Image]] | None = None,
    image_range: tuple[float, float] | None = None,
) -> PIL.Image.Image:
    """A deep image (`is_deep`), not loaded yet, with 8 bits per channel: mode L, RGB, … instead of I;16, I, F, ….

    Args:
        reopen: Function that opens the same file once more, for the less significant bytes of colours; None if that is impossible.
        image_range: (LOW, HIGH), the values that become 0 and 255; what lies outside is clipped. Without it unsigned
            values of 16 bits are divided by 257.

    Raises:
        ValueError: `image_range` is needed (`--image_range` on the command line), or values are no numbers.
    """
    white = _declared_white(picture)
    inverted = _tags(picture).get(PHOTOMETRIC) == 0 and _is_grey(picture)  # as Pillow does with 8 bits
    if _is_colour(picture):
        mode = picture.mode
        values, white = _colour_values(picture, reopen, image_range, white)
    else:
        mode, values = "L", _grey_values(picture, white)
    colours = values[..., :-1] if mode.endswith("A") else values
    low, high = image_range or _range_of_format(picture, colours, white)
    if colours.dtype.kind == "f" and np.isnan(colours).any():
        raise ValueError(f"{int(np.isnan(colours).sum()):,} of its values are not a number (NaN); replace them first")
    out = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = to_bytes(values[rows], low, high)
        if mode.endswith("A"):
            out[rows, ..., -1] = to_bytes(values[rows, ..., -1], 0, FULL)
    result = PIL.Image.fromarray(255 - out if inverted else out)
    if result.mode != mode:  # CMYK, say, which the array cannot tell from RGBA
        result = PIL.Image.merge(mode, result.split())
    if isinstance(key := picture.info.get("transparency"), int) and values.ndim == 2:
        opaque = PIL.Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
        result = PIL.Image.merge("LA", (result, opaque))
    return result


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as uint8 of the same shape: `low` becomes 0 and `high` 255, linearly; what lies outside is clipped."""
    scaled = (values.astype(np.float64) - low) * 255 / (float(high) - float(low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _range_of_format(picture: PIL.Image.Image, values: np.ndarray, white: int | None) -> tuple[int, int]:
    """The values of black and white, where the format leaves no doubt about them."""
    if white is not None and white != FULL:
        return 0, white  # the file says it
    found = f"from {values.min():g} to {values.max():g}" if values.size else "of none"
    asks = (
        "give --image_range LOW HIGH (image_range=(LOW, HIGH) in Python), the values that are black and white in all "
        "your images"
    )
    if white is None:
        kind = {"f": "floating-point numbers", "i": "signed integers", "u": "integers"}[values.dtype.kind]
        raise ValueError(f"its values are {8 * values.dtype.itemsize}-bit {kind}, {found}: {asks}")
    if values.max() < TWELVE_BITS:
        raise ValueError(
            f"its values have 16 bits but are below {TWELVE_BITS}, {found}, as of 12 bits: {asks} "
            f"(0 {TWELVE_BITS - 1} for 12 bits, 0 {FULL} for 16)"
        )
    return 0, FULL


def _declared_white(picture: PIL.Image.Image) -> int | None:
    """The largest value that the format allows, where it makes sense as white: unsigned values of 16 bits or fewer."""
    if picture.format == "PPM" and picture.mode != "F":
        return next((x for tile in picture.tile for x in _arguments(tile) if isinstance(x, int) and x > 255), FULL)
    return FULL if picture.mode.startswith("I;16") or _is_colour(picture) else None


def _grey_values(picture: PIL.Image.Image, white: int | None) -> np.ndarray:
    """The grey values of the file (H, W)."""
    unsigned = _tags(picture).get(BITS) == (32,) and _tags(picture).get(SAMPLE_FORMAT, UNSIGNED) == UNSIGNED
    signed_byte = _is_signed_byte(picture)
    values = np.asarray(picture)
    if values.dtype == np.int32 and unsigned:
        return values.view(np.uint32)  # Pillow's mode I is signed
    if signed_byte:
        return values.view(np.int8)
    if picture.format == "PPM" and white not in (None, FULL):
        return np.rint(values * (white / FULL)).astype(np.uint16)  # Pillow has stretched them
    return values.astype(np.uint16) if white is not None else values


def _colour_values(picture: PIL.Image.Image, reopen, image_range, white: int) -> tuple[np.ndarray, int]:
    """The colour values of the file (H, W, C), put together from two passes that see one byte each, and white's."""
    try:
        if reopen is None:
            raise ValueError("it was opened elsewhere")
        high, low = (_tiles_of_byte(picture, less) for less in (False, True))
        with reopen() as other:
            other.tile = low
            low = np.asarray(other).astype(np.uint16)
    except (ValueError, AttributeError) as error:  # Pillow has no unpacker of that name; a plugin's recipe is another
        bytes_ = np.asarray(picture)
        most = bytes_[..., :-1].max() if picture.mode.endswith("A") else bytes_.max()
        if image_range is not None or (white == FULL and most <= TWELVE_BITS >> 8):
            raise ValueError(
                f"of its {picture.mode} values of 16 bits only the upper 8 can be read, at most {most}, and "
                "--image_range (image_range=(LOW, HIGH) in Python) needs all: save it as grey, or with 8 bits"
            ) from error
        return bytes_.astype(np.uint16) * 257, FULL
    picture.tile = high
    return (np.asarray(picture).astype(np.uint16) << 8) | low, white


def _tiles_of_byte(picture: PIL.Image.Image, less: bool) -> list:
    """Pillow's recipe for reading the file, changed so that the more or the less significant bytes are kept.

    Raises:
        ValueError: It has no such unpacker.
    """
    tiles = []
    for tile in picture.tile:
        codec, first, *rest = tile[0], *_arguments(tile)
        if codec == "ppm":  # would divide by the largest value
            codec, first, rest = "raw", f"{first};16B", [0, 1]
        if not isinstance(first, str) or not first.endswith(tuple(OTHER_BYTE)):
            raise ValueError(f"codec {codec} cannot be read by bytes")
        if less:
            first = first[:-4] + OTHER_BYTE[first[-4:]]
        tiles.append(tile._replace(codec_name=codec, args=(first, *rest)))
    return tiles


def _is_grey(picture: PIL.Image.Image) -> bool:
    return picture.mode.startswith("I") or picture.mode == "F"


def _is_colour(picture: PIL.Image.Image) -> bool:
    """Whether there are 16 bits per channel that Pillow would cut to 8: its recipe for reading them says so."""
    if _is_grey(picture):
        return False
    arguments = [argument for tile in getattr(picture, "tile", ()) for argument in _arguments(tile)]
    in_ppm = picture.format == "PPM" and any(isinstance(x, int) and x > 255 for x in arguments)
    in_sgi = any(tile[0] == "SGI16" for tile in getattr(picture, "tile", ()))
    # not ";16" alone: BGR;16 of a BMP is 16 bits in all, for three channels
    return in_ppm or in_sgi or any(isinstance(x, str) and x.endswith(tuple(OTHER_BYTE)) for x in arguments)


def _is_signed_byte(picture: PIL.Image.Image) -> bool:
    return picture.mode == "L" and _tags(picture).get(SAMPLE_FORMAT) == SIGNED


def _arguments(tile: Any) -> tuple:
    """The arguments of a tile's decoder; plugins for Pillow may have plain tuples."""
    return tile[3] if isinstance(tile[3], tuple) else (tile[3],)


def _tags(picture: PIL.Image.Image) -> Any:
    return getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
