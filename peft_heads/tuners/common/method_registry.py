"""The registry of methods: one record each, with all that the rest of the package must know about a method.

Your own method is a configuration and a tuner, as PEFT has them, and one call of [`register_method`].
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

from ..._compat.peft import PEFT_TYPES, delegate_config_loading, extend_model_card, register_tuner
from ..._compat.transformers_loading import extend_weight_mapping
from ...adapter_folder.card import update_card
from .options import SCORER_SETTINGS, Option, complete, default_config


if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of fine-tuning an image classifier.

    Attributes:
        name: Value of `--method`. In capitals, with underscores, it is the PEFT type of the method's adapters.
        help: What is trained, in a few words.
        config: Class of the configuration. None if the method adds no adapter, or is told which one (`read_config`).
        model: Class of the tuner, which is registered with PEFT. None if the method has none, or PEFT's own.
        apply: Prepares a model for training and returns it, for a method that adds no adapter.
        read_config: Returns a configuration as `adapter_config.json` holds it (`peft_type` and fields), given the
            settings; for a method that is told which adapter to add.
        options: Options of `train` and `bench`: names of the configuration's fields, or [`Option`]s. A field whose
            type is a union or a dict is left to `--peft_config`.
        grid: Settings of the benchmark where none is given; every value of a list is tried.
        shown: Settings that `inspect` shows; the options by default.
        masked_parts: Initials of the parts of a fused projection whose heads the adapter masks, where its settings have
            no `fused_parts`.
        head_rows: Parameters whose rows belong to heads, and are zero in a file where a head is deactivated.
        no_norms: Why `inspect` cannot compute the norms of the heads' updates; empty if it can, as for LoRA.
        pack: Replaces a trained adapter's weights by its codes, given the model and the adapter's name; called after a
            training, unless the configuration has an attribute `has_few_bits` that is False.
    """

    name: str
    help: str
    config: type[PeftConfig] | None = None
    model: type[BaseTuner] | None = None
    apply: Callable[[nn.Module], nn.Module] | None = None
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    options: tuple[str | Option, ...] = ()
    grid: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[str, ...] | None = None
    masked_parts: str = "qkv"
    head_rows: tuple[str, ...] = ()
    no_norms: str = ""
    pack: Callable[[PeftModel, str], Any] | None = None

    def __post_init__(self) -> None:
        known = {f.name for f in fields(self.config)} if self.config else set()
        options = tuple(Option(option) if isinstance(option, str) else option for option in self.options)
        object.__setattr__(self, "options", options)
        unknown = [option.name for option in options if option.type is None and option.name not in known]
        if unknown:
            owner = self.config.__name__ if self.config else "no configuration"
            raise ValueError(
                f"method {self.name!r} has the option {unknown[0]!r}, which is no field of its configuration ({owner}); "
                "name a field, or give an Option with a type"
            )

    @property
    def peft_type(self) -> str | None:
        """Type of the method's adapters, as `adapter_config.json` says it; None if it has no configuration."""
        return None if self.config is None else _type_of(self.name)

    @property
    def prefix(self) -> str:
        """Beginning of the names of parameters that the tuner puts into a module; empty if there is no tuner."""
        return PEFT_TYPE_TO_PREFIX_MAPPING.get(self.peft_type, "")

    @property
    def option_table(self) -> dict[str, Option]:
        """The options by name, each with type, help and default."""
        completed = (complete(option, self.config) for option in self.options)
        return {option.name: option for option in completed if option is not None}

    @property
    def shown_settings(self) -> tuple[str, ...]:
        """Settings that `inspect` shows."""
        return self.shown if self.shown is not None else tuple(option.name for option in self.options)

    @property
    def scores_heads(self) -> bool:
        """Whether heads can be scored and selected while the method trains."""
        return any(option.name in SCORER_SETTINGS for option in self.options)

    @property
    def deactivates_by_default(self) -> bool:
        """Whether heads are deactivated if no setting says how many are."""
        return self.config is not None and bool(getattr(default_config(self.config), "masks_heads", False))

    def config_of(self, settings: Mapping[str, Any]) -> tuple[type[PeftConfig] | None, dict[str, Any]]:
        """Class and fields of the configuration, for settings by the names of options."""
        found: dict[str, Any] = {}
        if self.read_config is not None:
            found |= self.read_config(settings)
            return PEFT_TYPE_TO_CONFIG_MAPPING[found.pop("peft_type")], found
        for option in self.options:
            if option.name in settings and option.name not in SCORER_SETTINGS:
                value = settings[option.name]
                found |= option.write(value, settings, self.config) if option.write else {option.name: value}
        return self.config, found


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Make a method known to PEFT (if it has a tuner), to the commands, and to everything that reads adapters.

    Registering the same method again is harmless.

    Raises:
        ValueError: There is a method of this name, or its name or type is one of PEFT's own; or its grid has a setting
            that is no option.
    """
    peft_type = _type_of(method.name)
    known = next((other for other in _METHODS.values() if _type_of(other.name) == peft_type), None)
    if known is not None and known != method:
        raise ValueError(
            f"there is a method {known.name!r} already ({_whose(known)}): method {method.name!r} ({_whose(method)}) needs "
            "another name"
        )
    if peft_type in PEFT_TYPES and (method.model is not None or _of_peft(peft_type) is not method.config):
        raise ValueError(
            f"{peft_type} is a type of PEFT's own ({_whose_config(_of_peft(peft_type))}): method {method.name!r} "
            f"({_whose(method)}) needs another name"
        )
    names = [option.name for option in method.options]
    if unknown := [name for name in method.grid if name not in names]:
        raise ValueError(
            f"the grid of method {method.name!r} has {unknown[0]!r}, which is none of its options "
            f"({', '.join(names) or 'none'})"
        )
    if method.model is not None:
        register_tuner(name=peft_type.lower(), config_cls=method.config, model_cls=method.model)
        extend_weight_mapping(peft_type.lower(), _mask_converters)
        delegate_config_loading()
        extend_model_card(update_model_card)
    _METHODS[method.name] = method
    _prefixes_of.cache_clear()


def registered_methods() -> tuple[Method, ...]:
    """All methods, in the order in which they were registered; the first is the default of the commands."""
    return tuple(_METHODS.values())


def get_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in _METHODS:
        raise ValueError(f"there is no method {name!r} (known: {', '.join(_METHODS)})")
    return _METHODS[name]


def method_of(config: PeftConfig | str | None) -> Method | None:
    """The method of a configuration, or of a PEFT type; None for types that are not registered here."""
    peft_type = getattr(config, "peft_type", config)
    return next((method for method in _METHODS.values() if method.peft_type and method.peft_type == peft_type), None)


def is_own_type(peft_type: str | None) -> bool:
    """Whether adapters of a type are those of a tuner that is registered here, and not PEFT's."""
    method = method_of(peft_type)
    return method is not None and method.model is not None


