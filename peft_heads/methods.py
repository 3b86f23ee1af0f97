"""The fine-tuning methods of `peft-heads train` and `peft-heads bench`: arguments, which of them go with which method, and the model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import TrainerCallback

from .backbones.classifier import classifier_names
from .backbones.structure import find_backbone
from .backbones.targets import default_targets, exact_targets
from .heads.scores import Criterion
from .heads.traversal import named_targets
from .scoring.callback import TaylorHeadScorer
from .tuners import HeadMaskedLoraConfig, RLRRConfig
from .tuners.common.calls import watch_calls
from .tuners.common.folder_config import SavedConfig
from .tuners.common.targets import check_called, module_patterns, warn_of_overlooked


@dataclass
class MethodArguments:
    """None means "not given": the defaults stand in the config classes, in one place."""

    _argument_group_name = "method"

    method: Literal["head-masked-lora", "rlrr", "lora", "linear", "full", "peft"] = field(
        default="head-masked-lora",
        metadata={"help": "What is trained besides the classification head; peft: any config given as --peft_config."},
    )
    ne: int | None = field(default=None, metadata={"help": "Heads to deactivate per group (default 1; of rlrr 0)."})
    ratio: float | None = field(default=None, metadata={"help": "Share of heads to deactivate, instead of --ne."})
    granularity: Literal["global", "layer"] | None = field(
        default=None, metadata={"help": "The same heads in every layer (default global), or each layer its own."}
    )
    joint: bool | None = field(default=None, metadata={"help": "One mask for q and v together (default true)."})
    criterion: Criterion | None = field(
        default=None, metadata={"help": "Score of a head; the lowest are deactivated (default absolute)."}
    )
    mask_scope: Literal["adapter", "head"] | None = field(
        default=None, metadata={"help": "Mask the adapter's part of a head (default) or the whole head."}
    )
    mask_seed: int | None = field(
        default=None, metadata={"help": "Seed of the criterion random (default 0); in bench, with task and seed."}
    )
    head_select_at: float | None = field(
        default=None,
        metadata={"help": "When heads are selected: below 1 a share of the steps (default 0.1), else a step."},
    )
    head_warmup_epochs: float | None = field(
        default=None, metadata={"help": "Epochs before the selection, instead of --head_select_at."}
    )
    head_window: Literal["last_epoch", "all", "last_step"] | None = field(
        default=None, metadata={"help": "The steps before the selection whose scores count (default last_epoch)."}
    )
    r: int | None = field(default=None, metadata={"help": "Rank (default 8; of rlrr 1)."})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA's alpha (default 8); s = alpha / r."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout before lora_A (default 0)."})
    bottleneck_dropout: float | None = field(
        default=None, metadata={"help": "Dropout between lora_A and lora_B, the papers' (default 0)."}
    )
    adapter_bits: int | None = field(
        default=None, metadata={"help": "Bits per adapter weight: 1, 2, 4, 8, or 32 (default), not quantised."}
    )
    classifier_bits: int | None = field(
        default=None, metadata={"help": "The same for the classification head's weight (default 32)."}
    )
    scale: float | None = field(default=None, metadata={"help": "The papers' s, instead of --lora_alpha."})
    left: bool | None = field(default=None, metadata={"help": "Whether rlrr scales rows, by S_out (default true)."})
    right: bool | None = field(default=None, metadata={"help": "Whether it scales columns, by S_in (default true)."})
    residual: bool | None = field(
        default=None, metadata={"help": "Keep the frozen weight beside the rescaled one (default true)."}
    )
    rescale_weight: bool | None = field(
        default=None, metadata={"help": "Multiply the frozen weight (default true), or add to it, as LoRA does."}
    )
    norms: bool | None = field(default=None, metadata={"help": "Scale and shift layer norms (default true)."})
    patch_embedding: bool | None = field(
        default=None, metadata={"help": "Scale and shift the patch embedding's output (default true)."}
    )
    init: Literal["kaiming", "normal", "zero", "constant", "uniform"] | None = field(
        default=None,
        metadata={"help": "Of rlrr: the paper's is kaiming (default); zero begins with the model as it is."},
    )
    shift_without_bias: bool | None = field(
        default=None, metadata={"help": "Shift layers that have no bias as well (default true)."}
    )
    peft_config: str | None = field(
        default=None,
        metadata={"help": 'PEFT config: JSON ({"peft_type": "LOHA", "r": 4}) or the path of a JSON file.'},
    )


LORA = ("r", "lora_alpha", "lora_dropout", "scale")
HEADS = ("ne", "ratio", "granularity", "joint", "criterion", "mask_scope", "mask_seed")
BITS = ("bottleneck_dropout", "adapter_bits", "classifier_bits")
RLRR = ("left", "right", "residual", "rescale_weight", "norms", "patch_embedding", "init", "shift_without_bias")
SCORER = ("head_select_at", "head_warmup_epochs", "head_window")
APPLIES = {
    "head-masked-lora": HEADS + SCORER + LORA + BITS,
    "rlrr": ("r", *RLRR, *(name for name in HEADS if name != "mask_scope"), *SCORER),
    "lora": LORA,
    "linear": (),
    "full": (),
    "peft": ("peft_config", *SCORER),  # the scorer's only if the config can deactivate heads
}


# Methods of PEFT for language models, beside those that add prompts.
NOT_FOR_IMAGES = {
    "ADAPTION_PROMPT": "adds text tokens",
    "POLY": "asks for task_ids with every batch",
    "SHADOW": "runs a smaller language model beside a decoder",
    "TRAINABLE_TOKENS": "trains rows of the embedding of text tokens",
    "XLORA": "mixes saved adapters of a language model",
}


def check_method_arguments(args: MethodArguments) -> None:
    """Raise ValueError for arguments that contradict each other or would do nothing, before anything is loaded."""
    useless = [name for name in _given(args) if name not in APPLIES[args.method]]
    if useless:
        names = ", ".join(f"--{name}" for name in useless)
        raise ValueError(f"{names} {_does(useless)} not apply to --method {args.method}")
    for one, other in (("scale", "lora_alpha"), ("ne", "ratio"), ("head_select_at", "head_warmup_epochs")):
        if getattr(args, one) is not None and getattr(args, other) is not None:
            raise ValueError(f"--{one} and --{other} say the same thing: give one of them")
    if args.method == "peft":
        settings = read_peft_config(args.peft_config)
        if settings["peft_type"] in NOT_FOR_IMAGES:
            reason = NOT_FOR_IMAGES[settings["peft_type"]]
            raise ValueError(f"{settings['peft_type']} {reason}: it does not work on image classifiers")
        scorer = [f"--{name}" for name in _given(args) if name in SCORER]
        if scorer and settings["peft_type"] not in ("HEAD_MASKED_LORA", "RLRR"):
            raise ValueError(f"{', '.join(scorer)} {_does(scorer)} not apply to peft_type {settings['peft_type']}")
    of_heads = [f"--{name}" for name in _given(args) if name in (*HEADS, *SCORER) and name not in ("ne", "ratio")]
    if args.method == "rlrr" and of_heads and not (args.ne or args.ratio):
        raise ValueError(
            f"{', '.join(of_heads)} {_does(of_heads)} not apply to --method rlrr without --ne or --ratio: no head is "
            "deactivated"
        )


def apply_method(model: nn.Module, args: MethodArguments) -> tuple[nn.Module, list]:
    """The model as it is trained, and the callbacks it needs (a `TaylorHeadScorer`, or none)."""
    if args.method == "full":
        return model, []
    if args.method == "linear":
        return _freeze_all_but_the_head(model), []

    config = _adapter_config(model, args)
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} adds text tokens: it does not work on image classifiers")
    if not isinstance(config, SavedConfig):
        _check_targets(model, config)
    # one of PEFT's methods may stumble over anything
    expected = (ValueError, TypeError) if isinstance(config, SavedConfig) else Exception
    try:
        model = get_peft_model(model, config)
    except expected as error:
        raise ValueError(f"{args.method}: {str(error) or type(error).__name__}") from error
    watch_calls(model)
    if hasattr(model.base_model, "update_and_allocate"):
        return model, [RankAllocator(model)]
    if not scores_heads(config):
        return model, []
    window = {} if args.head_window is None else {"window": args.head_window}
    scorer = TaylorHeadScorer(select_at=args.head_select_at, warmup_epochs=args.head_warmup_epochs, **window)
    return model, [scorer]


class RankAllocator(TrainerCallback):
    """Lets methods that allocate their ranks while they train (AdaLoRA, AdaMSS) do so, which PEFT leaves to the loop."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """The gradients are still there; `global_step` counts this step only afterwards."""
        self.model.base_model.update_and_allocate(state.global_step)


def effective_settings(args: MethodArguments) -> dict[str, Any]:
    """Every setting of a method by its name on the command line, given or by default; needs no model.

    Settings of heads and of their selection are left out where no head is deactivated.

    Raises:
        ValueError: The arguments contradict each other.
    """
    given = {name: getattr(args, name) for name in _given(args)}
    if args.method == "peft":
        return read_peft_config(args.peft_config) | {name: given[name] for name in given if name in SCORER}
    config_class = {"head-masked-lora": HeadMaskedLoraConfig, "rlrr": RLRRConfig, "lora": LoraConfig}.get(args.method)
    if config_class is None:
        return {}
    own = {name: value for name, value in given.items() if name not in ("scale", *SCORER)}
    if "scale" in given:
        own["lora_alpha"] = given["scale"] * own.get("r", config_class.r)
    config = config_class(**own)
    settings = {name: getattr(config, name, None) for name in APPLIES[args.method]}
    if "lora_alpha" in settings:
        settings["scale"] = config.lora_alpha / config.r
    if isinstance(config, SavedConfig):
        window = {} if args.head_window is None else {"window": args.head_window}
        scorer = TaylorHeadScorer(select_at=args.head_select_at, warmup_epochs=args.head_warmup_epochs, **window)
        settings |= {"head_select_at": scorer.select_at, "head_warmup_epochs": scorer.warmup_epochs}
        settings["head_window"] = scorer.window
        if not (config.ne or config.ratio):
            settings = {name: value for name, value in settings.items() if name not in HEADS + SCORER or name == "ne"}
    return {name: value for name, value in settings.items() if value is not None}


def scores_heads(config: PeftConfig) -> bool:
    """Whether an adapter's heads are scored while it trains: head-masked LoRA always, RLRR if it deactivates any."""
    return isinstance(config, HeadMaskedLoraConfig) or getattr(config, "masks_heads", False)


