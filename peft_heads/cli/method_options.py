"""Options of the registered methods, as parsers have them."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any, Literal

from ..methods import all_options
from ..tuners.common.method_registry import registered_methods
from ..tuners.common.options import Option


def method_names() -> tuple[str, ...]:
    """Values of `--method`; the first is the default."""
    return tuple(method.name for method in registered_methods())


def named_method(argv: list[str]) -> str | None:
    """Value of `--method` among a command's words, which need not be valid; None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method")
    try:
        return parser.parse_known_args(argv)[0].method
    except argparse.ArgumentError:  # without a value: the command's own parser says so
        return None


def method_arguments(first: str | None = None) -> type:
    """Dataclass with `method` and, all None, the options of every registered method, for an `HfArgumentParser`.

    Args:
        first: Method whose types come first where several methods have an option.
    """
    names = method_names()
    what = f"What is trained besides the classifier; `--method X --help` shows its options ({names[0]})."
    fields: list[tuple[str, Any, Any]] = [
        ("method", Literal[names], dataclasses.field(default=names[0], metadata={"help": what}))
    ]
    for option in all_options(first).values():
        # shown by `method_help`
        hidden = dataclasses.field(default=None, metadata={"help": argparse.SUPPRESS})
        fields.append((option.name, option.type | None, hidden))
    return dataclasses.make_dataclass("MethodArguments", fields, namespace={"_argument_group_name": "method"})


def method_help(name: str, prog: str) -> str:
    """Help on the options of one method alone."""
    method = next(method for method in registered_methods() if method.name == name)
    parser = argparse.ArgumentParser(
        prog=f"{prog} --method {name}",
        usage=f"{prog} --method {name} [--option value …]",
        description=f"Trains {method.help}. "
        + ("" if method.options else "It has no options of its own. ")
        + f"`{prog} --help` shows the options that all methods have.",
        add_help=False,
    )
    group = parser.add_argument_group(f"options of {name}")
    for option in method.option_table.values():
        group.add_argument(f"--{option.name}", metavar=_metavar(option), help=_help(option).replace("%", "%%"))
    return parser.format_help()


def _metavar(option: Option) -> str:
    return "{" + ",".join(option.choices) + "}" if option.choices else option.name.upper()


def _help(option: Option) -> str:
    text = re.sub(r"`(\w+)`", r"--\1", option.help.rstrip("."))  # a field's help names other fields
    return f"{text}." if option.default is None else f"{text} (default {value_in_words(option.default)})."


def value_in_words(value: Any) -> str:
    """A setting's value as it is given on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
