"""Every fact tied to a version of peft, transformers or torch, each with the condition for deleting it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import PeftType, hotswap, register_peft_method
from torch import nn


if TYPE_CHECKING:
    from transformers import BaseImageProcessor


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
    """
    peft_type = add_peft_type(name.upper())
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) is config_cls:
        return
    try:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    except KeyError:
        if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:  # a different class of the same name: a real conflict
            raise
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls


def allow_hotswap(name: str, *keys: str) -> None:
    """Let `hotswap_adapter` swap adapters of a LoRA-like type whose configurations agree in LoRA's keys and in `keys`.

    Delete when PEFT asks the tuner instead of a table.
    """
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType[name.upper()]] = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], *keys]


def delegate_config_loading() -> None:
    """Let `PeftConfig.from_pretrained` hand over to the `from_pretrained` of the class that it finds in the file.

    It only constructs that class, so that one which reads more than `adapter_config.json` would miss the rest.

    Delete when PEFT delegates.
    """
    load = PeftConfig.from_pretrained.__func__
    if hasattr(load, "extended_by_peft_heads"):
        return

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        found = _config_class(pretrained_model_name_or_path, subfolder) if cls is PeftConfig else None
        if found is not None and found.from_pretrained.__func__ is not from_pretrained:
            return found.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config = load(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        own = type(config).from_pretrained.__func__
        if cls is PeftConfig and own is not from_pretrained:
            return type(config).from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return config

    from_pretrained.extended_by_peft_heads = True
    PeftConfig.from_pretrained = classmethod(from_pretrained)


def _config_class(folder: str | os.PathLike, subfolder: str | None) -> type[PeftConfig] | None:
    """The class of a local folder's configuration, whatever else is wrong with it; None where that cannot be known."""
    path = os.path.join(folder, subfolder or "")
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(path)] if os.path.isdir(path) else None
    except Exception:  # PEFT says what is wrong with it
        return None


def extend_hotswap_check(check: Callable[[PeftConfig, PeftConfig], None]) -> None:
    """Call `check(old config, new config)` whenever PEFT has found two adapters fit for hot-swapping.

    Delete when PEFT asks the tuner instead of a table.
    """
    compare = hotswap.check_hotswap_configs_compatible
    if hasattr(compare, "extended_by_peft_heads"):
        return

    @functools.wraps(compare)
    def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
        compare(config0, config1)
        check(config0, config1)

    check_hotswap_configs_compatible.extended_by_peft_heads = True
    hotswap.check_hotswap_configs_compatible = check_hotswap_configs_compatible


