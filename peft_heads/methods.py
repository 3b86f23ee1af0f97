"""Fine-tuning by a registered method, as `train` and `bench` do it: the settings, their checks, and the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from .scoring.callback import TaylorHeadScorer
from .scoring.window import LAST_CUT
from .tuners.common.calls import watch_calls
from .tuners.common.folder_config import AdapterFolderConfig
from .tuners.common.method_registry import Method, get_method, method_of, registered_methods
from .tuners.common.options import HEAD_SETTINGS, NEEDED, PRUNING_NUMBERS, SCORER_SETTINGS, Option
from .tuners.stock import check_for_images, check_targets, default_modules


@dataclass(frozen=True)
class MethodSettings:
    """A method, and the settings given for it. Command line and result files make it by `from_json`.

    Attributes:
        name: Name of a registered method.
        settings: `{option: value}`. A missing option has the default of the method's configuration.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, option: str) -> Any:
        return self.settings[option]

    def get(self, option: str, default: Any = None) -> Any:
        """The value given for an option."""
        return self.settings.get(option, default)

    def to_json(self) -> dict[str, Any]:
        """`{"name": …, option: value, …}`, as results hold it."""
        return {"name": self.name, **self.settings}

    @classmethod
    def from_json(cls, data: Any) -> MethodSettings:
        """The reverse of `to_json`. Neither the method nor its options need to be known.

        Raises:
            ValueError: There is no name.
        """
        if not isinstance(data, dict):
            raise ValueError(f"method must be dict; got {type(data).__name__} {data!r}")
        if not isinstance(data.get("name"), str):
            raise ValueError(f"method needs a name, as in {{'name': 'lora'}}; got {data!r}")
        return cls(data["name"], {name: value for name, value in data.items() if name != "name"})


def all_options(first: str | None = None) -> dict[str, Option]:
    """The options of all methods, by name. If several methods have an option, the earliest method's is taken.

    Args:
        first: Name of a method that is put before all others.
    """
    methods = sorted(registered_methods(), key=lambda method: method.name != first)
    options: dict[str, Option] = {}
    for method in methods:
        options = options | {name: x for name, x in method.option_table.items() if name not in options}
    return options


def check_method(given: MethodSettings) -> None:
    """Raise ValueError for settings that contradict each other or would do nothing, before anything is loaded."""
    method, own = get_method(given.name), _given(given)
    names = {option.name for option in method.options}
    elsewhere = {option.name for other in registered_methods() for option in other.options}
    useless = [name for name in own if name not in names]
    if unknown := [name for name in useless if name not in elsewhere]:
        raise ValueError(f"method {given.to_json()}: got an unexpected keyword argument {unknown[0]!r}")
    if useless:
        raise ValueError(f"{_do_not_apply(useless)} to --method {given.name}")
    for option in method.options:
        if option.instead_of in own and option.name in own:
            raise ValueError(f"--{option.instead_of} and --{option.name} say the same thing: give one of them")
    if "neuron_criterion" in own and not any(name in own for name in PRUNING_NUMBERS):
        raise ValueError(
            f"{_do_not_apply(['neuron_criterion'])} without --neuron_ratio or --target_speed: no neuron is switched off"
        )
    for name, other in NEEDED.items():
        if name in own and not own.get(other):
            raise ValueError(f"{_do_not_apply([name])} without --{other}")
    if any(name in own for name in SCORER_SETTINGS):
        _scorer(given)  # values that no training could fit
    if method.read_config is not None:
        _check_read_config(method, own)
    if method.scores_heads and method.config is not None and not _deactivates(method, own):
        of_heads = [name for name in own if name in (*HEAD_SETTINGS, *SCORER_SETTINGS) and name not in ("ne", "ratio")]
        if of_heads:
            raise ValueError(
                f"{_do_not_apply(of_heads)} to --method {given.name} without --ne or --ratio: no head is deactivated"
            )


def _check_read_config(method: Method, settings: dict[str, Any]) -> None:
    peft_type = method.read_config(settings)["peft_type"]
    check_for_images(peft_type)
    scorer = [name for name in settings if name in SCORER_SETTINGS]
    known = method_of(peft_type)
    if scorer and not (known and known.scores_heads):
        raise ValueError(f"{_do_not_apply(scorer)} to peft_type {peft_type}")


def deactivates_heads(given: MethodSettings) -> bool:
    """Whether heads are scored, by the settings alone."""
    method = get_method(given.name)
    return method.config is not None and _deactivates(method, given.settings)


def _deactivates(method: Method, settings: Mapping[str, Any]) -> bool:
    if not method.scores_heads:
        return False
    numbers = ("ne", "ratio", *PRUNING_NUMBERS)
    return method.deactivates_by_default or any(settings.get(name) for name in numbers)