def adapter_types(base: type[PeftConfig] = PeftConfig) -> tuple[str, ...]:
    """PEFT types of the methods whose configuration is one of `base`: PEFT's own first."""
    found = [method for method in _METHODS.values() if method.config is not None and issubclass(method.config, base)]
    return tuple(method.peft_type for method in sorted(found, key=lambda method: method.model is not None))


def parameter_prefixes() -> tuple[str, ...]:
    """Beginnings of the names of parameters that a method puts into a module."""
    return _prefixes_of(tuple(_METHODS))


@functools.cache  # asked for every key of a file
def _prefixes_of(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(method.prefix for method in _METHODS.values() if method.prefix))


def own_prefixes() -> tuple[str, ...]:
    """The prefixes that no method of PEFT has."""
    theirs = {prefix for peft_type, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if peft_type in PEFT_TYPES}
    return tuple(prefix for prefix in parameter_prefixes() if prefix not in theirs)


def card_tags() -> tuple[str, ...]:
    """Tags by which a model card is known as that of a method registered here; PEFT's tags are not among them."""
    cards = [getattr(method.config, "card", None) for method in _METHODS.values()]
    tags = dict.fromkeys(tag for card in cards if card is not None for tag in card.tags)
    return (*(tag for tag in tags if _type_of(tag) not in PEFT_TYPES), "peft_heads")


def update_model_card(model: PeftModel, folder: str | os.PathLike) -> None:
    """Let the card in a folder describe the model's adapter, whatever its method."""
    update_card(model, folder, card_tags())


def _mask_converters(adapter_name: str) -> list:
    from .mask_conversion import mask_converters  # here, as it needs transformers 5, and is asked for by that alone

    return mask_converters(adapter_name)


def _type_of(name: str) -> str:
    return name.upper().replace("-", "_")


def _of_peft(peft_type: str) -> type[PeftConfig] | None:
    return PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)


def _whose(method: Method) -> str:
    return _whose_config(method.model or method.config or method.apply or method.read_config)


def _whose_config(thing: Any) -> str:
    return "without a class" if thing is None else f"{thing.__module__}.{thing.__qualname__}"
