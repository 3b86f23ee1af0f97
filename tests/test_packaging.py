"""The versions that pyproject.toml allows are those that CI tests and the README names."""

import re
from pathlib import Path

import pytest


tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[1]


def pinned(name):
    """Return the versions that a file of .ci pins."""
    text = (ROOT / ".ci" / name).read_text("utf-8")
    return {package: numbers(version) for package, version in re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE)}


def numbers(version):
    return [int(part) for part in version.split(".")]


@pytest.fixture
def bounds():
    """Return the lower bounds of the dependencies, those of the extra "onnx" among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["onnx"]
    found = re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(requirements), re.MULTILINE)
    return {name: numbers(version) for name, version in found}


def test_the_lower_bounds_are_what_ci_installs(bounds):
    del bounds["torch"]  # the only version that was tested
    oldest = pinned("oldest.txt")
    assert bounds == {name: version[: len(bounds[name])] for name, version in oldest.items()}


def test_the_readme_names_one_range_of_transformers(bounds):
    """The README states the supported versions of transformers twice."""
    ranges = re.findall(r"transformers (\d+\.\d+)\s+to\s+(\d+\.\d+)", (ROOT / "README.md").read_text("utf-8"))
    assert len(ranges) == 2 and len(set(ranges)) == 1
    lowest, highest = map(numbers, ranges[0])
    assert lowest == bounds["transformers"][:2] < highest


def test_the_readme_names_the_torch_of_ci(bounds):
    """Its commands, which CI runs, install the oldest allowed torch; another environment has a newer one."""
    readme = (ROOT / "README.md").read_text("utf-8")
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    versions = [numbers(version) for version in re.findall(r"torch==([\d.]+)", readme + ci)]
    assert len(versions) == 3 and all(version[:2] == bounds["torch"] for version in versions)
    assert pinned("newest.txt")["torch"] > versions[0]
    assert "pip install -q --no-compile --requirement .ci/newest.txt" in ci
