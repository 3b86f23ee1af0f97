"""One run of the benchmark: from its setting to the file of its result."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, Trainer

from ...adapter_folder.checkpoints import last_complete_checkpoint
from ...backbones.drop_path import has_drop_path
from ...data.augmentation import Augmentation
from ...data.preprocessing import Preprocessing
from ...data.suites import SUITES
from ...data.tasks import Task
from ...methods import MethodSettings, check_method
from ..recipes import Recipe
from ..records.effective import with_warmup
from ..records.results import find_result, write_result
from ..records.run_record import Environment, Run, RunResult, RunSpec
from .places import Places
from .training import Training, checkpoint_of
from .work_folder import alone, begin


logger = logging.getLogger(__name__)


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
    with alone(folder):
        begin(folder, environment)
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
