"""The loading of adapters by transformers itself (`model.load_adapter`), which asks no tuner."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
)
from peft.utils import CONFIG_NAME, PeftType

from .loading import Loading, current_loading, loading_begins
from .peft import OWN_CONFIGS, is_own, own_config_class


def extend_weight_mapping(name: str, converters: Callable[[str], list]) -> None:
    """Let transformers' own `load_adapter` convert the masks of a file of the PEFT type `name` (lower case).

    `converters` returns the conversions of an adapter's masks, given the adapter's name.

    transformers 5 reads the file by a list of renamings and conversions, without asking the tuner. The list is made in
    PEFT, before transformers 5.10 or so in transformers itself.

    Delete when `load_adapter` goes through `set_peft_model_state_dict` again, as in transformers 4.
    """
    if importlib.util.find_spec("transformers.core_model_loading") is None:  # transformers 4
        return
    from peft.utils import transformers_weight_conversion
    from transformers.integrations import peft as integration

    def extended(build: Callable) -> Callable:
        @functools.wraps(build)
        def build_peft_weight_mapping(weight_conversions, adapter_name, peft_config=None):
            mapping = build(weight_conversions, adapter_name, peft_config=peft_config)
            if mapping and getattr(peft_config, "peft_type", None) == PeftType[name.upper()]:
                mapping = [*mapping, *converters(adapter_name)]
            return mapping

        build_peft_weight_mapping.extended_by_peft_heads = {*getattr(build, "extended_by_peft_heads", ()), name}
        return build_peft_weight_mapping

    for module in (transformers_weight_conversion, integration):
        for function in ("build_peft_weight_mapping", "_build_peft_weight_mapping"):
            build = getattr(module, function, None)
            if build is not None and name not in getattr(build, "extended_by_peft_heads", ()):
                setattr(module, function, extended(build))


def announce_loading_by_transformers() -> None:
    """The same for `model.load_adapter` of transformers, which passes tuners a configuration alone.

    Its report leaves out what is no fault of our files (`no_faults`).

    Delete together with `announce_loading`.
    """
    from transformers.integrations import peft as integration
    from transformers.integrations.peft import PeftAdapterMixin

    load = PeftAdapterMixin.load_adapter
    if hasattr(load, "extended_by_peft_heads"):
        return

    @functools.wraps(load)
    def load_adapter(self, *args: Any, **kwargs: Any):
        given = inspect.signature(load).bind(self, *args, **kwargs).arguments
        if given.get("adapter_state_dict") is not None or _is_of_others(given):
            return load(self, *args, **kwargs)
        with loading_begins(Loading(getattr(self, "_checkpoint_conversion_mapping", None))):
            return load(self, *args, **kwargs)

    load_adapter.extended_by_peft_heads = True
    PeftAdapterMixin.load_adapter = load_adapter
    report = getattr(integration, "log_state_dict_report", None)
    if report is None:  # transformers 4 reports in another way
        return

    @functools.wraps(report)
    def log_state_dict_report(*args: Any, **kwargs: Any):
        info = inspect.signature(report).bind(*args, **kwargs).arguments["loading_info"]
        if current_loading() is not None:
            for kind, pattern in no_faults().items():
                keys = getattr(info, kind)
                setattr(info, kind, type(keys)(key for key in keys if not re.search(pattern, key)))
        return report(*args, **kwargs)

    integration.log_state_dict_report = log_state_dict_report


def no_faults() -> dict[str, str]:
    """Patterns of keys of our adapters that transformers would report as faults, by kind.

    A missing mask means that all heads are active. Noted settings, whose key is the tuner's prefix and "settings", have
    no place in a model, and the tuner has read them.
    """
    own = {PEFT_TYPE_TO_PREFIX_MAPPING[x] for x, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls in OWN_CONFIGS}
    prefixes = "|".join(sorted(map(re.escape, own)))
    return {"missing_keys": r"_(head|neuron)_mask\..*\.off$", "unexpected_keys": rf"(^|\.)({prefixes})settings\b"}


def _is_of_others(given: dict[str, Any]) -> bool:
    """Whether `load_adapter` of transformers surely loads no adapter of ours, which of a repository nobody knows."""
    if given.get("peft_config") is not None:
        return not is_own(given["peft_config"])
    options = {
        **getattr(given.get("load_config"), "download_kwargs", {}),
        **given.get("kwargs", {}),
        **(given.get("adapter_kwargs") or {}),
    }
    folder, subfolder = given.get("peft_model_id") or "", options.get("subfolder")
    is_there = os.path.isfile(os.path.join(folder, subfolder or "", CONFIG_NAME))
    return is_there and own_config_class(folder, subfolder) is None
