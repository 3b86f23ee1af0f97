"""Old paths of modules that have moved. The modules at the old paths are deleted in 0.3."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any


def moved(old: str, new: str, *others: str, renamed: Mapping[str, str] | None = None) -> None:
    """Let the module at the new path answer to the old one, and warn whoever imports it.

    Args:
        old: Name of the module that calls this.
        new: Name of the module that has its contents.
        others: Names of the modules that have the rest of them. The old module then stays and looks them up.
        renamed: Old and new names of the contents that have another name now.
    """
    warnings.warn(f"{old} has moved to {' and '.join((new, *others))}", DeprecationWarning, stacklevel=3)
    if not others:
        sys.modules[old] = importlib.import_module(new)
        return

    def look_up(name: str) -> Any:
        for home in (new, *others):
            module = importlib.import_module(home)
            if hasattr(module, (renamed or {}).get(name, name)):
                return getattr(module, (renamed or {}).get(name, name))
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    vars(sys.modules[old])["__getattr__"] = look_up
