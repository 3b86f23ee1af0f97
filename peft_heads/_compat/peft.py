"""Facts about PEFT: types, tables, configurations, model cards."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import tuners_utils
from peft.utils import PeftType, register_peft_method
from torch import nn

from .overrides import check_hooks


# PEFT's own types, before a method of ours adds one.
PEFT_TYPES = frozenset(PeftType.__members__)

OWN_CONFIGS: list[type[PeftConfig]] = []

_READING_CONFIG: ContextVar[bool] = ContextVar("reading_config", default=False)


def is_own(config: Any) -> bool:
    """Whether a configuration is of a method registered here; what this module extends leaves all others alone."""
    return isinstance(config, tuple(OWN_CONFIGS))


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
    if config_cls not in OWN_CONFIGS:
        OWN_CONFIGS.append(config_cls)


def _fill_tables(name: str, peft_type: PeftType, config_cls: type, model_cls: type) -> None:
    try:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    except KeyError:
        if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:  # a different class of the same name: a real conflict
            raise
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls


def delegate_config_loading() -> None:
    """Let `PeftConfig.from_pretrained` call `from_pretrained` of our class where the file names one.

    PEFT only constructs the class, which would then miss what it reads beside `adapter_config.json`.

    Delete when PEFT delegates.
    """
    load = PeftConfig.from_pretrained.__func__
    if hasattr(load, "extended_by_peft_heads"):
        return

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        found = own_config_class(pretrained_model_name_or_path, subfolder) if cls is PeftConfig else None
        if found is not None:
            return found.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        token = _READING_CONFIG.set(True)
        try:
            config = load(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        finally:
            _READING_CONFIG.reset(token)
        own = type(config).from_pretrained.__func__
        if cls is PeftConfig and is_own(config) and own is not from_pretrained:
            return type(config).from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return config

    from_pretrained.extended_by_peft_heads = True
    PeftConfig.from_pretrained = classmethod(from_pretrained)


def is_reading_config() -> bool:
    """Whether the configuration that is being created is read from a file, rather than new.

    Delete when PEFT tells a configuration where it comes from.
    """
    return _READING_CONFIG.get()


def own_config_class(folder: str | os.PathLike, subfolder: str | None) -> type[PeftConfig] | None:
    """Our class of the configuration in a local folder, whatever else is wrong with it; None if it is not ours."""
    path = os.path.join(folder, subfolder or "")
    try:
        found = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(path)] if os.path.isdir(path) else None
    except Exception:  # PEFT says what is wrong with it
        return None
    return found if found in OWN_CONFIGS else None


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


def split_download_kwargs(config_class: type[PeftConfig], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that are `hf_hub_download`'s.

    Delete when PEFT has a public name for it.
    """
    download_kwargs, *_ = config_class._split_kwargs(kwargs)
    return download_kwargs


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
