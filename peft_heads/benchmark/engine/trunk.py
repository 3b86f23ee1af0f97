"""Trunks: the beginning of a training that several runs share, and train once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from ...adapter_folder.checkpoints import last_complete_checkpoint
from ...tuners.common.options import HEAD_SETTINGS
from ..records.effective import with_warmup
from ..records.run_record import RunSpec
from .places import Places
from .training import Training
from .work_folder import alone, begin


logger = logging.getLogger(__name__)

TRUNK, IN_USE = "trunk-", ".use"  # how the folders of shared beginnings are called, and their second locks


def training_key(spec: RunSpec) -> str:
    """A key that is equal for runs that train alike, and may be evaluated on different images."""
    settings = spec.to_json()
    del settings["eval_split"]
    return json.dumps(settings, sort_keys=True)


def trunk_key(spec: RunSpec) -> str:
    """A key that is equal for runs that train alike until heads are scored.

    If they can share nothing, it is that of runs that train alike to the end.
    """
    epochs = trunk_epochs(spec)
    if epochs == 0:
        return training_key(spec)
    settings = spec.to_json() | {"trunk_epochs": epochs}
    del settings["eval_split"]
    settings["method"] = {k: value for k, value in settings["method"].items() if k not in HEAD_SETTINGS}
    return json.dumps(settings, sort_keys=True)


def trunk_epochs(spec: RunSpec) -> int:
    """Epochs that runs of one `trunk_key` can share: those before the scoring window, which is the last of the warm-up.

    0 where they can share none.
    """
    method = with_warmup(spec.method, spec.recipe)
    warmup = method.get("head_warmup_epochs")
    if warmup is None or method.get("head_window") not in (None, "last_epoch"):
        return 0
    if method.get("distill") and method.get("teacher") == "start":
        return 0  # the teacher lies in the folder of the run that has copied it
    return max(0, math.ceil(warmup) - 1)


def train_trunk(spec: RunSpec, places: Places) -> Path:
    """Train the first `trunk_epochs` alone, for several runs to begin with; returns the checkpoint at their end.

    Args:
        spec: One of the runs.
        places: Folders of data and results.
    """
    training, epochs = Training(spec, places), trunk_epochs(spec)
    folder = trunk_folder(spec, places)
    end = folder / f"checkpoint-{epochs * training.steps_per_epoch}"
    with alone(folder):
        begin(folder, training.environment())
        checkpoint = last_complete_checkpoint(folder)
        PartialState().wait_for_everyone()
        if checkpoint != os.fspath(end):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="training ended at step .*, before the selection")
                training.trainer(folder, stop_after=epochs).train(resume_from_checkpoint=checkpoint)
            PartialState().wait_for_everyone()
    return end


@contextmanager
def held_trunk(spec: RunSpec, places: Places) -> Iterator[None]:
    """Hold a trunk while runs begin with it, so that no other process uses or deletes it.

    Raises:
        ValueError: Another process holds it.
    """
    with alone(_use_of(trunk_folder(spec, places))):
        yield


def trunk_folder(spec: RunSpec, places: Places) -> Path:
    """The folder of the training that all runs with one `trunk_key` share."""
    digest = hashlib.sha256(trunk_key(spec).encode()).hexdigest()[:10]
    return places.work / f"{TRUNK}{spec.task}-seed{spec.seed}-{digest}"


def clear_trunks(places: Places, needed: Iterable[RunSpec] = ()) -> None:
    """Delete the trunks that killed sweeps have left behind.

    A trunk that another process is using is locked, and stays.

    Args:
        places: Folders of data and results.
        needed: Runs that are not finished, here or on other machines; their trunks stay.
    """
    if not PartialState().is_main_process or not places.work.is_dir():
        return
    kept = {trunk_folder(spec, places).name for spec in needed}
    locks = (path.name.removeprefix(".").removesuffix(".lock") for path in places.work.glob(f".{TRUNK}*.lock"))
    folders = (path.name for path in places.work.glob(f"{TRUNK}*"))
    for name in sorted({name.removesuffix(IN_USE) for name in (*folders, *locks)} - kept):
        folder = places.work / name
        try:
            with alone(_use_of(folder)), alone(folder):
                if folder.exists():
                    logger.warning("%s, which a killed sweep has left behind, is deleted", folder)
                    shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OSError, NotImplementedError):
            continue  # in use, or on a disk that knows no locks


def _use_of(folder: Path) -> Path:
    """The name by which a trunk is locked while runs begin with it."""
    return folder.with_name(folder.name + IN_USE)
