"""The output folder of `peft-heads train`: which run owns it, and what becomes of an earlier run's files."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..adapter_folder.atomic import write_atomically
from ..adapter_folder.checkpoints import (
    RUN_FILE,
    RUN_STATE,
    WEIGHTS,
    checkpoint_folders,
    foreign_checkpoints,
    run_of,
    run_of_folder,
)


logger = logging.getLogger(__name__)

# Something was trained in a folder that holds one of these, or checkpoints.
TRAINED = ("adapter_config.json", *WEIGHTS)
# Other files that a training writes. The model card stays: PEFT keeps what users have written in it.
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
# Key of the run's file: what was moved into the folders `_replaced`. Other files in such a folder are the user's.
REPLACED_FILES = "replaced"


class TrainingRun(TrainerCallback, ExportableState):
    """Writes the run's id into every checkpoint, in `trainer_state.json`, which Trainer writes last."""

    def __init__(self, run_id: str = "") -> None:
        self.run_id = run_id

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # Trainer expects it in the state of a checkpoint that another script has written, too
        state.stateful_callbacks.setdefault(RUN_STATE, self.state())

    def state(self) -> dict:
        return {"args": {"run_id": self.run_id}, "attributes": {}}


def check_output_folder(
    args: TrainingArguments, checkpoint: str | None, inputs: Mapping[str, str | None] | None = None
) -> None:
    """Raise ValueError if a training would write over an earlier one, and the user has not said so.

    Also raised if it would move or delete what it reads itself: `--overwrite_output_dir` in the base model's folder.

    Args:
        args: Arguments with `output_dir` and `overwrite_output_dir`.
        checkpoint: Checkpoint from which training is resumed, if any.
        inputs: `{argument: value}` of everything else that the run reads. Values that are no local path are ignored.
    """
    folder = Path(args.output_dir)
    own = _lies_in(checkpoint, folder)
    if own and args.overwrite_output_dir:
        raise ValueError(
            f"--resume_from_checkpoint goes on with what lies in {folder}, and --overwrite_output_dir replaces it: give "
            "one of them"
        )
    run, earlier = _runs(checkpoint, folder)
    resumed = own or (run is not None and run == earlier)
    if not resumed and not args.overwrite_output_dir and (found := trained_files(folder)):
        names = ", ".join(path.name for path in found[:3]) + (", …" if len(found) > 3 else "")
        raise ValueError(
            f"{folder} holds an earlier training ({names}), and nothing was changed: name another --output_dir; or "
            "--resume_from_checkpoint true goes on with it, --overwrite_output_dir replaces it"
        )
    given_up = _given_up(folder, run or earlier, args.overwrite_output_dir)
    for name, value in {**(inputs or {}), "--resume_from_checkpoint": checkpoint}.items():
        if given_up and value is not None and os.path.exists(value) and (lost := _lost(Path(value), given_up)):
            raise ValueError(
                f"{name} {value} needs {lost}, which this run would take away as a part of the earlier training in "
                f"{folder}, and nothing was changed: name another --output_dir, or copy {value} elsewhere first"
            )


def claim_output_folder(args: TrainingArguments, checkpoint: str | None) -> str:
    """Claim the folder for this run, just before it trains; returns the run's id, which a resumed run keeps.

    What `--overwrite_output_dir` replaces is moved to a folder `_replaced` in it, and deleted by `forget_replaced`.
    Checkpoints of other runs, which a resumed run could write over, are moved to `_foreign`, and stay there.
    """
    folder = Path(args.output_dir)
    run, earlier = _runs(checkpoint, folder)
    if run is not None and earlier not in (None, run) and _lies_in(checkpoint, folder):
        warnings.warn(f"checkpoint {checkpoint} is of another run ({run}) than {folder} ({earlier}), which now is its")
    run = run or earlier or f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
    replaced = _replaced(folder, run, args.overwrite_output_dir)
    if args.overwrite_output_dir and (found := _files_of_training(folder)):
        there = _move(found, folder, REPLACED)
        replaced[there.name] = [path.name for path in found]
        logger.warning("an earlier training lies in %s until this one is saved, and is deleted then", there)
    if foreign := foreign_checkpoints(folder, run):
        there = _move(list(foreign), folder, FOREIGN)
        logger.warning("%s: of another run, moved to %s", ", ".join(path.name for path in foreign), there)
    _write_run(folder, run, replaced)
    return run


