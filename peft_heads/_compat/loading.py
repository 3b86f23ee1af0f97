"""What a tuner is told of an adapter that PEFT is loading."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from .peft import is_own, split_download_kwargs


@dataclass
class Loading:
    """What the user has said about the saved adapter that is being loaded.

    Attributes:
        key_mapping, ignore_mismatched_sizes: Arguments of `PeftModel.from_pretrained`.
        checked: Configurations whose folders have been found to fit the model.
    """

    key_mapping: dict[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    checked: list[PeftConfig] = field(default_factory=list)


_loading: ContextVar[Loading | None] = ContextVar("peft_heads_loading", default=None)


def current_loading() -> Loading | None:
    """The loading in progress; None where an adapter is created, or weights are given as a dict."""
    return _loading.get()


@contextmanager
def loading_begins(loading: Loading) -> Iterator[Loading]:
    """Inside the block, a saved adapter is being loaded."""
    token = _loading.set(loading)
    try:
        yield loading
    finally:
        _loading.reset(token)


def announce_loading(check: Callable[[nn.Module, PeftConfig, dict[str, Any], Loading], None]) -> None:
    """Let tuners know that a saved folder is being loaded: PEFT tells them neither this nor what the user has said.

    A folder that is loaded into an existing adapter is checked before PEFT reads it. A new adapter whose weights
    cannot be loaded is removed again.

    Delete when PEFT hands tuners the source and the arguments of `load_adapter`.

    Args:
        check: Called with model, configuration and source (arguments of `hf_hub_download`); raises ValueError.
    """
    if hasattr(PeftModel.load_adapter, "extended_by_peft_heads"):
        return
    create, load = PeftModel.from_pretrained.__func__, PeftModel.load_adapter

    @functools.wraps(create)
    def from_pretrained(cls, model: nn.Module, *args: Any, **kwargs: Any):
        given = inspect.signature(create).bind(cls, model, *args, **kwargs).arguments
        # the same default as PEFT's
        mapping = given.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
        ignore = given.get("kwargs", {}).get("ignore_mismatched_sizes", False)
        with loading_begins(Loading(mapping, ignore)) as loading:
            config = given.get("config")
            carried = getattr(config, "carried", None) if is_own(config) else None  # of an AdapterFolderConfig
            if carried is not None and carried.source is None:
                # a folder's own is checked when it is prepared; with another PEFT adds the adapter before it reads
                download_kwargs = split_download_kwargs(cls, given.get("kwargs", {}))
                check(model, config, {"path_or_repo": os.fspath(given["model_id"]), **download_kwargs}, loading)
            return create(cls, model, *args, **kwargs)

    @functools.wraps(load)
    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any):
        given = inspect.signature(load).bind(self, model_id, adapter_name, *args, **kwargs).arguments
        rest = given.get("kwargs", {})
        outer, exists = current_loading(), adapter_name in self.peft_config
        own = Loading(given.get("key_mapping"), rest.get("ignore_mismatched_sizes", False))
        with loading_begins(outer or own) as loading:
            if exists and is_own(self.peft_config[adapter_name]):
                config = self.peft_config[adapter_name]
                if not any(config is other for other in loading.checked):
                    download_kwargs = split_download_kwargs(self, rest)
                    check(self, config, {"path_or_repo": os.fspath(model_id), **download_kwargs}, loading)
            try:
                return load(self, model_id, adapter_name, *args, **kwargs)
            except BaseException:
                if not exists and adapter_name in self.peft_config and is_own(self.peft_config[adapter_name]):
                    self.delete_adapter(adapter_name)
                raise

    load_adapter.extended_by_peft_heads = True
    PeftModel.from_pretrained = classmethod(from_pretrained)
    PeftModel.load_adapter = load_adapter
