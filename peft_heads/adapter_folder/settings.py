"""The small JSON files of an adapter's folder, and what they may hold."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from .ordinary import check_ordinary


# Small files are read whole; the largest real one, labels of 22,000 classes, has about a megabyte.
MAX_JSON_BYTES = 2**24
# Options with patterns of module names, and how long one may be: a runaway pattern takes PEFT for ever.
PATTERN_OPTIONS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "num_heads",
)
MAX_PATTERN = 1000


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """`adapter_config.json` of an adapter's folder, of whatever type.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The file is damaged, or not PEFT's.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter in {folder}: it has no {CONFIG_NAME}")
    check_ordinary(path)
    try:
        settings = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not PEFT's: it holds no mapping of settings")
    try:
        for name in ("peft_type", "base_model_name_or_path", "revision"):
            if not isinstance(settings.get(name), (str, type(None))):
                raise ValueError(f"{name} must be text; got {str(settings[name])[:80]!r}")
        check_patterns(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def read_json(path: Path) -> Any:
    """What a small JSON file holds.

    Raises:
        ValueError: The file is no JSON, or is larger or nested deeper than a file of settings can be.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes (expected {MAX_JSON_BYTES:,} at most)")
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_patterns(settings: dict[str, Any]) -> None:
    """Raise ValueError if a pattern of module names among an adapter's settings is longer than any real one.

    Args:
        settings: By the names of the configuration's fields.
    """
    for option in PATTERN_OPTIONS:
        value = settings.get(option)
        patterns = [value] if isinstance(value, str) else value if isinstance(value, (list, set, tuple, dict)) else []
        if isinstance(value, (str, dict)) or option == "layers_pattern":  # of lists the others hold names
            for pattern in patterns:
                _check_pattern(option, pattern)
        longest = max((len(pattern) for pattern in patterns if isinstance(pattern, str)), default=0)
        if longest > MAX_PATTERN:
            raise ValueError(
                f"{option} has a pattern of {longest:,} characters (expected {MAX_PATTERN:,} at most); name the "
                "modules in a list"
            )


def _check_pattern(option: str, pattern: Any) -> None:
    try:
        re.compile(pattern if len(pattern) <= MAX_PATTERN else "")
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{option} is no pattern of module names ({error}); got {str(pattern)[:80]!r}") from error
