"""One JSON file per run: the specification, the result and the environment."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...adapter_folder.atomic import write_atomically
from ...methods import MethodSettings
from .effective import deviations, effective_method
from .schema import canonical_json, check_fields, from_mapping, jsonable


FORMAT = 1
FOLDERS = {True: "official", False: "unofficial"}
CONTENT = "content_sha256"  # key in a part of `data_fingerprint`; results of earlier versions have none


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run: everything that is decided before it starts.

    Args:
        suite, task: Names of the suite and the task in `data.tasks`.
        method: Name of the method, and the settings given for it, for example `ne`, `criterion`, `scale`.
        backbone: Checkpoint: a repository of the Hub or a folder.
        seed: Seed of initialisation, order and augmentation.
        train_split, eval_split: Splits, such as `"train800"` and `"val200"`, `"train800val200"` and `"test"`.
        epochs: Number of epochs.
        recipe: Optimizer, schedule, batch size, `drop_path`, …
        preprocessing: `resize`, `normalization`, augmentation, …
        shots, list_seed: Images per class and number of the published list, in a few-shot task.

    Raises:
        ValueError: A field has the wrong type, or a name that makes no file name.
    """

    suite: str
    task: str
    method: MethodSettings
    backbone: str
    seed: int
    train_split: str
    eval_split: str
    epochs: int
    recipe: dict[str, Any]
    preprocessing: dict[str, Any]
    shots: int | None = None
    list_seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in (("suite", self.suite), ("task", self.task)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
                raise ValueError(f"{name} must be letters, digits and _ . - (it names a folder); got {value!r}")

    @property
    def run_id(self) -> str:
        """A readable name and ten digits of the SHA-256 of the canonical JSON: equal exactly for equal runs."""
        digest = hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()[:10]
        words = [
            describe_method(self.method.to_json()),
            os.path.basename(self.backbone.rstrip("/\\")),
            self.eval_split,
        ]
        if self.shots is not None:
            words.append(f"{self.shots}shot-list{self.list_seed}")
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join([*words, f"seed{self.seed}"])).strip("-")
        return f"{slug[:100]}-{digest}"

    def to_json(self) -> dict[str, Any]:
        return jsonable({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_json(cls, data: Any) -> RunSpec:
        return from_mapping(cls, data)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run.

    Args:
        accuracy: Accuracy in [0, 1] on the run's `eval_split`, after the *last* epoch. None only where `partial`.
        epoch_losses: Mean training loss of every epoch; None where it was not finite.
        seconds: Duration of training, without evaluation.
        peak_memory_bytes: Peak memory of the accelerator; None where there is none.
        trained_parameters: Number of trained parameters, the classifier included.
        adapter_bytes, head_bytes: Bytes in the file: of the adapter alone, as the papers count, and of the classifier.
        masks: `{projection: one bool per head}`, True = active. Empty where the method has no head masks.
        head_scores: `{projection: one score per head}` by the run's criterion, or None.
        best_on_test: The best accuracy over all epochs on the test split: a labelled extra, never the result.
        partial: Whether the run was interrupted, or had fewer steps or images than the recipe says.
    """

    accuracy: float | None
    epoch_losses: list[float | None]
    seconds: float
    peak_memory_bytes: int | None
    trained_parameters: int
    adapter_bytes: int
    head_bytes: int
    masks: dict[str, list[bool]]
    head_scores: dict[str, list[float | None]] | None = None
    best_on_test: float | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.accuracy is None and not self.partial:
            raise ValueError("accuracy is missing: only a partial run may come without")
        for name in ("accuracy", "best_on_test"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value!r}")

    def to_json(self) -> dict[str, Any]:
        return jsonable(asdict(self))

    @classmethod
    def from_json(cls, data: Any) -> RunResult:
        return from_mapping(cls, data)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The environment of a run. `environment.describe_environment` fills it in.

    Args:
        versions: `{"peft_heads": …, "torch": …, "python": …, …}`, plugins included.
        commit, dirty: Commit of the checkout that the package was imported from, and whether it was changed; both None
            for an installed package.
        data_fingerprint: Hashes that tell data apart, such as `{"train": hash, "test": hash}`, by `on_different_data`.
        image_format: `"JPEG"`, `"PNG"`, …
        checkpoint_revision: The backbone's commit on the Hub, or a hash of its weights.
        device: The device, in words.
        num_processes: Number of processes of the training.
    """

    versions: dict[str, str]
    commit: str | None
    dirty: bool | None
    data_fingerprint: dict[str, Any]
    image_format: str | None
    checkpoint_revision: str | None
    device: str
    num_processes: int = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def to_json(self) -> dict[str, Any]:
        return jsonable(asdict(self))

    @classmethod
    def from_json(cls, data: Any) -> Environment:
        return from_mapping(cls, data)


@dataclass(frozen=True)
class Run:
    """One result file."""

    spec: RunSpec
    result: RunResult
    environment: Environment
    path: Path | None = None

    @property
    def official(self) -> bool:
        return is_official(self.result, self.environment)


def is_official(result: RunResult, environment: Environment) -> bool:
    """Whether a result is that of a complete run of committed (or installed) code, so that it can be reproduced.

    This says nothing about the recipe: see `effective.deviations`.
    """
    return not result.partial and not environment.dirty


def result_path(root: str | os.PathLike, spec: RunSpec, official: bool = True) -> Path:
    """The path of a run's result: `root/official/<suite>/<task>/<run_id>.json`."""
    return Path(root) / FOLDERS[official] / spec.suite / spec.task / f"{spec.run_id}.json"


def write_result(root: str | os.PathLike, spec: RunSpec, result: RunResult, environment: Environment) -> Path:
    """Write one result, complete or not at all; dirty or partial runs go to `root/unofficial`.

    For human readers the file also says which settings of the method were in effect, and where the run departs from the
    recipe of its suite. Both follow from the rest and are not read.

    Raises:
        ValueError: There is an official result of this run already; it is never replaced.
    """
    official = is_official(result, environment)
    path = result_path(root, spec, official)
    if official and path.exists():
        raise ValueError(f"{path} holds a result of this very run already and is not replaced; move it away first")
    parts = {"spec": spec.to_json(), "result": result.to_json(), "environment": environment.to_json()}
    said = {"effective_method": _effective(spec), "deviations": deviations(spec, environment)}
    text = json.dumps({"format": FORMAT, "run_id": spec.run_id, **parts, **said}, indent=2, allow_nan=False)
    return write_atomically(path, text + "\n")


def read_result(path: str | os.PathLike) -> Run:
    """Read one file. Raises ValueError naming the file and the field that is wrong."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"no result of a run (format must be {FORMAT}, is {found!r})")
        parts = []
        for name, part in (("spec", RunSpec), ("result", RunResult), ("environment", Environment)):
            if name not in data:
                raise ValueError(f"{name} is missing")
            try:
                parts.append(part.from_json(data[name]))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        run = Run(*parts, path)
        if data.get("run_id") != run.spec.run_id:
            raise ValueError(
                f"run_id is {data.get('run_id')!r}, but the spec's is {run.spec.run_id!r}: one was edited"
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return run


def read_results(root: str | os.PathLike, unofficial: bool = False) -> list[Run]:
    """All results under a folder, sorted by path.

    Args:
        root: The folder given to `write_result`.
        unofficial: Whether dirty and partial ones are read as well (`run.official` tells them apart).

    Raises:
        FileNotFoundError: No such folder.
        ValueError: A file is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of results {str(root)!r}")
    folders = [FOLDERS[True]] + ([FOLDERS[False]] if unofficial else [])
    return [read_result(path) for folder in folders for path in sorted((root / folder).rglob("*.json"))]


def find_result(
    root: str | os.PathLike, spec: RunSpec, environment: Environment | None = None, unofficial: bool = False
) -> Run | None:
    """The finished run of this spec, which need not be repeated; None if there is none.

    Args:
        root: The folder given to `write_result`.
        spec: The run.
        environment: If given, the finished run must have been on the same data and checkpoint.
        unofficial: Whether a finished run of uncommitted code is enough.

    Raises:
        ValueError: There is one, but on other images, another image format or another checkpoint revision.
    """
    for official in (True, False) if unofficial else (True,):
        path = result_path(root, spec, official)
        if not path.is_file():
            continue
        run = read_result(path)
        if run.result.partial:
            continue
        for name in ("data_fingerprint", "image_format", "checkpoint_revision"):
            if environment is None:
                break
            then, now = getattr(run.environment, name), jsonable(getattr(environment, name))
            if on_different_data([then, now]) if name == "data_fingerprint" else then != now:
                raise ValueError(
                    f"{path} is this run with {name} {then!r}, now it is {now!r}; give these results another folder"
                )
        return run
    return None


def on_different_data(fingerprints: list[dict[str, Any]]) -> bool:
    """Whether the `data_fingerprint` of a run differs from that of the others.

    Results of earlier versions have no hash of the images' content; their names, labels and sizes are compared.
    """
    plain = [_without_content(fingerprint) for fingerprint in fingerprints]
    full = [x for x, without in zip(fingerprints, plain, strict=True) if x != without]
    return any(len(set(map(canonical_json, found))) > 1 for found in (plain, full))


def _without_content(fingerprint: dict[str, Any]) -> dict[str, Any]:
    parts = fingerprint.items()
    return {k: {x: y for x, y in v.items() if x != CONTENT} if isinstance(v, dict) else v for k, v in parts}


def _effective(spec: RunSpec) -> dict[str, Any]:
    try:
        return jsonable(effective_method(spec.method.to_json(), spec.recipe))
    except (ValueError, KeyError):
        return jsonable(spec.method)  # a method that this version does not know


def describe_method(method: dict[str, Any]) -> str:
    """A method in words, the same for equal settings.

    Example:
        >>> describe_method({"name": "head-masked-lora", "ne": 1.0, "criterion": "negative", "joint": None})
        'head-masked-lora criterion=negative ne=1'
    """
    settings = json.loads(canonical_json(method)).items()
    settings = (f"{key}={value}" for key, value in settings if key != "name" and value is not None)
    return " ".join([method["name"], *settings])
