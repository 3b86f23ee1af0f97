"""Which checkpoints of a run are complete, and which are its own.

Trainer writes, and deletes, them file by file, so a killed run leaves parts.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


# Any one of them: an adapter (those not named "default" lie in folders of their own), a whole model, FSDP's.
WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_0",
)
# Any one of them: an ordinary optimizer's state, FSDP's (in one file, in several), DeepSpeed's.
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")
# What a model whose heads and neurons are switched off learns from, see `scoring.teaching`; written after all others.
TEACHER_FILE = "teacher.safetensors"
# Says in an output folder whose run it is. Trainer uploads no file whose name begins with an underscore.
RUN_FILE = "_run.json"
# Under this name a checkpoint's trainer_state.json says the same, see `cli.output_folder.TrainingRun`.
RUN_STATE = "TrainingRun"


def last_complete_checkpoint(output_dir: str | os.PathLike, save_only_model: bool = False) -> str | None:
    """The newest checkpoint that training can be resumed from, to be used in place of `get_last_checkpoint`.

    A run that was killed while it saved leaves a newest checkpoint that lacks files or has half-written ones. Such
    checkpoints are skipped with a warning that names the file; nothing is deleted or changed, and the resumed run
    writes them again. For adapters and whole models, also of FSDP and DeepSpeed.

    `peft-heads train` gives each run an id, which its output folder and its checkpoints hold: a checkpoint of another
    run is skipped with a warning that names it. One without an id, as a plain Trainer writes it, counts as the user's
    own. What cannot be told then: whether the files of a folder that a run wrote over another run's are all of the same
    run; give each run a folder of its own.

    Args:
        output_dir: Trainer's output folder, with the folders `checkpoint-N`.
        save_only_model: As in `TrainingArguments`: checkpoints hold the state of optimizer, scheduler and random
            numbers unless it was set.

    Returns:
        The checkpoint's path; None if there is none, or no such folder.

    Example:

        ```py
        >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
        ```
    """
    foreign = foreign_checkpoints(output_dir, run_of_folder(output_dir))
    for folder in checkpoint_folders(output_dir):
        if folder in foreign:
            warnings.warn(f"checkpoint {folder} is of another run ({foreign[folder]}) and skipped")
            continue
        fault = checkpoint_fault(folder, save_only_model)
        if fault is None:
            return str(folder)
        warnings.warn(f"checkpoint {folder} is incomplete and skipped: {fault}")
    return None


def checkpoint_folders(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-N` in `output_dir`, the highest N first; none if there is no such folder."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _step_of(path) is not None]
    return sorted(folders, key=_step_of, reverse=True)


def foreign_checkpoints(output_dir: str | os.PathLike, run: str | None) -> dict[Path, str]:
    """`{checkpoint: its run}` of those in `output_dir` that are of another run than `run`; none if that is None."""
    runs = {folder: run_of(folder) for folder in checkpoint_folders(output_dir)} if run is not None else {}
    return {folder: other for folder, other in runs.items() if other is not None and other != run}


def run_of_folder(output_dir: str | os.PathLike) -> str | None:
    """The id of the run that an output folder belongs to; None if no run has said so."""
    return _read_id(Path(output_dir) / RUN_FILE)


def run_of(checkpoint: str | os.PathLike) -> str | None:
    """The id of the run that wrote a checkpoint; None if it holds none."""
    return _read_id(Path(checkpoint) / "trainer_state.json", "stateful_callbacks", RUN_STATE, "args")


def checkpoint_fault(folder: str | os.PathLike, save_only_model: bool = False) -> str | None:
    """What keeps training from being resumed from a checkpoint.

    Files are looked at as far as that is quick and safe: weights by header and size, torch's files by the directory
    at their end (nothing is unpickled), JSON by reading it. Trainer writes `trainer_state.json` last, so a file that
    only some runs have (`scaler.pt`) and that was still to be written is told by its absence.

    Args:
        folder: The checkpoint. The number in the name `checkpoint-N` must be the step of its trainer state.
        save_only_model: Whether it may lack the state of optimizer, scheduler and random numbers.

    Returns:
        The first fault, naming the file; None if the checkpoint is complete.
    """
    folder = Path(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        error = read_error(path)
        if error is not None:
            return f"{path.relative_to(folder)} cannot be read ({error})"
    missing = _missing_file(folder, save_only_model)
    if missing is not None:
        return f"{missing} is missing"
    return _step_fault(folder)


def read_error(path: Path) -> str | None:
    """Why a file of weights, of torch or of JSON cannot be read; None if it can, or is of another kind."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the file's size with its header
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path):
                pass
        elif path.suffix == ".json":
            content = json.loads(path.read_text("utf-8"))
            if path.name.endswith(".index.json"):
                files = content["weight_map"].values()
                if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
                    return "its weight_map names no files"
    except (OSError, ValueError, NotImplementedError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    except (KeyError, TypeError, AttributeError):
        return "it has no weight_map"
    return None


def _missing_file(folder: Path, save_only_model: bool) -> str | None:
    """The first file that should be there, in the order in which Trainer writes them."""
    weights = [path for path in folder.rglob("*") if path.name in WEIGHTS]
    if not weights:
        return "adapter_model.safetensors or model.safetensors"
    expected = [sibling for path in weights for sibling in _siblings(path)]
    if not save_only_model:
        if not any((folder / name).exists() for name in OPTIMIZERS):
            return "optimizer.pt"
        if not (folder / "latest").exists():  # DeepSpeed may keep the scheduler's state as well
            expected.append(folder / "scheduler.pt")
        expected += [folder / name for name in _rng_states(folder)]
    expected.append(folder / "trainer_state.json")
    if _has_teacher(folder / "trainer_state.json"):
        expected.append(folder / TEACHER_FILE)
    return next((str(path.relative_to(folder)) for path in expected if not path.is_file()), None)


def _has_teacher(trainer_state: Path) -> bool:
    """Whether a checkpoint's trainer state says that the model has a teacher."""
    if not trainer_state.is_file():
        return False
    callbacks = _read_mapping(trainer_state).get("stateful_callbacks")
    entries = callbacks.get("TaylorHeadScorer") if isinstance(callbacks, dict) else None
    for entry in entries if isinstance(entries, list) else [entries]:
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        progress = attributes.get("progress") if isinstance(attributes, dict) else None
        if isinstance(progress, dict) and progress.get("teacher"):
            return True
    return False


def _siblings(weights: Path) -> list[Path]:
    """What must stand beside a file of weights: an adapter's configuration, the parts that an index lists."""
    if weights.name.startswith("adapter_model."):
        return [weights.with_name("adapter_config.json")]
    if weights.name.endswith(".index.json"):
        return [weights.with_name(name) for name in _read_mapping(weights).get("weight_map", {}).values()]
    return []


def _rng_states(folder: Path) -> list[str]:
    """Names of the states of random numbers: one file, or one per process where there were several.

    How many there were is nowhere recorded; what can be known is that they were at least two, and without a gap.
    """
    matches = [re.fullmatch(r"rng_state_(\d+)\.pth", path.name) for path in folder.iterdir()]
    ranks = [int(match[1]) for match in matches if match]
    if not ranks or (folder / "rng_state.pth").is_file():
        return ["rng_state.pth"]
    return [f"rng_state_{rank}.pth" for rank in range(max(2, 1 + max(ranks)))]


def _step_fault(folder: Path) -> str | None:
    step = _read_mapping(folder / "trainer_state.json").get("global_step")
    if not isinstance(step, int):
        return "trainer_state.json is not Trainer's (it has no global_step)"
    if _step_of(folder) not in (None, step):
        return f"trainer_state.json is that of step {step}"
    return None


def _read_id(path: Path, *keys: str) -> str | None:
    """`run_id` below these keys of a JSON file; None if it is not there, or the file cannot be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    for key in (*keys, "run_id"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, str) else None


def _read_mapping(path: Path) -> dict:
    content = json.loads(path.read_text("utf-8"))
    return content if isinstance(content, dict) else {}


def _step_of(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None
