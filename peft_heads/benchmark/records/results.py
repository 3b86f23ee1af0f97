"""One JSON file per run: written, read and found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...adapter_folder.atomic import write_atomically
from .effective import deviations, effective_method
from .run_record import Environment, Run, RunResult, RunSpec, is_official, on_different_data
from .schema import jsonable


FORMAT = 1
FOLDERS = {True: "official", False: "unofficial"}


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


def _effective(spec: RunSpec) -> dict[str, Any]:
    try:
        return jsonable(effective_method(spec.method.to_json(), spec.recipe))
    except (ValueError, KeyError):
        return jsonable(spec.method)  # a method that this version does not know
