"""Methods that have their tuner from PEFT, or need none: LoRA, any other of PEFT's, the classifier alone, everything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LNTuningConfig, LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..backbones.classifier import classifier_names
from ..backbones.structure import find_backbone
from ..backbones.targets import default_targets, exact_targets
from ..heads.traversal import named_targets
from .common.method_registry import Method
from .common.options import LORA_OPTIONS, SCALES, SCORER_OPTIONS, Option
from .common.targets import check_called, module_patterns, warn_of_overlooked


# Methods of PEFT for language models, beside those that add prompts.
NOT_FOR_IMAGES = {
    "ADAPTION_PROMPT": "adds text tokens",
    "POLY": "asks for task_ids with every batch",
    "SHADOW": "runs a smaller language model beside a decoder",
    "TRAINABLE_TOKENS": "trains rows of the embedding of text tokens",
    "XLORA": "mixes saved adapters of a language model",
}


def read_peft_config(text: str | None) -> dict[str, Any]:
    """`--peft_config` as a dict with a known `peft_type`; raises ValueError or FileNotFoundError."""
    if text is None:
        raise ValueError("--method peft needs --peft_config")
    name = "--peft_config"
    try:
        if not text.lstrip().startswith("{"):
            if not Path(text).is_file():
                raise FileNotFoundError(f"--peft_config {text!r} is neither JSON nor a file")
            name = f"--peft_config {text}"
            text = Path(text).read_text(encoding="utf-8")
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no valid JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"{name} needs a peft_type that is one of {known}")
    unknown = set(settings) - {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]])}
    if unknown:
        raise ValueError(f"--peft_config: {settings['peft_type']} has no {', '.join(sorted(unknown))}")
    return settings


def check_for_images(peft_type: str) -> None:
    """Raise ValueError for a method of PEFT that language models alone can use."""
    if peft_type in NOT_FOR_IMAGES:
        raise ValueError(f"{peft_type} {NOT_FOR_IMAGES[peft_type]}: it does not work on image classifiers")


def default_modules(model: nn.Module, config_class: type, settings: Mapping[str, Any]) -> dict[str, list[str] | str]:
    """Modules for a method of PEFT, where its configuration has such fields and the settings name none.

    Query and value projections and the classifier; LN tuning gets the norms.
    """
    fields = {f.name for f in dataclasses.fields(config_class)}
    defaults = {"modules_to_save": classifier_names(model)}
    if "target_modules" in fields and settings.get("target_modules") is None:
        defaults["target_modules"] = _default_targets(model, config_class)
    if "feedforward_modules" in fields:  # IA3 wants to be told that none of its targets is an MLP layer
        defaults["feedforward_modules"] = []
    return {name: modules for name, modules in defaults.items() if name in fields}


def _default_targets(model: nn.Module, config_class: type) -> list[str] | str:
    if not issubclass(config_class, LNTuningConfig):
        warn_of_overlooked(model)
        return default_targets(model)
    norms = find_backbone(model).norms
    if not norms:
        raise ValueError(f"LN_TUNING trains norms, but no layer norm was recognised in {type(model).__name__}")
    return exact_targets(list(norms), model)


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise ValueError if a method of PEFT could not act on what it is given, or is not meant for it."""
    if not getattr(config, "target_modules", None):
        return
    modules = {name: module for name, module in named_targets(model) if check_target_module_exists(config, name)}
    check_called(model, list(modules))
    others = [name for name, module in modules.items() if "Norm" not in type(module).__name__]
    if isinstance(config, LNTuningConfig) and others:
        kinds = ", ".join(dict.fromkeys(type(modules[name]).__name__ for name in others))
        raise ValueError(
            f"LN_TUNING trains norms, but target_modules means {module_patterns(others)} ({kinds}); leave target_modules "
            "out for the norms of the backbone"
        )


def _train_the_classifier_alone(model: nn.Module) -> nn.Module:
    classifiers = classifier_names(model)
    if not classifiers:
        raise ValueError(f"--method linear: {type(model).__name__} has no classifier")
    model.requires_grad_(False)
    for name in classifiers:
        model.get_submodule(name).requires_grad_(True)
    return model


STOCK_METHODS = (
    Method(
        name="lora",
        help="LoRA, PEFT's own",
        config=LoraConfig,
        options=LORA_OPTIONS,
        grid={"r": 8, "scale": SCALES},
        shown=("r", "lora_alpha", "use_dora"),
    ),
    Method(name="linear", help="nothing but the classifier", apply=_train_the_classifier_alone),
    Method(name="full", help="the whole model", apply=lambda model: model),
    Method(
        name="peft",
        help="any method of PEFT, by --peft_config",
        read_config=lambda settings: read_peft_config(settings.get("peft_config")),
        options=(
            Option(
                "peft_config", str, 'PEFT config: JSON ({"peft_type": "LOHA", "r": 4}) or the path of a JSON file.'
            ),
            *SCORER_OPTIONS,  # apply only if the configuration can deactivate heads
        ),
    ),
)
