"""Options of the command line. Most are fields of a method's configuration."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from peft import PeftConfig

from .head_selection import HEAD_SELECTION


@dataclass(frozen=True)
class Option:
    """One option, `--name value`. Type, help and default are those of the configuration's field, if not given here.

    Attributes:
        name: Name of the option.
        type: Type of its value: `int`, `float`, `bool`, `str` or a `Literal` of strings.
        help: One sentence that says what it does, without the default.
        default: Value in effect if the option is not given; None if there is none.
        instead_of: Option that says the same thing in another way; only one of the two can be given.
        write: Returns the configuration's fields, given the value, all settings and the configuration's class. By
            default it is the field of the option's name.
        read: Returns the option's value, given a configuration. By default it is that field's.
    """

    name: str
    type: Any = None
    help: str = ""
    default: Any = None
    instead_of: str | None = None
    write: Callable[[Any, Mapping[str, Any], type[PeftConfig]], dict[str, Any]] | None = None
    read: Callable[[PeftConfig], Any] | None = None

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The possible values, if they are names; None otherwise."""
        return typing.get_args(self.type) if typing.get_origin(self.type) is Literal else None


def complete(option: Option, config: type[PeftConfig] | None) -> Option | None:
    """The option with the type, help and default of its field.

    None if the field's value is no single number, word or truth value: those fields are left to `--peft_config`.

    Args:
        option: An option of a method.
        config: Class of the method's configuration; None if it has none.
    """
    field = None if config is None else next((f for f in fields(config) if f.name == option.name), None)
    kind = option.type or _kind(field, config)
    if kind is None:
        return None
    text, default = option.help, option.default
    if field is not None:
        text, default = text or field.metadata.get("help", ""), getattr(default_config(config), option.name)
    if option.read is not None:
        default = option.read(default_config(config))
    return dataclasses.replace(option, type=kind, help=text, default=default)


@functools.cache
def default_config(config: type[PeftConfig]) -> PeftConfig:
    """A configuration with no setting given, to read defaults from."""
    return config()


@functools.cache
def _type_hints(config: type[PeftConfig]) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _kind(field: dataclasses.Field, config: type[PeftConfig]) -> Any:
    """Type of a field's value, without None; None if it is no single type."""
    if "choices" in field.metadata:  # names, to which plugins may add
        choices = field.metadata["choices"]
        return Literal[tuple(choices() if callable(choices) else choices)]
    hint = _type_hints(config)[field.name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        hint = parts[0] if len(parts) == 1 else None
    if typing.get_origin(hint) is Literal:
        values = typing.get_args(hint)
        # which numbers are possible, the configuration checks itself
        return hint if all(isinstance(value, str) for value in values) else type(values[0])
    return hint if hint in (int, float, bool, str) else None


# Settings that say which heads are deactivated; they have no effect before heads are selected.
HEAD_SETTINGS = (*(name for name in HEAD_SELECTION if name != "num_heads"), "mask_scope")
HEAD_OPTIONS = tuple(Option(name, instead_of="ne" if name == "ratio" else None) for name in HEAD_SETTINGS)


# Options of methods that prune. Unlike the others, they say which layers get an adapter, and do so from the start.
PRUNING_OPTIONS = (
    Option("neuron_ratio"),
    Option("neuron_criterion"),
    Option("target_speed", instead_of="ne"),
)
# Those by which heads or neurons are removed from the model.
PRUNING_NUMBERS = ("neuron_ratio", "target_speed")


def head_options(config: type[PeftConfig]) -> tuple[Option, ...]:
    """The options of `HEAD_OPTIONS` that are fields of a configuration."""
    names = {field.name for field in fields(config)}
    return tuple(option for option in HEAD_OPTIONS if option.name in names)


# Arguments of `TaylorHeadScorer`, which says when heads are selected.
SCORER_OPTIONS = (
    Option("head_select_at", float, "When heads are selected: below 1 a share of the steps, else a step.", 0.1),
    Option(
        "head_warmup_epochs",
        float,
        "Epochs before the selection, instead of --head_select_at.",
        instead_of="head_select_at",
    ),
    Option(
        "head_window",
        Literal["last_epoch", "all", "last_step"],
        "The steps before the selection whose scores count.",
        "last_epoch",
    ),
    Option("cuts", int, "Number of times that units are switched off, from the selection to --last_cut.", 1),
    Option("last_cut", float, "When the last of several cuts is: below 1 a share of the steps, else a step.", 0.5),
    Option("distill", float, "Weight in the loss of the distance to the model with everything on; 0 for none.", 0.0),
    Option("distill_temperature", float, "Temperature of the predictions that --distill compares.", 2.0),
    Option("teacher", Literal["cut", "start"], "When the model that --distill compares with is copied.", "cut"),
)
# Options that have no effect without another one.
NEEDED = {"last_cut": "cuts", "distill_temperature": "distill", "teacher": "distill"}
SCORER_SETTINGS = tuple(option.name for option in SCORER_OPTIONS)
# Options of LoRA, with a help of our own: PEFT's says little.
LORA_OPTIONS = (
    Option("r", help="Rank."),
    Option("lora_alpha", float, "LoRA's alpha; s = alpha / r.", instead_of="scale"),
    Option("lora_dropout", help="Dropout before lora_A."),
    Option(
        "scale",
        float,
        "The papers' s, instead of --lora_alpha.",
        write=lambda scale, settings, config: {"lora_alpha": scale * settings.get("r", config.r)},
        read=lambda config: config.lora_alpha / config.r,
    ),
)
# Scales that the papers try.
SCALES = [0.01, 0.1, 1, 10, 100]