@dataclass
class Loading:
    """A saved adapter that is being loaded, as its user has said it.

    Attributes:
        key_mapping, ignore_mismatched_sizes: As of `PeftModel.from_pretrained`.
        checked: Configurations whose folders have been found to fit the model.
    """

    key_mapping: dict[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    checked: list[PeftConfig] = field(default_factory=list)


_loading: ContextVar[Loading | None] = ContextVar("peft_heads_loading", default=None)


def current_loading() -> Loading | None:
    """The loading that is going on; None where an adapter is created, or weights are given as a dict."""
    return _loading.get()


@contextmanager
def loading_begins(loading: Loading) -> Iterator[Loading]:
    """Inside the block, a saved adapter is being loaded."""
    token = _loading.set(loading)
    try:
        yield loading
    finally:
        _loading.reset(token)


def announce_loading(
    check: Callable[[nn.Module, str, dict[str, Any], Loading], None],
    is_ours: Callable[[PeftConfig], bool],
    take_weights: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Let tuners know that a saved folder is being loaded: PEFT tells them neither this nor what its user has said.

    A folder that is loaded into an adapter which exists, or hot-swapped, is checked before PEFT reads it; an adapter
    that was added and whose weights then cannot be loaded is taken out again.

    Delete when PEFT hands tuners the source and the arguments of `load_adapter`.

    Args:
        check: Called with model, configuration and source (arguments of `hf_hub_download`); raises ValueError.
        is_ours: Whether a configuration is one of ours.
        take_weights: Of what a file holds, what hot-swapping may write.
    """
    if hasattr(PeftModel.load_adapter, "extended_by_peft_heads"):
        return
    create, load, swap = (
        PeftModel.from_pretrained.__func__,
        PeftModel.load_adapter,
        hotswap.hotswap_adapter_from_state_dict,
    )

    @functools.wraps(create)
    def from_pretrained(cls, model: nn.Module, *args: Any, **kwargs: Any):
        given = inspect.signature(create).bind(cls, model, *args, **kwargs).arguments
        # the same default as PEFT's
        mapping = given.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
        ignore = given.get("kwargs", {}).get("ignore_mismatched_sizes", False)
        with loading_begins(Loading(mapping, ignore)):
            return create(cls, model, *args, **kwargs)

    @functools.wraps(load)
    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any):
        given = inspect.signature(load).bind(self, model_id, adapter_name, *args, **kwargs).arguments
        rest = given.get("kwargs", {})
        outer, exists = current_loading(), adapter_name in self.peft_config
        own = Loading(given.get("key_mapping"), rest.get("ignore_mismatched_sizes", False))
        with loading_begins(outer or own) as loading:
            if exists and is_ours(self.peft_config[adapter_name]):
                config = self.peft_config[adapter_name]
                if not any(config is other for other in loading.checked):
                    download_kwargs, _ = self._split_kwargs(rest)
                    check(self, config, {"path_or_repo": os.fspath(model_id), **download_kwargs}, loading)
            try:
                return load(self, model_id, adapter_name, *args, **kwargs)
            except BaseException:
                if not exists and adapter_name in self.peft_config and is_ours(self.peft_config[adapter_name]):
                    self.delete_adapter(adapter_name)
                raise

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, *args: Any, **kwargs: Any):
        if is_ours(config):
            if config.source is not None:
                check(getattr(model, "_orig_mod", model), config, config.source, Loading())
            state_dict = take_weights(state_dict)
        return swap(model, state_dict, adapter_name, config, *args, **kwargs)

    load_adapter.extended_by_peft_heads = True
    PeftModel.from_pretrained = classmethod(from_pretrained)
    PeftModel.load_adapter = load_adapter
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict


def announce_loading_by_transformers() -> None:
    """The same for `model.load_adapter` of transformers, which hands tuners a configuration alone.

    Delete together with `announce_loading`.
    """
    from transformers.integrations.peft import PeftAdapterMixin

    load = PeftAdapterMixin.load_adapter
    if hasattr(load, "extended_by_peft_heads"):
        return

    @functools.wraps(load)
    def load_adapter(self, *args: Any, **kwargs: Any):
        given = inspect.signature(load).bind(self, *args, **kwargs).arguments
        if given.get("adapter_state_dict") is not None:
            return load(self, *args, **kwargs)
        ignored = self._keys_to_ignore_on_load_unexpected
        # our tuners read it themselves; to transformers it is a weight without a place
        self._keys_to_ignore_on_load_unexpected = {*(ignored or ()), r"(lora|rlrr)_settings"}
        try:
            with loading_begins(Loading(getattr(self, "_checkpoint_conversion_mapping", None))):
                return load(self, *args, **kwargs)
        finally:
            self._keys_to_ignore_on_load_unexpected = ignored

    load_adapter.extended_by_peft_heads = True
    PeftAdapterMixin.load_adapter = load_adapter


def expand_all_linear(config: PeftConfig, model: nn.Module) -> None:
    """Replace `target_modules="all-linear"` by the names it stands for, as PEFT does a little later.

    Delete when PEFT offers this, or expands before `_prepare_adapter_config`.
    """
    _maybe_include_all_linear_layers(config, model)


def silence_known_warnings() -> None:
    """Keep warnings between Hugging Face libraries, about which a user can do nothing, off the command line.

    Delete when PEFT asks for `is_activation_checkpointing` (peft 0.21 on transformers 5.23).
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
    kwargs.setdefault("trust_remote_code", False)  # not given, transformers asks on stdin
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
    Hub's template of blanks the card that `save_pretrained` has written a moment before.

    Delete the second part when `PushToHubMixin.push_to_hub` keeps that card; delete both when PEFT has a hook for
    methods from outside.
    """
    write_card = PeftModel.create_or_update_model_card
    upload = getattr(PeftModel, "_upload_modified_files", None)
    if hasattr(write_card, "extended_by_peft_heads"):
        return

    @functools.wraps(write_card)
    def create_or_update_model_card(self, output_dir: str):
        write_card(self, output_dir)
        extend(self, output_dir)

    create_or_update_model_card.extended_by_peft_heads = True
    PeftModel.create_or_update_model_card = create_or_update_model_card
    if upload is None:  # private to transformers: pushing works without, with the template for a card
        return

    @functools.wraps(upload)
    def _upload_modified_files(self, working_dir, *args, **kwargs):
        self.create_or_update_model_card(str(working_dir))
        return upload(self, working_dir, *args, **kwargs)

    PeftModel._upload_modified_files = _upload_modified_files
