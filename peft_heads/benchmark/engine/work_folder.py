"""The folder that a training works in: locked while it is trained in, and emptied of what other code or data have left."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from accelerate import PartialState

from ...adapter_folder.atomic import write_atomically
from ..records.run_record import Environment


logger = logging.getLogger(__name__)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder: two sweeps in one output folder must not train in it at once. A killed sweep's lock is free."""
    if not PartialState().is_main_process:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f".{folder.name}.lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ValueError(
            f"{folder} is being trained by another process; begin again when that one is done, give this one another "
            "output_dir, or share the sweep by --storage"
        ) from error
    try:
        yield
    finally:
        lock.release()
    path.unlink(missing_ok=True)


def begin(folder: Path, environment: Environment) -> None:
    """Note the environment of the checkpoints in a folder, and delete those of other data or other code."""
    path, now = folder / "environment.json", environment.to_json()
    if PartialState().is_main_process:
        try:
            then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError:
            then = None
        if then != now:
            if folder.exists():
                logger.warning("%s holds checkpoints of other data or other code; its training starts again", folder)
                shutil.rmtree(folder)
            write_atomically(path, json.dumps(now))
    PartialState().wait_for_everyone()
