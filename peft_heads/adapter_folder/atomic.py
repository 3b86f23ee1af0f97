"""Writing files so that no reader ever finds a half-written one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


# By one of these a folder shows that it holds an adapter or a checkpoint, and may be replaced.
OUTPUTS = ("adapter_config.json", "config.json")


def write_atomically(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write beside, then rename: after a crash `path` holds the old content or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    # Trainer leaves names with an underscore out when it uploads the folder meanwhile
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"_{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; give it the rights an ordinary new file would have
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_together(contents: dict[Path, str | bytes]) -> None:
    """Write files of one folder that belong together: nobody finds an old one beside a new one.

    All are written beside, as by `new_files`.
    """
    with new_files(*contents) as folder:
        for path, content in contents.items():
            write_atomically(folder / path.name, content)


@contextmanager
def new_files(*paths: Path) -> Iterator[Path]:
    """A folder to be filled inside the block with files of these names, which take their places together at its end.

    It lies beside, under a name that begins with `_{name}.`; old files are put there before the new ones take their
    places. An old file that has no new one is deleted. After an error the old ones are back; after a power cut they
    lie there.

    Args:
        paths: Files of one folder that belong together. Not all of them need be written.
    """
    parent = paths[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    # Trainer leaves names with an underscore out when it uploads the folder meanwhile
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f"_{paths[0].name}."))
    new, old, written, moved, done = temporary / "new", temporary / "old", [], [], False
    try:
        new.mkdir()
        yield new
        found = [path for path in paths if (new / path.name).exists()]
        for path in found:
            _flush_to_disk(new / path.name)
        try:
            for path in filter(Path.exists, paths):
                old.mkdir(exist_ok=True)
                os.rename(path, old / path.name)
                moved.append(path)
            for path in found:
                os.rename(new / path.name, path)
                written.append(path)
        except BaseException:
            for path in moved:
                os.replace(old / path.name, path)
            for path in set(written) - set(moved):
                path.unlink()
            raise
        done = True
    finally:
        if done or all(map(Path.exists, moved)):
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = False, sources: tuple = ()) -> Iterator[Path]:
    """A folder to be filled inside the block, which becomes `target` at its end, complete or not at all.

    It is written beside and renamed. A folder that is overwritten stays whole until then; should the power go between
    the two renamings, it lies beside, in a folder whose name begins with `_{name}.`.

    Args:
        target: The new folder.
        overwrite: Whether an adapter or a checkpoint that is there is replaced; other folders never are.
        sources: Files and folders that are read meanwhile, which `target` must not contain.

    Raises:
        ValueError: `target` exists and is not to be, or must not be, replaced. Nothing is changed then, nor after an
            error in the block.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite, sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Trainer leaves names with an underscore out when it uploads the folder meanwhile
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"_{target.name}."))
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror} ({error.filename})") from error
    folder, old = temporary / "new", temporary / "old"
    try:
        folder.mkdir()  # with the rights of an ordinary new folder
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                _flush_to_disk(path)
        _check_target(target, overwrite, sources)  # it may have come meanwhile
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(folder, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
    finally:
        if target.exists() or not old.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _check_target(target: Path, overwrite: bool, sources: tuple) -> None:
    for source in sources:
        path = Path(os.path.realpath(source))
        if path.exists() and path.is_relative_to(os.path.realpath(target)):
            raise ValueError(f"{target} must be another folder: it holds {source}, which is read")
    if target.is_symlink():
        raise ValueError(f"{target} is a link, which is not replaced; name the folder itself, or another")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} exists already and nothing was changed; --overwrite replaces it")
    if not any((target / name).is_file() for name in OUTPUTS):
        raise ValueError(
            f"{target} holds neither an adapter nor a checkpoint (no {' or '.join(OUTPUTS)}) and is not replaced; "
            "name another folder"
        )
    foreign = next((path for path in sorted(target.iterdir()) if path.is_dir() or not _belongs(path)), None)
    if foreign is not None:
        raise ValueError(
            f"{target} holds more than an adapter or a checkpoint, which would be lost: {foreign.name}; name another "
            "folder, or move it away"
        )


def _belongs(path: Path) -> bool:
    """Whether a file may be one of an adapter's or a checkpoint's."""
    return path.suffix in (".json", ".safetensors", ".md", ".png", ".bin") or path.name == ".gitattributes"


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
