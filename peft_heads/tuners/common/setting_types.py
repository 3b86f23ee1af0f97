"""Whether the values in a JSON file have the types of a configuration's fields, which PEFT never checks."""

from __future__ import annotations

import os
import re
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from ...adapter_folder.weights_file import one_line


# Annotated as integers, but PEFT divides by the rank, and Bi-LoRA's scales are numbers like 0.1.
_NUMBERS = ("lora_alpha", "alpha_pattern")
# Words that PEFT takes for a field, and its annotation does not list.
_MORE_WORDS = {"init_lora_weights": re.compile(r"lora_ga|pissa_niter_\d+|(?i:gaussian|olora|mica)")}


def check_types(config_class: type, settings: dict[str, Any]) -> None:
    """Raise ValueError if a setting is not of its field's type; settings that are no fields are PEFT's to report.

    Args:
        config_class: The class of the configuration.
        settings: What the file holds, by field.
    """
    try:
        hints = typing.get_type_hints(config_class)
    except Exception:  # a type that only exists while types are checked
        return
    for field in fields(config_class):
        if field.name in settings and field.name in hints and settings[field.name] != field.default:
            value = settings[field.name]
            words = _MORE_WORDS.get(field.name)
            if words and isinstance(value, str) and words.fullmatch(value):
                continue
            if not fits(value, hints[field.name], is_number=field.name in _NUMBERS):
                raise ValueError(f"{field.name} is {str(value)[:80]!r} of type {type(value).__name__}: a wrong type")


def fits(value: Any, hint: Any, is_number: bool = False) -> bool:
    """Whether a value that comes from JSON is of a type.

    Args:
        value: The value.
        hint: The type; whatever is no plain one, nor made of them, fits everything.
        is_number: Whether numbers with a fraction pass for integers.

    Example:
        >>> fits(8, int | None), fits("8", int | None), fits([1, 2], list[int]), fits(True, int)
        (True, False, True, False)
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part, is_number) for part in parts)
    if is_dataclass(hint):
        return isinstance(value, dict)
    if origin is Literal:
        return value in parts
    if hint is type(None):
        return value is None
    if hint in (bool, str):
        return type(value) is hint
    if hint is int:
        return type(value) is int or (is_number and type(value) is float)
    if hint is float:
        return type(value) in (int, float)
    if (origin or hint) in (list, set, tuple):
        return isinstance(value, list) and all(fits(item, part) for part in parts[:1] for item in value)
    if (origin or hint) is dict:
        return isinstance(value, dict) and all(
            fits(item, part, is_number) for part in parts[1:] for item in value.values()
        )
    return True


def check_choice(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless a field of a configuration has one of the allowed values."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(config, name)!r}")


def refusal(where: str | os.PathLike, error: Exception) -> ValueError:
    """The error of one line with which an adapter is refused; it names the folder, or the file in it."""
    text = one_line(error)
    if not isinstance(error, ValueError):  # a setting of the wrong type, over which PEFT has tripped
        text = f"its settings and weights cannot be used ({type(error).__name__}: {text})"
    return ValueError(text if os.fspath(where) in text else f"{os.fspath(where)}: {text}")
