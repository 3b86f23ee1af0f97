"""Every fact tied to a version of peft, transformers or torch, each with the condition for deleting it."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import peft
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import tuners_utils
from peft.utils import PeftType, hotswap, register_peft_method
from torch import nn


if TYPE_CHECKING:
    from transformers import BaseImageProcessor

_OWN_CONFIGS: list[type[PeftConfig]] = []

# The methods, private to PEFT, that our tuners extend. One that PEFT stops calling would be missed without a word: no
# layer would be masked, no mask be saved. Delete what becomes public.
TUNER_HOOKS = (
    "_cast_adapter_dtype",
    "_convert_state_dict_for_initial_model",
    "_create_and_replace",
    "_create_new_module",
    "_get_adapter_state_dict",
    "_prepare_adapter_config",
    "_remap_adapter_state_dict_for_load",
    "_replace_module",
    "_unload_and_optionally_merge",
)


def is_own(config: Any) -> bool:
    """Whether a configuration is of a method registered here. What this module extends leaves all others alone."""
    return isinstance(config, tuple(_OWN_CONFIGS))


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType.<name>`, creating the member if PEFT does not know it.

    `register_peft_method` refuses names that are not members of the enum, and Python's enums are closed. A true
    `str` member is added, so that lookup by name and value, comparison with the plain string, copy and pickle work.

    Delete when PEFT accepts methods from outside (https://github.com/huggingface/peft/issues/2273).
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register_tuner(*, name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner with PEFT under `name` (lower case). Doing so twice is harmless.

    Our tuners share the prefix of the method they extend (`lora_`). PEFT lets that pass only because it looks the
    prefix up among the keys instead of the values of its table; should that be mended, the tables are filled here.

    Delete the fallback when PEFT lets two methods share a prefix on purpose.

    Raises:
        ImportError: The installed PEFT has other hooks than those that the tuner extends.
    """
    check_hooks(model_cls)
    peft_type = add_peft_type(name.upper())
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) is not config_cls:
        _fill_tables(name, peft_type, config_cls, model_cls)
    if config_cls not in _OWN_CONFIGS:
        _OWN_CONFIGS.append(config_cls)


def _fill_tables(name: str, peft_type: PeftType, config_cls: type, model_cls: type) -> None:
    try:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    except KeyError:
        if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:  # a different class of the same name: a real conflict
            raise
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls


def check_hooks(model_cls: type) -> None:
    """Raise ImportError if a tuner of ours extends a private method that PEFT's tuners no longer have."""
    theirs = [cls for cls in model_cls.__mro__ if cls.__module__.partition(".")[0] == "peft"]
    ours = [cls for cls in model_cls.__mro__ if cls.__module__.partition(".")[0] == __package__]
    lost = [
        name
        for name in TUNER_HOOKS
        if any(name in vars(cls) for cls in ours) and not any(hasattr(cls, name) for cls in theirs)
    ]
    if lost:
        raise ImportError(
            f"{model_cls.__name__} extends {', '.join(lost)}, which peft {peft.__version__} no longer has: heads would "
            "stay on without a word. Install peft 0.21, or a newer peft-heads"
        )


def allow_hotswap(name: str, *keys: str) -> None:
    """Let `hotswap_adapter` swap adapters of a LoRA-like type whose configurations agree in LoRA's keys and in `keys`.

    Where PEFT has no such table, or no such check as `extend_hotswap_check` extends, it is left to refuse ours.

    Delete when PEFT asks the tuner instead of a table.
    """
    if hasattr(hotswap, "CONFIG_KEYS_TO_CHECK") and hasattr(hotswap, "check_hotswap_configs_compatible"):
        hotswap.CONFIG_KEYS_TO_CHECK[PeftType[name.upper()]] = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], *keys]


def delegate_config_loading() -> None:
    """Let `PeftConfig.from_pretrained` hand over to `from_pretrained` of our class where it finds one in the file.

    It only constructs that class, so that one which reads more than `adapter_config.json` would miss the rest.

    Delete when PEFT delegates.
    """
    load = PeftConfig.from_pretrained.__func__
    if hasattr(load, "extended_by_peft_heads"):
        return

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        config = load(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        own = type(config).from_pretrained.__func__
        if cls is PeftConfig and is_own(config) and own is not from_pretrained:
            return type(config).from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return config

    from_pretrained.extended_by_peft_heads = True
    PeftConfig.from_pretrained = classmethod(from_pretrained)


def extend_hotswap_check(check: Callable[[PeftConfig, PeftConfig], None]) -> None:
    """Call `check(old config, new config)` whenever PEFT has found two adapters of ours fit for hot-swapping.

    Delete when PEFT asks the tuner instead of a table.
    """
    compare = getattr(hotswap, "check_hotswap_configs_compatible", None)
    if compare is None or hasattr(compare, "extended_by_peft_heads"):
        return

    @functools.wraps(compare)
    def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig, *args: Any, **kwargs: Any):
        result = compare(config0, config1, *args, **kwargs)
        if is_own(config0) and is_own(config1):
            check(config0, config1)
        return result

    check_hotswap_configs_compatible.extended_by_peft_heads = True
    hotswap.check_hotswap_configs_compatible = check_hotswap_configs_compatible


