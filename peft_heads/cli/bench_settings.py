"""What `peft-heads bench` says before it runs: the settings in effect, and where they depart from the recipe."""

from __future__ import annotations

from typing import Any

from ..benchmark.records.effective import describe_settings, deviations, effective_method, merge_settings
from ..benchmark.records.environment import source_state
from ..benchmark.records.run_record import RunSpec


def effective_lines(specs: list[RunSpec], any_size: bool = False) -> list[str]:
    """Lines for a terminal about runs of one suite.

    Args:
        specs: Runs of all methods and tasks; one seed of each is enough.
        any_size: Whether trees may have other numbers of images than the published ones.
    """
    methods: dict[str, list[dict[str, Any]]] = {}
    for spec in specs:
        methods.setdefault(spec.method.name, []).append(effective_method(spec.method.to_json(), spec.recipe))
    recipe = merge_settings([{"epochs": spec.epochs} | spec.recipe for spec in specs])
    recipe.pop("head_warmup_epochs", None)  # is shown with the methods that it concerns
    departs = list(dict.fromkeys(text for spec in specs for text in deviations(spec)))
    if any_size:
        departs.append("trees with any number of images (--any_size)")
    unofficial = source_state()[1]
    return [
        "in effect",
        *(f"  method      {name}: {describe_settings(merge_settings(own))}" for name, own in methods.items()),
        f"  recipe      {specs[0].suite}: {describe_settings(recipe)}",
        f"  backbone    {', '.join(dict.fromkeys(spec.backbone for spec in specs))}",
        *(f"  {part:11} {text}" for part, text in _images(specs).items()),
        f"  departs from the recipe of {specs[0].suite}: {'; '.join(departs) or 'nowhere'}",
        f"  results     {'un' if unofficial else ''}official: of {'un' if unofficial else ''}committed code",
    ]


def _images(specs: list[RunSpec]) -> dict[str, str]:
    """How training and evaluation images are read."""
    parts = {"train": "images", "eval": "evaluated"}
    return {
        title: describe_settings(merge_settings([_image_settings(spec.preprocessing[part]) for spec in specs]))
        for part, title in parts.items()
    }


def _image_settings(preprocessing: dict[str, Any]) -> dict[str, Any]:
    names = ("size", "resize", "crop", "filter", "normalization")
    settings = {name: preprocessing[name] for name in names}
    if "image_range" in preprocessing:
        settings["image_range"] = "{} to {}".format(*preprocessing["image_range"])
    return settings
