"""The settings that are compared on the offline suite, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ...data.suites import SUITES
from ...data.tasks import OFFLINE, Task
from ..engine.run import make_spec
from ..recipes import RECIPES, SHIPPED, Recipe
from ..records.run_record import RunSpec, describe_method


SEEDS = (0, 1, 2, 3, 4)
OFFLINE_TASKS = SUITES[OFFLINE].tasks
NES = (1, 3)
RANDOM_MASKS = (0, 1, 2)
TAYLOR = ("absolute", "positive", "negative")

LORA = {"name": "lora", "r": 8, "scale": 1}
HEADS = {"name": "head-masked-lora", "r": 8, "scale": 1}
ONE_BIT = {"adapter_bits": 1, "r": 32}  # the rank of the papers

LEARNING_RATES = RECIPES[OFFLINE].learning_rates  # where they differ from the recipe's

CORE: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "full": {"name": "full"},
    "LoRA": LORA,
    **{
        f"{criterion} ne={ne}": HEADS | {"ne": ne, "criterion": criterion}
        for ne in NES
        for criterion in (*TAYLOR, "weight_norm", "grad_norm", "front", "most_responsive")
    },
    **{
        f"random ne={ne} mask {seed}": HEADS | {"ne": ne, "criterion": "random", "mask_seed": seed}
        for ne in NES
        for seed in RANDOM_MASKS
    },
}

# Changes of the setting ne = 1; each is run with the default criterion, and with random masks.
CHANGES: dict[str, dict[str, Any]] = {
    "per layer": {"granularity": "layer"},
    "q and v apart": {"joint": False},
    "head scope": {"mask_scope": "head"},
    "1 bit, r=32": ONE_BIT,
    # lora_B is zero before the first step, and so is every score: the second step is the first with information
    "scored on one batch": {"head_select_at": 2, "head_window": "last_step"},
    "scored after 1 epoch": {"head_warmup_epochs": 1},
    "scored after 10 epochs": {"head_warmup_epochs": 10},
}
SIDE: dict[str, dict[str, Any]] = {
    "LoRA, 1 bit, r=32": HEADS | ONE_BIT | {"ne": 0},
    **{
        f"{criterion} ne=1, {name}": HEADS | {"ne": 1, "criterion": criterion} | change
        for name, change in CHANGES.items()
        for criterion in ("absolute", "random")
    },
}
QUICK = {name: CORE[name] for name in ("LoRA", "absolute ne=1", "front ne=1", "most_responsive ne=1")}
_NAMES = {describe_method(method): name for name, method in (CORE | SIDE).items()}


def setting_name(method: dict[str, Any]) -> str:
    """The name of one of these settings; of others, the method in words."""
    return _NAMES.get(describe_method(method), describe_method(method))


def offline_settings(*, core: bool = False, quick: bool = False) -> dict[str, dict[str, Any]]:
    """`{name: method}` of the settings that are compared: all, `CORE` alone, or a few."""
    return QUICK if quick else CORE if core else CORE | SIDE


def offline_specs(
    methods: Iterable[dict[str, Any]],
    recipe: Recipe = RECIPES[OFFLINE],
    seeds: Iterable[int] = SEEDS,
    tasks: Iterable[Task] = OFFLINE_TASKS,
) -> list[RunSpec]:
    """The runs, seed by seed; every training is evaluated on test images and on validation images.

    Args:
        methods: Methods of `offline_settings`.
        recipe: Recipe of their training, except for `LEARNING_RATES`.
        seeds: Seeds of everything that is drawn.
        tasks: Tasks of the suite.
    """
    tasks, methods = tuple(tasks), tuple(methods)
    return [
        make_spec(task, method, _recipe_of(method, recipe), SHIPPED, seed, final=final)
        for seed in seeds
        for task in tasks
        for method in methods
        for final in (True, False)
    ]


def _recipe_of(method: dict[str, Any], recipe: Recipe) -> Recipe:
    rate = LEARNING_RATES.get(method["name"])
    return recipe if rate is None else replace(recipe, learning_rate=rate)
