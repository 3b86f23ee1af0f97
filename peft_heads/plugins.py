"""Plugins: packages that add methods and criteria when they are installed, and modules that the user names."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType


GROUP = "peft_heads.plugins"
_TRIED: set[EntryPoint] = set()
_LOADED: dict[str, str] = {}
_IMPORTED: list[str] = []


def load_plugins() -> None:
    """Load the plugins of all installed packages, each once in a process.

    A package is a plugin if it has an entry point in the group `peft_heads.plugins`, which names a module or a function
    without arguments: either registers what the package adds. A plugin that fails is left out, with a
    warning; what it has registered before it fails stays.
    """
    for entry in entry_points(group=GROUP):
        if entry in _TRIED:
            continue
        _TRIED.add(entry)
        name = entry.name if entry.dist is None else entry.dist.name
        try:
            plugin = entry.load()
            if not isinstance(plugin, ModuleType):
                plugin()
        except Exception as error:
            warnings.warn(
                f"the plugin {name!r} ({entry.value}) is left out, since it fails: {type(error).__name__}: {error}"
            )
            continue
        _LOADED[name] = "" if entry.dist is None else entry.dist.version


def load_plugins_at_import() -> None:
    """`load_plugins`, but for the command `peft-heads`: it loads them once it knows that a command is run."""
    if not _is_command_line():
        load_plugins()


def import_plugin(module: str) -> None:
    """Import a module that registers methods or criteria: `--plugin MODULE` of the command line.

    It is looked for where Python looks for modules, and then in the current folder.

    Args:
        module: Its name, as in `import`.

    Raises:
        ValueError: It cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        plugin = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"the plugin {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    _LOADED[module] = str(getattr(plugin, "__version__", ""))
    if module not in _IMPORTED:
        _IMPORTED.append(module)


def loaded_plugins() -> dict[str, str]:
    """`{plugin: version}`: the distribution's name and version, or the module's and its `__version__`.

    The version is empty where there is none.
    """
    return dict(_LOADED)


def plugin_words() -> list[str]:
    """The words of the command line that import the same modules again in another process."""
    return [word for module in _IMPORTED for word in ("--plugin", module)]


def take_plugin_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """The modules of `--plugin MODULE`, which any command takes any number of times, and the other words.

    Raises:
        ValueError: No module follows.

    Example:
        >>> take_plugin_words(["--ne", "1", "--plugin", "a", "--plugin=b"])
        (['a', 'b'], ['--ne', '1'])
    """
    modules, others, words = [], [], iter(argv)
    for word in words:
        name, has_value, module = word.partition("=")
        if name != "--plugin":
            others.append(word)
            continue
        module = module if has_value else next(words, "")
        if not module or module.startswith("-"):
            raise ValueError("--plugin needs the name of a module")
        modules.append(module)
    return modules, others


def _is_command_line() -> bool:
    """Whether this process is `peft-heads …` or `python -m peft_heads …`, and no worker that such a process has started."""
    if multiprocessing.parent_process() is not None:
        return False
    words = sys.orig_argv
    as_module = "-m" in words and words[words.index("-m") + 1 :][:1] == ["peft_heads"]
    return as_module or Path((sys.argv or [""])[0]).stem == "peft-heads"