def expand_all_linear(config: PeftConfig, model: nn.Module) -> None:
    """Replace `target_modules="all-linear"` by the names it stands for, as PEFT does a little later.

    Delete when PEFT offers this, or expands before `_prepare_adapter_config`.

    Raises:
        ValueError: The installed PEFT has no such function, which is private to it.
    """
    expand = getattr(tuners_utils, "_maybe_include_all_linear_layers", None)
    if expand is not None:
        expand(config, model)
    elif str(config.target_modules).lower() == "all-linear":
        raise ValueError(
            f"peft_heads cannot ask peft {peft.__version__} which layers target_modules='all-linear' stands for; name "
            "the modules, or leave target_modules out"
        )


def silence_known_warnings() -> None:
    """Keep warnings between Hugging Face libraries, about which a user can do nothing, off the command line.

    Delete when PEFT asks for `is_activation_checkpointing` (peft 0.21 on transformers 5.23 and later).
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def load_pil_image_processor(name_or_path: str | os.PathLike, **kwargs: Any) -> BaseImageProcessor:
    """`AutoImageProcessor.from_pretrained` with the PIL backend, which needs no torchvision.

    transformers 5.1 to 5.18 replaces the name in its top module by one that only raises where torchvision is missing,
    although the class works; and before 5.1 the backend is chosen by `use_fast`.

    Delete when transformers 5.19 is the oldest that is supported.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    has_backends = importlib.util.find_spec("transformers.image_processing_backends") is not None
    choice = {"backend": "pil"} if has_backends else {"use_fast": False}
    return AutoImageProcessor.from_pretrained(name_or_path, **choice, **kwargs)


def mismatched_keys(loading_info: dict[str, Any]) -> list[str]:
    """Names of the weights that `from_pretrained(…, output_loading_info=True)` found in another shape.

    Delete when transformers 5.0 is the oldest that is supported: before, the entries have no shapes beside the name.
    """
    return sorted(entry if isinstance(entry, str) else entry[0] for entry in loading_info["mismatched_keys"])


def support_peft_in_image_pipelines() -> None:
    """Let `pipeline("image-classification", model=peft_model)` know that a PeftModel is fine.

    It works without, after an error in the log that lists every class but PeftModel.

    Delete when transformers lists PEFT's models for this task.
    """
    from transformers.pipelines import base

    supported = getattr(base, "SUPPORTED_PEFT_TASKS", None)
    if supported is not None and "PeftModel" not in supported.setdefault("image-classification", []):
        supported["image-classification"].append("PeftModel")


def extend_model_card(extend: Callable[[PeftModel, str], None]) -> None:
    """Call `extend(peft_model, folder)` whenever PEFT has written a model's card, and once more before an upload.

    Three places write `README.md`: `PeftModel.save_pretrained`, `Trainer.create_model_card`, which starts anew and
    then calls `PeftModel.create_or_update_model_card`, and transformers' `push_to_hub`, which overwrites with the
    Hub's template of blanks the card that `save_pretrained` has written a moment before. The card of an adapter of
    ours is written again before an upload; that of another is the one which transformers uploads.

    Delete the second part when `PushToHubMixin.push_to_hub` keeps that card; delete both when PEFT has a hook for
    methods from outside.
    """
    write_card = PeftModel.create_or_update_model_card
    if hasattr(write_card, "extended_by_peft_heads"):
        return

    @functools.wraps(write_card)
    def create_or_update_model_card(self, output_dir: str, *args: Any, **kwargs: Any):
        result = write_card(self, output_dir, *args, **kwargs)
        extend(self, output_dir)
        return result

    create_or_update_model_card.extended_by_peft_heads = True
    PeftModel.create_or_update_model_card = create_or_update_model_card
    upload = getattr(PeftModel, "_upload_modified_files", None)
    if upload is None:  # private to transformers: pushing works without, with the template for a card
        return

    @functools.wraps(upload)
    def _upload_modified_files(self, working_dir, *args, **kwargs):
        if is_own(self.active_peft_config):
            self.create_or_update_model_card(str(working_dir))
        else:
            extend(self, working_dir)
        return upload(self, working_dir, *args, **kwargs)

    PeftModel._upload_modified_files = _upload_modified_files