def has_scored_heads(model: nn.Module) -> bool:
    """Whether the model has an adapter whose heads are scored while it trains."""
    return any(scores_heads(config) for config in getattr(model, "peft_config", {}).values())


def read_peft_config(text: str | None) -> dict:
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


def _adapter_config(model: nn.Module, args: MethodArguments):
    settings = {name: getattr(args, name) for name in _given(args) if name in HEADS + LORA + BITS + RLRR}
    config_class = {"head-masked-lora": HeadMaskedLoraConfig, "rlrr": RLRRConfig}.get(args.method, LoraConfig)
    if args.method == "peft":
        settings = read_peft_config(args.peft_config)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[settings.pop("peft_type")]
    elif "scale" in settings:
        settings["lora_alpha"] = settings.pop("scale") * settings.get("r", config_class.r)
    if float(settings.get("lora_alpha", 0.5)).is_integer():
        settings["lora_alpha"] = int(settings["lora_alpha"])
    try:
        return config_class(**{**_default_modules(model, config_class, settings), **settings})
    except (ValueError, TypeError) as error:
        raise ValueError(str(error)) from error


def _default_modules(model: nn.Module, config_class: type, settings: dict) -> dict[str, list[str] | str]:
    """Query and value projections and the classification head, where the config has such fields.

    LN tuning gets the norms.
    """
    if issubclass(config_class, SavedConfig):
        return {}  # ours find them by themselves
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


def _check_targets(model: nn.Module, config: PeftConfig) -> None:
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


def _freeze_all_but_the_head(model: nn.Module) -> nn.Module:
    heads = classifier_names(model)
    if not heads:
        raise ValueError(f"--method linear: {type(model).__name__} has no classification head")
    model.requires_grad_(False)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    return model


def _given(args: MethodArguments) -> list[str]:
    return [f.name for f in dataclasses.fields(args) if f.name != "method" and getattr(args, f.name) is not None]


def _does(names: list[str]) -> str:
    return "does" if len(names) == 1 else "do"