def apply_method(model: nn.Module, given: MethodSettings) -> tuple[nn.Module, list]:
    """The model ready for training, and the callbacks it needs (a `TaylorHeadScorer`, a `RankAllocator`, or none)."""
    method = get_method(given.name)
    if method.apply is not None:
        return method.apply(model), []
    config = _adapter_config(model, method, _given(given))
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} adds text tokens: it does not work on image classifiers")
    if not isinstance(config, AdapterFolderConfig):
        check_targets(model, config)
    # one of PEFT's methods may stumble over anything
    expected = (ValueError, TypeError) if isinstance(config, AdapterFolderConfig) else Exception
    try:
        model = get_peft_model(model, config)
    except expected as error:
        raise ValueError(f"{given.name}: {str(error) or type(error).__name__}") from error
    watch_calls(model)
    if hasattr(model.base_model, "update_and_allocate"):
        return model, [RankAllocator(model)]
    return model, [_scorer(given)] if scores_heads(config) else []


def _adapter_config(model: nn.Module, method: Method, settings: dict[str, Any]) -> PeftConfig:
    config_class, fields = method.config_of(settings)
    if float(fields.get("lora_alpha", 0.5)).is_integer():
        fields["lora_alpha"] = int(fields["lora_alpha"])
    try:
        # ours find their modules by themselves
        modules = {} if issubclass(config_class, AdapterFolderConfig) else default_modules(model, config_class, fields)
        return config_class(**{**modules, **fields})
    except (ValueError, TypeError) as error:
        raise ValueError(str(error)) from error


def _scorer(given: MethodSettings) -> TaylorHeadScorer:
    own = _given(given)
    renamed = {"head_select_at": "select_at", "head_warmup_epochs": "warmup_epochs", "head_window": "window"}
    return TaylorHeadScorer(**{renamed.get(name, name): own[name] for name in SCORER_SETTINGS if name in own})


class RankAllocator(TrainerCallback):
    """Lets methods that allocate their ranks while they train (AdaLoRA, AdaMSS) do so, which PEFT leaves to the loop."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """The gradients are still there; `global_step` counts this step only afterwards."""
        self.model.base_model.update_and_allocate(state.global_step)


def effective_settings(given: MethodSettings) -> dict[str, Any]:
    """Every setting of a method by its name on the command line, defaults included; needs no model.

    Settings of heads and their selection are left out if no head is deactivated.

    Raises:
        ValueError: The settings contradict each other, or are not the method's.
    """
    method, own = get_method(given.name), _given(given)
    if method.read_config is not None:
        return method.read_config(own) | {name: value for name, value in own.items() if name in SCORER_SETTINGS}
    if method.config is None:
        return {}
    config_class, fields = method.config_of(own)
    config = config_class(**fields)
    settings = {option.name: (option.read or _reader(option.name))(config) for option in method.options}
    if method.scores_heads:
        scorer = _scorer(given)
        settings |= {"head_select_at": scorer.select_at, "head_warmup_epochs": scorer.warmup_epochs}
        settings["head_window"] = scorer.window
        if scorer.cuts > 1:
            settings |= {"cuts": scorer.cuts, "last_cut": LAST_CUT if scorer.last_cut is None else scorer.last_cut}
        if scorer.distill:
            settings |= {name: getattr(scorer, name) for name in ("distill", "distill_temperature", "teacher")}
        prunes_neurons = getattr(config, "prunes_neurons", False)
        if not prunes_neurons:
            settings.pop("neuron_criterion", None)
        if not config.masks_heads:
            of_heads = set(HEAD_SETTINGS if prunes_neurons else HEAD_SETTINGS + SCORER_SETTINGS) - {"ne"}
            settings = {name: value for name, value in settings.items() if name not in of_heads}
    return {name: value for name, value in settings.items() if value is not None}


def scores_heads(config: PeftConfig) -> bool:
    """Whether an adapter's heads are scored while it trains.

    They always are if the method deactivates heads by default, even if this adapter deactivates none.
    """
    method = method_of(config)
    return method is not None and method.scores_heads and (method.deactivates_by_default or config.masks_heads)


def has_scored_heads(model: nn.Module) -> bool:
    """Whether the model has an adapter whose heads are scored while it trains."""
    return any(scores_heads(config) for config in getattr(model, "peft_config", {}).values())


def pack_trained(model: nn.Module) -> None:
    """Replace the weights of adapters with few bits by their codes; checkpoints keep the weights behind them."""
    for name, config in getattr(model, "peft_config", {}).items():
        method = method_of(config)
        if method is not None and method.pack is not None and getattr(config, "has_few_bits", True):
            method.pack(model, name)


def _given(given: MethodSettings) -> dict[str, Any]:
    """The settings without those that are None, which means the default."""
    return {name: value for name, value in given.settings.items() if value is not None}


def _reader(name: str):
    return lambda config: getattr(config, name, None)


def _do_not_apply(names: list[str]) -> str:
    return f"{', '.join(f'--{name}' for name in names)} {'does' if len(names) == 1 else 'do'} not apply"
