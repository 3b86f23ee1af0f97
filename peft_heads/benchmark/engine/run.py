"""One run of the benchmark, and the beginning that several runs share."""

from __future__ import annotations

import dataclasses
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
from typing import Any

import filelock
from accelerate import PartialState
from transformers import AutoConfig, Trainer

from ...adapter_folder.atomic import write_atomically
from ...adapter_folder.checkpoints import last_complete_checkpoint
from ...backbones.drop_path import has_drop_path
from ...data.augmentation import Augmentation
from ...data.preprocessing import Preprocessing
from ...data.suites import SUITES
from ...data.tasks import Task
from ...methods import MethodSettings, check_method
from ...tuners.common.options import HEAD_SETTINGS
from ..recipes import Recipe
from ..records.effective import with_warmup
from ..records.record import Environment, Run, RunResult, RunSpec
from ..records.results import find_result, write_result
from .training import Places, Training, checkpoint_of


logger = logging.getLogger(__name__)

TRUNK, IN_USE = "trunk-", ".use"  # how the folders of shared beginnings are called, and their second locks


def make_spec(
    task: Task,
    method: dict[str, Any],
    recipe: Recipe,
    backbone: str,
    seed: int,
    *,
    final: bool,
    shots: int | None = None,
    list_seed: int | None = None,
) -> RunSpec:
    """The run of a method on a task by the protocol: on validation images, or on test images (`final`).

    Args:
        task: Task of `data.tasks`.
        method: `{"name": …}` and settings, as [`MethodSettings.from_json`] reads them.
        recipe: Recipe of the training.
        backbone: Checkpoint: a folder, a repository of the Hub, or `SHIPPED`, the small ViT of this package.
        seed: Seed of everything random.
        final: Whether the run is reported, and not one to choose a setting by.
        shots, list_seed: Images per class and number of the list, in a few-shot task.

    Raises:
        ValueError: The method's settings contradict each other, or there is no such checkpoint.
    """
    settings, given = recipe.settings(), MethodSettings.from_json(method)
    check_method(with_warmup(given, settings))
    try:
        config = AutoConfig.from_pretrained(checkpoint_of(backbone), trust_remote_code=False)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"no checkpoint {backbone!r}: {error}") from error
    if recipe.drop_path:
        settings["drop_path_by"] = "config" if has_drop_path(config) else "hooks"
    size = {"size": config.image_size} if isinstance(getattr(config, "image_size", None), int) else {}
    augmentation = Augmentation(**recipe.augmentation | size).to_dict() if recipe.augmentation else None
    suite = SUITES[task.suite]
    train_split, eval_split = suite.reported if final else suite.chosen_by
    return RunSpec(
        suite=task.suite,
        task=task.name,
        method=given,
        backbone=os.fspath(backbone),
        seed=seed,
        train_split=train_split,
        eval_split=eval_split,
        epochs=recipe.epochs,
        recipe=settings,
        preprocessing={
            "train": Preprocessing(**recipe.train_images | size).to_dict(),
            "eval": Preprocessing(**recipe.eval_images | size).to_dict(),
            "augmentation": augmentation,
        },
        shots=shots,
        list_seed=list_seed,
    )


def run(
    spec: RunSpec,
    places: Places,
    *,
    begin_with: str | os.PathLike | None = None,
    test_every: int = 0,
    also: tuple[RunSpec, ...] = (),
) -> tuple[Run, bool]:
    """Train and evaluate, unless the run has a result; a killed run goes on where it has stopped.

    All processes call this, and the first writes.

    Args:
        spec: The run.
        places: Folders of data and results.
        begin_with: A checkpoint of the same training, from `train_trunk`.
        test_every: Number of epochs after which the evaluation split is looked at, for `best_on_test`; 0 for never.
        also: Runs without a result that differ in `eval_split` alone (equal `training_key`). They are trained with this
            one and evaluated separately, each with its own result file. Ignored if this run has its result.

    Returns:
        The run, whose file is written, and whether it was trained now.

    Raises:
        ValueError, FileNotFoundError: Data, checkpoint or method are not as they should be.
    """
    training = Training(spec, places)
    environment = training.environment()
    # a result of uncommitted code counts only while the code is not committed
    found = find_result(places.output_dir, spec, environment, unofficial=bool(environment.dirty))
    PartialState().wait_for_everyone()  # no process writes before all have looked
    if found is not None:
        return found, False
    # before the training, since the code may change meanwhile
    twins = [(twin := Training(other, places), twin.environment()) for other in also]
    folder, path = places.work / spec.run_id, None
    with _alone(folder):
        _begin(folder, environment)
        trainer = training.trainer(folder, test_every)
        checkpoint = last_complete_checkpoint(folder) or begin_with
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))
        except KeyboardInterrupt as interrupt:
            state = trainer.state
            raise KeyboardInterrupt(
                f"step {state.global_step:,} of {state.max_steps:,} of {spec.run_id}"
            ) from interrupt
        result = training.result(trainer)
        for twin, where in twins:
            _add_twin(twin, where, trainer, result)
        if trainer.is_world_process_zero():
            path = write_result(places.output_dir, spec, result, environment)
            shutil.rmtree(folder, ignore_errors=True)
    PartialState().wait_for_everyone()
    return Run(spec, result, environment, path), True


def _add_twin(twin: Training, environment: Environment, trainer: Trainer, result: RunResult) -> None:
    """Evaluate the same training on another run's images. If they are at fault, this run does not suffer."""
    try:
        accuracy = twin.accuracy(trainer)
    except (ValueError, OSError) as error:
        if PartialState().num_processes > 1:
            raise
        logger.warning("%s is left for a training of its own: %s", twin.spec.run_id, error)
        return
    root = twin.places.output_dir
    if trainer.is_world_process_zero() and find_result(root, twin.spec, unofficial=bool(environment.dirty)) is None:
        write_result(root, twin.spec, dataclasses.replace(result, accuracy=accuracy, best_on_test=None), environment)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
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


def _begin(folder: Path, environment: Environment) -> None:
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
    with _alone(folder):
        _begin(folder, training.environment())
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
    with _alone(_use_of(trunk_folder(spec, places))):
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
            with _alone(_use_of(folder)), _alone(folder):
                if folder.exists():
                    logger.warning("%s, which a killed sweep has left behind, is deleted", folder)
                    shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OSError, NotImplementedError):
            continue  # in use, or on a disk that knows no locks


def _use_of(folder: Path) -> Path:
    """The name by which a trunk is locked while runs begin with it."""
    return folder.with_name(folder.name + IN_USE)
