"""Old paths of modules that have moved. The modules at the old paths are deleted in 0.3."""

from __future__ import annotations

import importlib
import sys
import warnings


def moved(old: str, new: str, *others: str) -> None:
    """Let the module at the new path answer to the old one, and warn whoever imports it.

    Args:
        old: Name of the module that calls this.
        new: Name of the module that has its contents.
        others: Names of the modules that have the rest of its contents, where they were divided.
    """
    warnings.warn(f"{old} has moved to {', '.join((new, *others))}", DeprecationWarning, stacklevel=3)
    modules = [importlib.import_module(name) for name in (new, *others)]
    if not others:
        sys.modules[old] = modules[0]
        return
    for module in reversed(modules):  # the first one's names win
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        vars(sys.modules[old]).update(public)
