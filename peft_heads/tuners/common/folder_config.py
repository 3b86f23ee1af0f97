"""What the configurations of our methods have in common, heads or not: the files beside them."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..._compat.peft import split_download_kwargs
from ...adapter_folder.card import CardText
from ...adapter_folder.contents import FolderContents
from ...adapter_folder.files import check_folder_files
from ...adapter_folder.labels import find_labels
from ...adapter_folder.saving import write_contents
from ...adapter_folder.settings import check_patterns, read_settings
from .setting_types import check_types, refusal


@dataclass
class Carried:
    """What a configuration carries from one call of PEFT to the next, although it is no setting.

    Everything else that a run knows of an adapter is in the tuner's `adapter_states`.

    Attributes:
        source: Place that the configuration was read from, as arguments of `hf_hub_download`; None once the tuner has
            read it. `PeftConfig.from_pretrained` alone is told it, before there is a tuner.
        is_stock: Whether that place holds stock LoRA.
        chosen: Values that a model's parts have suggested for options that were not given, by option. PEFT reads them
            from the configuration that the user holds, which may serve for another model later.
        contents: What `save_pretrained` writes beside the configuration. `PeftModel.save_pretrained` calls it last, and
            tells it nothing of the model; so the tuner puts it here when it collects the weights.
    """

    source: dict[str, Any] | None = None
    is_stock: bool = False
    chosen: dict[str, Any] = field(default_factory=dict)
    contents: FolderContents = field(default_factory=FolderContents)


class AdapterFolderConfig:
    """Mixed into a PEFT configuration, before it: model card, labels and image processor come and go with it.

    Attributes:
        card: What the model card says of the method.
        carried: The one attribute that is no setting. It is not a field, so it is not saved.
    """

    card: CardText
    carried: Carried

    def __post_init__(self) -> None:
        super().__post_init__()
        self.carried = Carried()
        check_patterns(vars(self))

    @property
    def noted_settings(self) -> dict[str, bool]:
        """Settings that are noted among the weights, because they change what these mean and show in none of them."""
        return {}

    def choose(self, option: str, value: Any) -> None:
        """Set an option that was not given to what the model's parts suggest; another model may suggest something else."""
        setattr(self, option, value)
        self.carried.chosen[option] = copy.copy(value)

    def forget_choices(self) -> None:
        """Unset the options that another model's parts have suggested, except those that were set by hand since."""
        for option, value in self.carried.chosen.items():
            if getattr(self, option) == value:
                setattr(self, option, None)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save the configuration and, beside it, the model card, the labels and the image processor.

        `PeftModel.save_pretrained` calls this last, after the weights, which makes it the place where a method from
        outside PEFT can write files of its own.
        """
        super().save_pretrained(save_directory, **kwargs)
        write_contents(save_directory, self, self.carried.contents)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """As PEFT's. The configuration also carries the labels in the folder, and the place where the weights are."""
        check_file(pretrained_model_name_or_path, subfolder, cls)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except OSError:
            raise
        except Exception as error:  # PEFT checks no types: whatever a wrong one leads to
            raise refusal(os.path.join(pretrained_model_name_or_path, subfolder or ""), error) from error
        if isinstance(config, AdapterFolderConfig):
            config.carried.source = source_of(cls, pretrained_model_name_or_path, subfolder, kwargs)
            config.carried.contents.labels_in_file = find_labels(**config.carried.source)
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
