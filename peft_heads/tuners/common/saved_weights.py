"""What the file of an adapter holds, whatever the method: from the model's tensors to the file's, and back."""

from __future__ import annotations

import torch
from torch import nn

from ..._compat.loading import current_loading
from ...adapter_folder.contents import folder_contents
from ...functional.sharding import whole_entry
from ...heads.protocol import read_masks
from .folder_config import AdapterFolderConfig
from .head_mask import complete_masks, masked_layers
from .mask_keys import masks_for_file, masks_for_model
from .saved_keys import BASE, is_adapter_key, rename_modules
from .saved_settings import check_settings, split_settings, write_settings


class SavedWeights:
    """Mixed into a PEFT tuner that is a [`LabelledTuner`], before it.

    A method with heads says what a file holds for deactivated heads (`zero_inactive_rows`, `check_masks`). A method with
    a file format of its own says how it is written and read (`encode`, `decode`).
    """

    @classmethod
    def zero_inactive_rows(
        cls,
        model: nn.Module,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        model_state_dict: dict[str, torch.Tensor],
    ) -> None:
        """Write zeros into the rows of an adapter's `state_dict` that belong to deactivated heads."""

    @classmethod
    def check_masks(
        cls, model: nn.Module, config: AdapterFolderConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> None:
        """Raise ValueError unless a file's masks fit the adapter and agree with its weights."""

    @classmethod
    def encode(
        cls,
        model: nn.Module,
        config: AdapterFolderConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        model_state_dict: dict[str, torch.Tensor],
    ) -> dict[str, bool]:
        """Convert an adapter's weights to the method's own format; return the settings that are noted with them."""
        return config.noted_settings

    @classmethod
    def decode(
        cls, model: nn.Module, config: AdapterFolderConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The weights of a file, converted from the method's own format."""
        return state_dict

    @classmethod
    def settings_without_meaning(cls, state_dict: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """The noted settings that make no difference to the weights of a file."""
        return ()

    @classmethod
    def own_tensors(cls, model: nn.Module, config: AdapterFolderConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """What PEFT saves of an adapter, by the keys of its file, without what is trained in full."""
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, model.state_dict(), [])
        return {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in state_dict.items()}

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # Parts of a sharded model, unless the caller has put them together. In place: PEFT goes on to take what is
        # trained in full from the same dict.
        in_full = f".modules_to_save.{adapter_name}."
        state_dict |= {
            key: whole_entry(model, key, value)
            for key, value in state_dict.items()
            if is_adapter_key(key) or in_full in key
        }
        to_return = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT takes the biases of the base model from the model itself: they may be parts, too
        to_return = {key: whole_entry(model, key, value) for key, value in to_return.items()}
        cls.zero_inactive_rows(model, adapter_name, to_return, state_dict)
        noted = cls.encode(model, config, adapter_name, to_return, state_dict)
        if noted:
            write_settings(f"{cls.prefix}settings", noted, to_return)
        cls._describe_for_files(model, config, adapter_name)
        return masks_for_file(to_return)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict, noted = split_settings(state_dict)
        state_dict = rename_modules(model, state_dict)
        state_dict = cls.decode(model, config, adapter_name, state_dict)
        if current_loading() is not None:
            state_dict = complete_masks(model, config, adapter_name, state_dict)
        state_dict = masks_for_model(state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        cls.check_masks(model, config, adapter_name, remapped)
        check_settings(config.noted_settings, noted, cls.settings_without_meaning(remapped))
        cls.take_classifiers_and_labels(model, adapter_name, remapped)
        return remapped

    @classmethod
    def _describe_for_files(cls, model: nn.Module, config: AdapterFolderConfig, adapter_name: str) -> None:
        """Give the configuration what its `save_pretrained` writes beside the adapter's weights.

        Args:
            model: The model with the adapter in it, with a PeftModel around it or without.
            config: The adapter's configuration.
            adapter_name: The adapter.
        """
        layers = {name.removeprefix(BASE): layer for name, layer in masked_layers(model, adapter_name)}
        neurons = {name: layer for name, layer in layers.items() if layer.head_layout[adapter_name].has_neurons}
        base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        contents = config.carried.contents = folder_contents(model, adapter_name)
        contents.masks = read_masks({n: layer for n, layer in layers.items() if n not in neurons}, adapter_name)
        contents.neuron_masks = read_masks(neurons, adapter_name)
        contents.model_class = type(base_model).__name__
        contents.id2label = cls.labels_to_save(model, adapter_name)
