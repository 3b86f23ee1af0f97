"""Image files of a tree: each must exist, be an image, and lie in the task's folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from .lists import LEAVES


# What the common formats begin with: Pillow knows them all, but takes ten times as long to say so.
BEGINNINGS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP"}


class ImageFile(NamedTuple):
    """Size in bytes and format ("JPEG", "PNG", …, by the file's content) of a usable file."""

    path: str
    size: int
    format: str


class ImageFolder:
    """The files that the lists of one task's folder name.

    Links are followed as long as they stay in the folder; the folder itself may be one.
    """

    def __init__(self, folder: str | Path):
        self.folder = os.path.abspath(folder)
        self.real = os.path.realpath(folder)
        self._inside: dict[str, bool] = {}  # per parent folder, for tasks have up to 73,728 images in one

    def file(self, base: str, image: str) -> ImageFile:
        """Look at one file.

        Raises:
            ValueError: what is wrong with it, for a sentence that begins with its path.
        """
        if LEAVES.search(image):
            raise ValueError("leaves the task's folder (absolute, or with ..)")
        path = os.path.join(self.folder, base, image)
        try:
            info = os.lstat(path)
            if not self._parent_is_inside(os.path.dirname(path)):
                raise ValueError(f"leaves the task's folder by a link, to {os.path.realpath(path)}")
            if stat.S_ISLNK(info.st_mode):
                if not self._contains(os.path.realpath(path)):
                    raise ValueError(f"leaves the task's folder by a link, to {os.path.realpath(path)}")
                info = os.stat(path)
            if not stat.S_ISREG(info.st_mode):
                raise ValueError("is not a file")
            return ImageFile(path, info.st_size, _format(path))
        except FileNotFoundError:
            raise ValueError("is missing") from None
        except (OSError, UnicodeEncodeError) as error:
            raise ValueError(f"cannot be read ({error})") from error

    def _parent_is_inside(self, parent: str) -> bool:
        if parent not in self._inside:
            self._inside[parent] = self._contains(os.path.realpath(parent))
        return self._inside[parent]

    def _contains(self, real_path: str) -> bool:
        return Path(real_path).is_relative_to(self.real)


def _format(path: str) -> str:
    with open(path, "rb") as file:
        beginning = file.read(8)
    if not beginning:
        raise ValueError("is empty")
    for known, name in BEGINNINGS.items():
        if beginning.startswith(known):
            return name
    try:
        with PIL.Image.open(path) as image:
            return image.format
    except (OSError, SyntaxError) as error:
        raise ValueError(f"is no image: it begins with {beginning!r}") from error
