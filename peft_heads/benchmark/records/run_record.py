"""The record of one run: specification, result and environment."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...methods import MethodSettings
from .schema import canonical_json, check_fields, from_mapping, jsonable


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


def describe_method(method: dict[str, Any]) -> str:
    """A method in words, the same for equal settings.

    Example:
        >>> describe_method({"name": "head-masked-lora", "ne": 1.0, "criterion": "negative", "joint": None})
        'head-masked-lora criterion=negative ne=1'
    """
    settings = json.loads(canonical_json(method)).items()
    settings = (f"{key}={value}" for key, value in settings if key != "name" and value is not None)
    return " ".join([method["name"], *settings])
