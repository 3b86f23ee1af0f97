"""Image files of a tree: each must exist, be an image, and lie in the task's folder. And hashes of their contents."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from ..adapter_folder.ordinary import check_regular
from .decoding import check_values
from .deep_images import check_image_range
from .formats import LEAVES


# What the common formats begin with: Pillow knows them all, but takes ten times as long to say so.
BEGINNINGS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP"}
PNG_DEPTH = 24  # the byte that holds the bits per channel
# Folders that archives, file servers and systems add, beside those that begin with a dot.
HIDDEN = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")
CHUNK = 1 << 20


class ImageFile(NamedTuple):
    """A usable file: its path, its size in bytes, and its format ("JPEG", "PNG", …, by its content)."""

    path: str
    size: int
    format: str


class ImageFolder:
    """The image files in one task's folder.

    Links are followed as long as they stay in the folder; the folder itself may be a link.
    """

    def __init__(self, folder: str | Path, image_range: tuple[float, float] | None = None):
        """`image_range`: black and white in images of more than 8 bits, see `decode_image`."""
        self.image_range = check_image_range(image_range)
        self.folder = os.path.abspath(folder)
        self.real = os.path.realpath(folder)
        self._inside: dict[str, bool] = {}  # by parent folder, since tasks have up to 73,728 images in one

    def file(self, base: str, image: str) -> ImageFile:
        """Check one file.

        Raises:
            ValueError: It cannot be used; the message continues a sentence that begins with the path.
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
            return ImageFile(path, info.st_size, _format(path, _state(info), self.image_range))
        except FileNotFoundError:
            raise ValueError("is missing") from None
        except (OSError, UnicodeEncodeError) as error:
            raise ValueError(f"cannot be read ({error})") from error

    def below(self, folder: str) -> Iterator[str]:
        """The files at any depth in a folder, as paths from the task's folder with /, sorted; hidden ones are skipped.

        Raises:
            ValueError: A linked folder leads out of the task's folder, or round in a circle.
        """
        for path in sorted(map(Path, files_below(os.path.join(self.folder, folder), self.real))):
            yield path.relative_to(self.folder).as_posix()

    def _parent_is_inside(self, parent: str) -> bool:
        if parent not in self._inside:
            self._inside[parent] = self._contains(os.path.realpath(parent))
        return self._inside[parent]

    def _contains(self, real_path: str) -> bool:
        return Path(real_path).is_relative_to(self.real)


def is_hidden(name: str) -> bool:
    """Whether the system, not the user, has put a file or folder there: `.ipynb_checkpoints`, `__MACOSX`, …"""
    return name.startswith(".") or name in HIDDEN


def files_below(folder: str | os.PathLike, home: str) -> Iterator[str]:
    """The paths of all files at any depth in a folder. Hidden ones are skipped, and linked folders are followed.

    Args:
        folder: Folder to search.
        home: Real path of the folder in which linked folders must lie.

    Raises:
        ValueError: A linked folder lies elsewhere, or holds itself.
    """
    left = [(os.fspath(folder), (os.path.realpath(folder),))]
    while left:
        path, around = left.pop()
        try:
            with os.scandir(path) as found:
                entries = [entry for entry in found if not is_hidden(entry.name)]
        except OSError as error:
            raise ValueError(f"the folder {path} cannot be read ({error.strerror})") from error
        for entry in entries:
            if not entry.is_dir():
                yield entry.path
                continue
            real = os.path.join(around[-1], entry.name)
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if any(Path(folder).is_relative_to(real) for folder in around):
                    raise ValueError(f"{entry.path} is a link to a folder that holds it, {real}: remove the link")
                if not Path(real).is_relative_to(home):
                    raise ValueError(
                        f"{entry.path} is a link to a folder outside of {home}, {real}: copy it there, or remove the "
                        "link"
                    )
            left.append((entry.path, (*around, real)))


def content_hashes(paths: Iterable[str]) -> list[bytes]:
    """The SHA-256 of every file, in order. A file is read again only if its size, times or place on the disk changed.

    Raises:
        ValueError: A file cannot be read, or is not a regular file.
        FileNotFoundError: A file is gone.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_content_hash, paths))


def _content_hash(path: str) -> bytes:
    try:
        return _hash_of(path, _state(check_regular(path)))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {path} is gone ({error.strerror})") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def _state(info: os.stat_result) -> int:
    """A number that differs whenever a file may have changed: no user can set the time of change (`ctime`)."""
    return hash((info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))


@cache
def _hash_of(path: str, state: int) -> bytes:
    """The hash of a file; kept, because a sweep asks for the same files thousands of times."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.digest()


def _format(path: str, state: int, image_range: tuple[float, float] | None) -> str:
    with open(path, "rb") as file:
        beginning = file.read(PNG_DEPTH + 1)
    if not beginning:
        raise ValueError("is empty")
    for known, name in BEGINNINGS.items():
        if beginning.startswith(known):
            if name == "PNG" and beginning[PNG_DEPTH:] > b"\x08":
                _check_values(path, state, image_range)
            return name
    try:
        with PIL.Image.open(path) as image:
            name = image.format
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise ValueError(f"cannot be read: {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"is no image: it begins with {beginning[:8]!r}") from error
    _check_values(path, state, image_range)
    return name


@cache
def _check_values(path: str, state: int, image_range: tuple[float, float] | None) -> None:
    """Raise ValueError if values cannot be used; the message continues a sentence that begins with the path."""
    try:
        check_values(path, image_range)
    except Exception as error:  # Pillow raises whatever comes up in a damaged file
        raise ValueError(f"cannot be read: {error}") from error
