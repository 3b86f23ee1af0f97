"""The output folder of `peft-heads train`: whose run it is, and what becomes of an earlier one's files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
import warnings
from datetime import datetime
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..atomic import write_atomically
from ..checkpoints import (
    RUN_FILE,
    RUN_STATE,
    WEIGHTS,
    checkpoint_folders,
    foreign_checkpoints,
    run_of,
    run_of_folder,
)


logger = logging.getLogger(__name__)

# By these, and by checkpoints, a folder shows that something was trained there.
TRAINED = ("adapter_config.json", *WEIGHTS)
# What a training writes beside. The model card stays: PEFT keeps what users have written in it.
BESIDE = (
    "adapter_model*.safetensors",
    "model-*-of-*.safetensors",
    "pytorch_model-*-of-*.bin",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "labels.json",
    "head_scores.json",
    "head_scores.png",
    "trainer_state.json",
    "training_args.bin",
    "*_results.json",
)
# Trainer neither uploads nor deletes names with an underscore.
REPLACED, FOREIGN = "_replaced", "_foreign"


class TrainingRun(TrainerCallback, ExportableState):
    """Writes the run's id into every checkpoint, in `trainer_state.json`, which Trainer writes last."""

    def __init__(self, run_id: str = "") -> None:
        self.run_id = run_id

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # Trainer expects it in the state of a checkpoint that another script has written, too
        state.stateful_callbacks.setdefault(RUN_STATE, self.state())

    def state(self) -> dict:
        return {"args": {"run_id": self.run_id}, "attributes": {}}


def check_output_folder(args: TrainingArguments, checkpoint: str | None) -> None:
    """Raise ValueError if a training would write over an earlier one of which the user has said nothing.

    Args:
        args: With `output_dir` and `overwrite_output_dir`.
        checkpoint: From which training is resumed.
    """
    folder = Path(args.output_dir)
    own = checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve()
    if own and args.overwrite_output_dir:
        raise ValueError(
            f"--resume_from_checkpoint goes on with what lies in {folder}, and --overwrite_output_dir replaces it: give "
            "one of them"
        )
    found = [] if own or args.overwrite_output_dir else trained_files(folder)
    if checkpoint is not None:
        run, other = run_of(checkpoint), run_of_folder(folder)
        found = found if run is not None and other not in (None, run) else []
    if found:
        names = ", ".join(path.name for path in found[:3]) + (", …" if len(found) > 3 else "")
        raise ValueError(
            f"{folder} holds an earlier training ({names}), and nothing was changed: name another --output_dir; or "
            "--resume_from_checkpoint true goes on with it, --overwrite_output_dir replaces it"
        )


def claim_output_folder(args: TrainingArguments, checkpoint: str | None) -> str:
    """Make the folder this run's, just before it trains; gives the run's id, which a resumed run keeps.

    What `--overwrite_output_dir` replaces is moved to a folder `_replaced` in it, and deleted by `forget_replaced`.
    Checkpoints of other runs, which a resumed run could write over, are moved to `_foreign`, and stay there.
    """
    folder = Path(args.output_dir)
    run, earlier = (None, None) if checkpoint is None else (run_of(checkpoint), run_of_folder(folder))
    if run is not None and earlier not in (None, run) and Path(checkpoint).resolve().parent == folder.resolve():
        warnings.warn(f"checkpoint {checkpoint} is of another run ({run}) than {folder} ({earlier}), which now is its")
    run = run or earlier or f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
    if args.overwrite_output_dir and (found := _files_of_training(folder)):
        there = _move(found, folder, REPLACED)
        logger.warning("an earlier training lies in %s until this one is saved, and is deleted then", there)
    if foreign := foreign_checkpoints(folder, run):
        there = _move(list(foreign), folder, FOREIGN)
        logger.warning("%s: of another run, moved to %s", ", ".join(path.name for path in foreign), there)
    write_atomically(folder / RUN_FILE, json.dumps({"run_id": run}) + "\n")
    return run


def forget_replaced(output_dir: str | os.PathLike) -> None:
    """Delete what `--overwrite_output_dir` has replaced, once the new training is saved."""
    for path in sorted(Path(output_dir).glob(f"{REPLACED}*")):
        if path.is_dir():
            shutil.rmtree(path)
            logger.warning("%s, an earlier training, is deleted", path)


def trained_files(folder: str | os.PathLike) -> list[Path]:
    """Weights, adapter and checkpoints in a folder."""
    folder = Path(folder)
    names = [folder / name for name in TRAINED if (folder / name).exists()]
    return names + checkpoint_folders(folder)


def _files_of_training(folder: Path) -> list[Path]:
    beside = (path for pattern in BESIDE for path in folder.glob(pattern))
    return sorted({*trained_files(folder), *beside})


def _move(paths: list[Path], folder: Path, name: str) -> Path:
    """Into a new folder in `folder`."""
    target, number = folder / name, 1
    while target.exists():
        number += 1
        target = folder / f"{name}-{number}"
    target.mkdir()
    for path in paths:
        os.rename(path, target / path.name)
    return target
