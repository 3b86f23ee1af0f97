"""Old paths of modules that have moved. The modules at the old paths are deleted in 0.3."""

from __future__ import annotations

import importlib
import sys
import warnings


def moved(old: str, new: str) -> None:
    """Let the module at the new path answer to the old one, and warn whoever imports it.

    Args:
        old: Name of the module that calls this.
        new: Name of the module that has its contents.
    """
    warnings.warn(f"{old} has moved to {new}", DeprecationWarning, stacklevel=3)
    sys.modules[old] = importlib.import_module(new)
