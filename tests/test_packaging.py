"""The versions that pyproject.toml allows are those that CI tries."""

import re
from pathlib import Path

import pytest


tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]


def test_the_lower_bounds_are_what_ci_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(project["dependencies"]), re.MULTILINE))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".ci" / "oldest.txt").read_text("utf-8"), re.MULTILINE))
    del bounds["torch"]  # the one version that was tried
    assert {name: version.split(".") for name, version in bounds.items()} == {
        name: version.split(".")[: len(bounds[name].split("."))] for name, version in pinned.items()
    }
