"""Hyperparameter search over attention heads, with Trainer: a search space for Optuna, and the model of a trial."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


# The method of `head_model_init` without a configuration, by its name in PEFT: this room imports no tuner.
DEFAULT_METHOD = "HEAD_MASKED_LORA"

# Settings that take the place of others.
_INSTEAD_OF = {
    "ne": ("ratio", "target_speed"),
    "ratio": ("ne", "target_speed"),
    "neuron_ratio": ("target_speed",),
    "target_speed": ("ne", "ratio", "neuron_ratio"),
}


def head_search_space(
    trial: Any,
    ne: Sequence[int] = (1, 3, 6),
    criteria: Sequence[str] = ("positive", "negative", "absolute"),
    scales: Sequence[float] = (0.01, 0.1, 1, 10, 100),
    learning_rates: tuple[float, float] = (1e-4, 1e-2),
) -> dict[str, float]:
    """The papers' search space, as the `hp_space` of `Trainer.hyperparameter_search(backend="optuna")`.

    For other values use `functools.partial(head_search_space, ne=(1, 2))`; for more parameters, a function that calls
    this one.

    Args:
        trial: The Optuna trial, to which `ne`, `criterion`, `scale` and `learning_rate` are suggested.
        ne: Numbers of heads to deactivate.
        criteria: Criteria of [`HeadMaskedLoraConfig`].
        scales: Values of the papers' scale s; `lora_alpha` is s · r.
        learning_rates: Lowest and highest learning rate, sampled log-uniformly.

    Returns:
        The parameters that Trainer sets in its `TrainingArguments`, which is the learning rate. [`head_model_init`]
        reads the others.

    Raises:
        TypeError: The trial is not Optuna's.
        ValueError: The trial knows one of the names with other choices.
    """
    if not hasattr(trial, "suggest_categorical"):
        raise TypeError(
            f'head_search_space is a search space for Optuna (backend="optuna"); got the trial {trial!r}. For Ray Tune '
            "or W&B write the space in their own terms, with the names ne, criterion, scale and learning_rate"
        )
    try:
        trial.suggest_categorical("ne", ne)
        trial.suggest_categorical("criterion", criteria)
        trial.suggest_categorical("scale", scales)
    except ValueError as error:
        raise ValueError(f"head_model_init and hyperparameter_search need the same search space: {error}") from error
    return {"learning_rate": trial.suggest_float("learning_rate", *learning_rates, log=True)}


def head_model_init(
    make_model: Callable[[], nn.Module],
    config: PeftConfig | None = None,
    space: Callable[[Any], Mapping[str, Any]] = head_search_space,
) -> Callable[[Any], PeftModel]:
    """The `model_init` of a Trainer that searches: for each trial a new model with the adapter the trial asks for.

    A parameter named like a field of the configuration replaces that field; `scale` sets `lora_alpha`. Before the
    heads are selected, trials that differ in `ne` or `criterion` alone are equal: let a pruner wait until then
    (`MedianPruner(n_warmup_steps=…)`).

    Args:
        make_model: Returns a new base model at every call.
        config: Configuration that all trials share, and of the model without a trial. Defaults to
            `HeadMaskedLoraConfig()`.
        space: The search's `hp_space`.

    Returns:
        A function of the trial: Optuna's, a dict of Ray Tune or W&B, or the `hyperparameters` of the best run.

    Raises:
        TypeError: `config` belongs to a method without head masks.
        ValueError: Raised for a trial: none of its parameters is for the model, or they do not fit it, or `make_model`
            returned a model that has an adapter already.

    Example:

        ```py
        >>> model_init = head_model_init(make_model, HeadMaskedLoraConfig(r=8))
        >>> scorer = TaylorHeadScorer(warmup_epochs=10)
        >>> trainer = Trainer(model_init=model_init, args=args, train_dataset=dataset, callbacks=[scorer])
        >>> best = trainer.hyperparameter_search(  # trains 50 times  # doctest: +SKIP
        ...     head_search_space, n_trials=50, backend="optuna"
        ... )

        >>> # train the best once more; its learning rate is not the model's business
        >>> trainer.model_init = functools.partial(model_init, best.hyperparameters)
        >>> trainer.args.learning_rate = best.hyperparameters["learning_rate"]
        >>> trainer.train()
        ```
    """
    config = PEFT_TYPE_TO_CONFIG_MAPPING[DEFAULT_METHOD]() if config is None else config
    if not _selects_heads(config):
        raise TypeError(f"head_model_init needs a HeadMaskedLoraConfig or an RLRRConfig; got {type(config).__name__}")

    def model_init(trial: Any = None) -> PeftModel:
        settings = {}
        if trial is not None:
            if not isinstance(trial, Mapping):
                # transformers 5 calls hp_space only after this, 4.57 before; a name suggested again keeps its value
                space(trial)
                trial = trial.params
            settings = _settings(config, trial)
        model = make_model()
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("make_model returned a model that has an adapter already; it must make a new base model")
        return get_peft_model(model, replace(copy.deepcopy(config), **settings))

    return model_init


def _selects_heads(config: Any) -> bool:
    """Whether the method can deactivate heads: its configuration has the fields that say which."""
    return is_dataclass(config) and {"ne", "ratio", "criterion"} <= {field.name for field in fields(config)}


def _settings(config: PeftConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the configuration that a trial's parameters replace."""
    settings = {field.name: params[field.name] for field in fields(config) if field.name in params}
    if "scale" in params and not hasattr(config, "lora_alpha"):
        raise ValueError(
            f"the search space suggests scale, which {type(config).__name__} has not: pass a space= of its own fields"
        )
    if "scale" in params:
        settings["lora_alpha"] = params["scale"] * settings.get("r", config.r)
    if not settings:
        raise ValueError(
            f"the search space has nothing for the model, only {', '.join(params) or 'no parameters'}: call "
            f"head_search_space in it, or suggest scale or fields of {type(config).__name__}"
        )
    given = {name for name, value in settings.items() if value is not None}
    if given & {"neuron_ratio", "target_speed"} and not config.prunes_neurons:
        settings.setdefault("mask_scope", None)  # it was resolved for an adapter that prunes nothing
    names = {field.name for field in fields(config)}
    for one in given & _INSTEAD_OF.keys():
        settings = {other: None for other in _INSTEAD_OF[one] if other in names} | settings
    return settings
