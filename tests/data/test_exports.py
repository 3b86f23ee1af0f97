"""The public names of `peft_heads.data`."""

import importlib
import re
from pathlib import Path

import pytest

from peft_heads import data


def test_every_name_is_that_of_its_home():
    for name in data.__all__:
        found = getattr(data, name)
        home = getattr(found, "__module__", "peft_heads.data.suites")
        assert getattr(importlib.import_module(home), name) is found
        assert f"{home}.".startswith(f"peft_heads.data.{data._HOMES[name]}.")  # no other module has to be imported
    with pytest.raises(AttributeError, match="module 'peft_heads.data' has no attribute 'load_images'"):
        data.__getattr__("load_images")


def test_what_the_readme_imports_is_exported():
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    imported = re.findall(r"^from peft_heads\.data[\w.]* import (.+)$", readme, re.MULTILINE)
    names = {name for names in imported for name in names.split(", ")}
    assert names and names <= set(data.__all__)


def test_modules_are_still_found():
    from peft_heads.data import images, trees

    assert images.collate is data.collate and trees.load_split is data.load_split
