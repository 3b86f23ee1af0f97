"""The settings that a run uses, defaults included, and where it departs from the recipe of its suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...data.preprocessing import Preprocessing
from ...data.tasks import TASKS
from ...methods import MethodSettings, deactivates_heads, effective_settings
from ..recipes import RECIPES
from .run_record import Environment, RunSpec
from .schema import canonical_json, unique


# `mean` and `std` are what `normalization` stands for.
IMAGES = ("size", "resize", "resize_size", "crop", "filter", "normalization")


def with_warmup(method: MethodSettings, recipe: dict[str, Any]) -> MethodSettings:
    """A run's method as it is trained: heads are selected when the recipe says, unless the method does.

    Raises:
        ValueError: There is no such method.
    """
    if deactivates_heads(method) and not {"head_warmup_epochs", "head_select_at"} & method.settings.keys():
        return replace(method, settings={**method.settings, "head_warmup_epochs": recipe["head_warmup_epochs"]})
    return method


def effective_method(method: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """`{"name": …}` with every setting of the method, defaults included.

    Args:
        method, recipe: Parts of a [`RunSpec`], as its file holds them.

    Raises:
        ValueError: There is no such setting, or it contradicts another.
    """
    settings = MethodSettings.from_json(method)
    return {"name": settings.name, **effective_settings(with_warmup(settings, recipe))}


def deviations(spec: RunSpec, environment: Environment | None = None) -> list[str]:
    """Where a run departs from the recipe of its suite, in words: epochs, optimizer, backbone, images.

    Args:
        spec: The run.
        environment: Its environment, if the number of images is to be compared with the published one.
    """
    recipe = RECIPES.get(spec.suite)
    if recipe is None:
        return []
    rate = recipe.learning_rates.get(spec.method.name, recipe.learning_rate)
    expected = {"epochs": recipe.epochs} | recipe.settings() | {"learning_rate": rate}
    found = _differences({"epochs": spec.epochs} | spec.recipe, expected)
    heads = {name: spec.method.get(name) for name in ("head_warmup_epochs", "head_select_at")}
    found += _differences({name: value for name, value in heads.items() if value is not None}, expected)
    if heads["head_select_at"] is not None:
        found.append(f"head_select_at {heads['head_select_at']} (recipe: after {recipe.head_warmup_epochs} epochs)")
    if recipe.backbone not in (None, spec.backbone):
        found.append(f"backbone {spec.backbone} (recipe: {recipe.backbone})")
    return found + _images(spec) + (_numbers_of_images(spec, environment) if environment is not None else [])


def describe_settings(settings: dict[str, Any]) -> str:
    """Settings in words, with a bar between several values, as a sweep has them."""
    return ", ".join(f"{name}={_words(value)}" for name, value in settings.items() if name != "name")


def merge_settings(several: list[dict[str, Any]]) -> dict[str, Any]:
    """One dictionary for several; a setting that differs has the list of its values."""
    names = dict.fromkeys(name for settings in several for name in settings)
    values = {name: unique([settings[name] for settings in several if name in settings]) for name in names}
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def _differences(values: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences, in words, among the names that both have."""
    return [
        f"{prefix}{name} {_words(values[name])} (recipe: {_words(value)})"
        for name, value in expected.items()
        if name in values and canonical_json(values[name]) != canonical_json(value)
    ]


def _images(spec: RunSpec) -> list[str]:
    """The differences in how images are read and augmented."""
    recipe, found = RECIPES[spec.suite], {}
    for part, settings in (("train", recipe.train_images), ("eval", recipe.eval_images)):
        values, expected = spec.preprocessing.get(part), Preprocessing(**settings).to_dict()
        if isinstance(values, dict):
            names = [name for name in IMAGES if name != "resize_size" or values.get("size") == expected["size"]]
            found[part] = _differences(values, {name: expected[name] for name in names})
    train, evaluation = found.get("train", []), found.get("eval", [])
    both = [text for text in train if text in evaluation]
    found = [f"images: {text}" for text in both]
    found += [f"training images: {text}" for text in train if text not in both]
    found += [f"evaluation images: {text}" for text in evaluation if text not in both]
    changes = spec.preprocessing.get("augmentation")
    return found + _differences(changes if isinstance(changes, dict) else {}, recipe.augmentation, "augmentation: ")


def _numbers_of_images(spec: RunSpec, environment: Environment) -> list[str]:
    task = next((task for task in TASKS if task.suite == spec.suite and task.name == spec.task), None)
    found = []
    for part, split in (("train", spec.train_split), ("eval", spec.eval_split)):
        data = environment.data_fingerprint.get(part)
        images = data.get("images") if isinstance(data, dict) else None
        published = None if task is None else task.size(split, spec.shots)
        if images is not None and published not in (None, images):
            found.append(f"{images:,} images in {split} (published: {published:,})")
    return found


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "|".join(map(_words, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
