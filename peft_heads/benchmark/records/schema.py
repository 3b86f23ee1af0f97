"""Dataclasses that are written as JSON: fields have the types of their annotations, in memory and in the file."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Hashable, Iterable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints


T = TypeVar("T")


def from_mapping(cls: type[T], data: Any) -> T:
    """The dataclass from a mapping that has exactly its fields (those with a default may be missing).

    Raises:
        ValueError: Names the field that is missing, unknown or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"must be a mapping of fields; got {type(data).__name__}")
    known = {field.name: field for field in fields(cls)}
    if unknown := [name for name in data if name not in known]:
        raise ValueError(f"unknown field {unknown[0]} (known: {', '.join(known)})")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
    hints = get_type_hints(cls)
    return cls(**{name: getattr(hints[name], "from_json", _as_it_is)(value) for name, value in data.items()})


def _as_it_is(value: Any) -> Any:
    return value


def check_fields(instance: Any) -> None:
    """Raise ValueError naming the first field whose value is not of its annotated type, or cannot be written."""
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        check_type(value, hint, name)
        try:
            canonical_json(value)
        except TypeError as error:
            raise ValueError(f"{name} cannot be written as JSON: {error}") from error


def check_type(value: Any, hint: Any, name: str) -> None:
    """Raise ValueError unless `value` has the type `hint`: plain types, None, unions, lists and dicts of them.

    A whole number passes for a float, but True passes for neither.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return
        (hint,) = (option for option in arguments if option is not type(None))  # only X | None is used here
        return check_type(value, hint, name)
    accepted = (int, float) if hint is float else origin or hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name} must be {getattr(hint, '__name__', hint)}; got {type(value).__name__} {value!r}")
    if origin is list:
        for index, entry in enumerate(value):
            check_type(entry, arguments[0], f"{name}[{index}]")
    if origin is dict:
        for key, entry in value.items():
            check_type(key, arguments[0], f"key of {name}")
            check_type(entry, arguments[1], f"{name}[{key!r}]")


def canonical_json(value: Any) -> str:
    """JSON that is equal for equal values: keys sorted, 1.0 as 1."""
    return json.dumps(_plain_numbers(jsonable(value)), sort_keys=True, separators=(",", ":"), allow_nan=False)


def unique(values: Iterable[T], key: Callable[[T], Hashable] = canonical_json) -> list[T]:
    """The values that differ, each where it stood first; of equal ones the last.

    Args:
        values: The values.
        key: What is equal for equal values.
    """
    return list({key(value): value for value in values}.values())


def jsonable(value: Any) -> Any:
    """The value as JSON knows it: records by their `to_json`, tuples as lists, numbers that are not finite as None."""
    if hasattr(value, "to_json"):
        return jsonable(value.to_json())
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
