"""What the configurations of our methods have in common: which heads are deactivated, and the files beside them."""

from __future__ import annotations

import copy
import os
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..._compat import split_download_kwargs
from ...adapter_folder.card import (
    AdapterFiles,
    CardText,
    check_folder_files,
    check_patterns,
    find_labels,
    read_settings,
)
from ...heads.scores import CRITERIA
from ...heads.selection import GRANULARITIES, check_head_count
from .setting_types import check_types, refusal


class SavedConfig:
    """Mixed into a PEFT configuration, before it: model card, labels and image processor come and go with it.

    The configuration has the fields `ne`, `ratio`, `granularity`, `criterion` and `num_heads`.

    The attributes are no fields, hence not saved.

    Attributes:
        adapter_files: What `save_pretrained` writes beside the configuration, filled when the weights are collected.
        card: What the model card says of the method.
        chosen: Values of options that were not given and that a model's parts have answered, by option.
        is_stock: Whether it was read from a folder of stock LoRA.
        source: Where a saved configuration comes from, as arguments of `hf_hub_download`; None once it was read.
    """

    card: CardText
    adapter_files: AdapterFiles
    chosen: dict[str, Any]
    source: dict[str, Any] | None
    is_stock: bool = False

    def begin_files(self) -> None:
        """Of a new configuration: nothing is known yet."""
        self.adapter_files = AdapterFiles()
        self.source = None
        self.chosen: dict[str, Any] = {}

    def choose(self, option: str, value: Any) -> None:
        """Answer an option that was not given from the model's parts; for another model it is chosen anew."""
        setattr(self, option, value)
        self.chosen[option] = copy.copy(value)

    @property
    def masks_heads(self) -> bool:
        """Whether heads are going to be deactivated: False for `ne=0` and `ratio=0`."""
        return bool(self.ne or self.ratio)

    def check_heads(self) -> None:
        """Raise ValueError unless what says which heads are deactivated is in its range."""
        check_patterns(vars(self))
        check_head_count(self.ne, self.ratio)
        self.check_choice("granularity", GRANULARITIES)
        self.check_choice("criterion", CRITERIA)
        numbers = self.num_heads.values() if isinstance(self.num_heads, dict) else [self.num_heads]
        if self.num_heads is not None and not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(
                f"num_heads must be a positive integer, or one per module pattern; got {self.num_heads!r}"
            )

    def check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raise ValueError unless a field has one of the allowed values."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the configuration and, beside it, the model card, the labels and the image processor.

        `PeftModel.save_pretrained` calls this last, after the weights, which makes it the place where a method from
        outside PEFT can write files of its own.
        """
        super().save_pretrained(save_directory, **kwargs)
        self.adapter_files.write(save_directory, self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """As PEFT's; labels come along, so that they can follow the active adapter, and where the weights are."""
        check_file(pretrained_model_name_or_path, subfolder, cls)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except OSError:
            raise
        except Exception as error:  # PEFT checks no types: whatever a wrong one leads to
            raise refusal(os.path.join(pretrained_model_name_or_path, subfolder or ""), error) from error
        if isinstance(config, SavedConfig):
            config.source = source_of(cls, pretrained_model_name_or_path, subfolder, kwargs)
            config.adapter_files.labels_in_file = find_labels(**config.source)
        return config


def check_file(path_or_repo: str | os.PathLike, subfolder: str | None, config_class: type[PeftConfig]) -> None:
    """Raise ValueError for a damaged file, or a setting of the wrong type; PEFT's error does not name it."""
    folder = os.path.join(path_or_repo, subfolder or "")
    if os.path.isdir(folder):
        check_folder_files(folder)
    if os.path.exists(os.path.join(folder, CONFIG_NAME)):
        settings = read_settings(folder)
        try:
            check_types(config_class, settings)
        except ValueError as error:
            raise ValueError(f"{os.path.join(folder, CONFIG_NAME)}: {error}") from error


def source_of(
    config_class: type[PeftConfig], path_or_repo: str | os.PathLike, subfolder: str | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Where an adapter's files are, as arguments of `hf_hub_download`."""
    download_kwargs = split_download_kwargs(config_class, kwargs)
    return {"path_or_repo": os.fspath(path_or_repo), "subfolder": subfolder, **download_kwargs}