def forget_replaced(output_dir: str | os.PathLike) -> None:
    """Delete what `--overwrite_output_dir` has replaced, and nothing else, once the new training is saved."""
    folder = Path(output_dir)
    run = run_of_folder(folder)
    replaced = _replaced(folder, run)
    for name, moved in replaced.items():
        for path in (folder / name / file for file in moved):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        logger.warning("%s, an earlier training, is deleted", folder / name)
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()
    if replaced:
        _write_run(folder, run, {})


def trained_files(folder: str | os.PathLike) -> list[Path]:
    """Weights, adapter and checkpoints in a folder."""
    folder = Path(folder)
    names = [folder / name for name in TRAINED if (folder / name).exists()]
    return names + checkpoint_folders(folder)


def _files_of_training(folder: Path) -> list[Path]:
    beside = (path for pattern in BESIDE for path in folder.glob(pattern))
    return sorted({*trained_files(folder), *beside})


def _lies_in(checkpoint: str | None, folder: Path) -> bool:
    """Whether a checkpoint lies in a folder, by its name or by its link's target."""
    if checkpoint is None:
        return False
    path = Path(checkpoint)
    return folder.resolve() in (path.resolve().parent, Path(os.path.abspath(path)).parent.resolve())


def _runs(checkpoint: str | None, folder: Path) -> tuple[str | None, str | None]:
    """Ids of the checkpoint's run and of the folder's run; both None if no training is resumed."""
    return (None, None) if checkpoint is None else (run_of(checkpoint), run_of_folder(folder))


def _given_up(folder: Path, run: str | None, overwrite: bool) -> list[Path]:
    """Files that `claim_output_folder` moves and `forget_replaced` deletes."""
    moved = _files_of_training(folder) if overwrite else list(foreign_checkpoints(folder, run))
    replaced = _replaced(folder, run, overwrite)
    return moved + [folder / name / file for name, files in replaced.items() for file in files]


def _lost(needed: Path, given_up: list[Path]) -> Path | None:
    """The path that is `needed`, holds it, or is one of its files; links are followed. None if there is none."""
    places = {place: path for path in given_up for place in (path.parent.resolve() / path.name, path.resolve())}
    return next((places[above] for path in _parts(needed) for above in (path, *path.parents) if above in places), None)


def _parts(path: Path) -> Iterator[Path]:
    real = path.resolve()
    yield Path(os.path.abspath(path)).parent.resolve() / path.name
    yield real
    if real.is_dir():  # a model's files may be links
        yield from (child.resolve() if child.is_symlink() else child for child in real.iterdir())


def _replaced(folder: Path, run: str | None, overwrite: bool = False) -> dict[str, list[str]]:
    """`{folder: names}` of files moved there for this run, or for any run if its training is replaced as well."""
    if not overwrite and (run is None or run != run_of_folder(folder)):
        return {}
    try:
        replaced = json.loads((folder / RUN_FILE).read_text("utf-8"))[REPLACED_FILES]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: files for name, files in replaced.items() if _is_ours(folder / name)}


def _is_ours(path: Path) -> bool:
    """Whether a path is a folder with a name that `_move` chooses, and no link was put in its place."""
    return re.fullmatch(rf"{REPLACED}(-\d+)?", path.name) is not None and path.is_dir() and not path.is_symlink()


def _write_run(folder: Path, run: str | None, replaced: dict[str, list[str]]) -> None:
    content = {"run_id": run} | ({REPLACED_FILES: replaced} if replaced else {})
    write_atomically(folder / RUN_FILE, json.dumps(content) + "\n")


def _move(paths: list[Path], folder: Path, name: str) -> Path:
    """Move files into a new folder in `folder`, and return it."""
    target, number = folder / name, 1
    while os.path.lexists(target):
        number += 1
        target = folder / f"{name}-{number}"
    target.mkdir()
    for path in paths:
        os.rename(path, target / path.name)
    return target
