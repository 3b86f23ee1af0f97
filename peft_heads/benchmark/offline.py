"""The evidence of our own: which settings are compared on the offline suite, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..data.tasks import TASKS, Task
from .recipes import RECIPES, Recipe
from .results import RunSpec
from .run import make_spec


SUITE = "offline"
SEEDS = (0, 1, 2, 3, 4)
OFFLINE_TASKS = tuple(task for task in TASKS if task.suite == SUITE)
NES = (1, 3)
RANDOM_MASKS = (0, 1, 2)
TAYLOR = ("absolute", "positive", "negative")

LORA = {"name": "lora", "r": 8, "scale": 1}
HEADS = {"name": "head-masked-lora", "r": 8, "scale": 1}
ONE_BIT = {"adapter_bits": 1, "r": 32}  # the rank of the papers

# Learning rates that differ from the recipe's, by method; chosen on validation images with a seed that is not reported.
LEARNING_RATES = {"full": 1e-3, "linear": 1e-2}

CORE: list[dict[str, Any]] = [
    {"name": "linear"},
    {"name": "full"},
    LORA,
    *(
        HEADS | {"ne": ne, "criterion": criterion}
        for ne in NES
        for criterion in (*TAYLOR, "weight_norm", "grad_norm", "front", "most_responsive")
    ),
    *(HEADS | {"ne": ne, "criterion": "random", "mask_seed": seed} for ne in NES for seed in RANDOM_MASKS),
]

# What is changed, beside ne = 1: each with the Taylor criterion that is the default, and with random masks.
CHANGES: dict[str, dict[str, Any]] = {
    "per layer": {"granularity": "layer"},
    "q and v apart": {"joint": False},
    "head scope": {"mask_scope": "head"},
    "1 bit": ONE_BIT,
    # lora_B is zero before the first step, and so is every score: the second step is the first that says anything
    "scored on one batch": {"head_select_at": 2, "head_window": "last_step"},
    "scored after 1 epoch": {"head_warmup_epochs": 1},
    "scored after 10 epochs": {"head_warmup_epochs": 10},
}
SIDE: list[dict[str, Any]] = [
    HEADS | ONE_BIT | {"ne": 0},
    *(
        HEADS | {"ne": 1, "criterion": criterion} | change
        for change in CHANGES.values()
        for criterion in ("absolute", "random")
    ),
]


QUICK = [LORA, *(HEADS | {"ne": 1, "criterion": criterion} for criterion in ("absolute", "random", "most_responsive"))]


def offline_methods(*, core: bool = False, quick: bool = False) -> list[dict[str, Any]]:
    """The settings that are compared: all, `CORE` alone, or a few."""
    return QUICK if quick else CORE if core else CORE + SIDE


def offline_specs(
    backbone: str,
    methods: list[dict[str, Any]],
    recipe: Recipe = RECIPES[SUITE],
    seeds: Iterable[int] = SEEDS,
    tasks: Iterable[Task] = OFFLINE_TASKS,
) -> list[RunSpec]:
    """The runs, seed by seed: on test images, and of the same training on validation images.

    Args:
        backbone: The checkpoint.
        methods: Of `offline_methods`.
        recipe: How they are trained, but for `LEARNING_RATES`.
        seeds: Of everything that is drawn.
        tasks: Of the suite.
    """
    tasks = tuple(tasks)
    return [
        make_spec(task, method, _recipe_of(method, recipe), backbone, seed, final=final)
        for seed in seeds
        for task in tasks
        for method in methods
        for final in (True, False)
    ]


def _recipe_of(method: dict[str, Any], recipe: Recipe) -> Recipe:
    rate = LEARNING_RATES.get(method["name"])
    return recipe if rate is None else replace(recipe, learning_rate=rate)
