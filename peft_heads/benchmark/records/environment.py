"""The environment of a run: versions, the commit of this package, the device."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...plugins import loaded_plugins
from .run_record import Environment


LIBRARIES = ("peft-heads", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pillow", "kornia")


def describe_environment(
    *,
    data_fingerprint: dict[str, Any],
    image_format: str | None,
    checkpoint_revision: str | None,
    device: torch.device | str = "cpu",
    num_processes: int = 1,
) -> Environment:
    """The environment of a run in this process; versions, commit and device name are looked up here."""
    commit, dirty = source_state()
    return Environment(
        versions=installed_versions(),
        commit=commit,
        dirty=dirty,
        data_fingerprint=data_fingerprint,
        image_format=image_format,
        checkpoint_revision=checkpoint_revision,
        device=describe_device(device),
        num_processes=num_processes,
    )


def installed_versions() -> dict[str, str]:
    """`{library or plugin: version}` of what the numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a checkout that is imported from its folder
            versions[name] = "not installed"
    return versions | loaded_plugins()


def source_state(package: str | os.PathLike | None = None) -> tuple[str | None, bool | None]:
    """`(commit, dirty)` of the git checkout that holds the package; `(None, None)` for an installed package.

    Only the package's folder counts as dirty, new files included: an edited README changes no number. A checkout that git
    cannot read is dirty.

    Args:
        package: Folder of the package; by default that of this one.
    """
    package = Path(package or Path(__file__).parents[2]).resolve()
    if not (package.parent / ".git").exists():
        return None, None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    if commit is None or changes is None:
        return None, True
    return commit, bool(changes)


def describe_device(device: torch.device | str) -> str:
    """A device in words: `"cuda: NVIDIA …"`, `"cpu: x86_64"`."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.machine()}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
