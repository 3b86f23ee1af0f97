"""What the tuners of our methods have in common: everything that does not depend on the method."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from ..._compat.loading import current_loading
from ..._compat.peft import expand_all_linear
from ...backbones.classifier import classifier_names
from ...heads.traversal import named_targets
from .calls import watch_calls
from .copies import adding, check_weights, copy_adapter, copy_classifiers, is_copy
from .folder_config import AdapterFolderConfig
from .labels import LabelledTuner
from .saved_folder import check_folder, modules_in_file
from .saved_keys import follow_file
from .saved_weights import SavedWeights
from .setting_types import refusal
from .state import AdapterState
from .targets import module_patterns, warn_of_overlooked


class VisionTuner(SavedWeights, LabelledTuner):
    """Mixed into a PEFT tuner, before it: a template that a method completes.

    A method says which modules it adapts (`default_modules`) and which layer replaces each of them. A tuner built on one
    of PEFT's has that tuner's `_create_new_module` for this; any other is a [`StandaloneTuner`] with `create_layer`. What the file of an
    adapter holds is said by [`SavedWeights`]. The other hooks do nothing here; they are for what is particular to a
    method.

    Attributes:
        adapter_states: What the tuner knows of each adapter beside its settings, by adapter.
    """

    adapter_states: dict[str, AdapterState]
    # Options of the configuration that have other values while a copy of an adapter is made.
    while_copied: ClassVar[dict[str, Any]] = {}
    state_class: ClassVar[type[AdapterState]] = AdapterState
    _new_adapter: str  # the adapter that is being added

    # Adding an adapter

    def default_modules(self, peft_config: AdapterFolderConfig) -> list[str] | str:
        """The modules that are adapted where `target_modules` says nothing.

        Full names if `layers_to_transform` is given, else anything that PEFT takes for `target_modules`.
        """
        raise NotImplementedError

    def check_config(self, peft_config: AdapterFolderConfig) -> None:
        """Raise ValueError if the configuration, whose options are complete now, does not fit the model."""

    def prepare_targets(self, peft_config: AdapterFolderConfig, state: AdapterState, targets: list[str]) -> None:
        """Find and check what the new layers must be told (their heads, say), before any module is replaced."""

    def begin_adapter(self, peft_config: AdapterFolderConfig) -> AdapterState:
        """Make the state of a new adapter."""
        if "adapter_states" not in vars(self):
            self.adapter_states = {}
        self.begin_labels()
        state = self.adapter_states[self._new_adapter] = self.state_class()
        # what another model has left in a configuration that serves a second time is not this one's
        state.contents.labels_in_file = peft_config.carried.contents.labels_in_file
        peft_config.carried.contents = state.contents
        if sum(config is peft_config for config in self.peft_config.values()) == 1:
            peft_config.forget_choices()
        return state

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._new_adapter = adapter_name
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            vars(self).get("adapter_states", {}).pop(adapter_name, None)
            raise
        watch_calls(model)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.adapter_states.pop(adapter_name, None)

    def _prepare_adapter_config(self, peft_config: AdapterFolderConfig, model_config: dict) -> AdapterFolderConfig:
        state = self.begin_adapter(peft_config)
        self._follow_folder(peft_config)
        if peft_config.target_modules is None and not getattr(peft_config, "target_parameters", None):
            peft_config.choose("target_modules", self._default_targets(peft_config))
            warn_of_overlooked(self.model)
        if peft_config.modules_to_save is None:
            peft_config.choose("modules_to_save", classifier_names(self.model) or None)
        self.check_config(peft_config)
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        expand_all_linear(peft_config, self.model)
        targets = [n for n, _ in named_targets(self.model) if self._check_target_module_exists(peft_config, n)]
        self.prepare_targets(peft_config, state, targets)
        return peft_config

    def _follow_folder(self, peft_config: AdapterFolderConfig) -> None:
        """Let a configuration that was read from a folder fit the model, before anything is changed.

        Raises:
            ValueError: The folder is being loaded, and its files contradict each other or do not fit the model.
        """
        source, loading = peft_config.carried.source, current_loading()
        if source is None:
            return
        try:
            follow_file(peft_config, self.model)
            if loading is not None:
                peft_config.modules_to_save = modules_in_file(peft_config)
                check_folder(type(self), self.model, peft_config, source, loading)
                loading.checked.append(peft_config)
        except OSError:  # of the network
            raise
        except Exception as error:  # PEFT checks no types: whatever a wrong one leads to
            raise refusal(source["path_or_repo"], error) from error
        peft_config.carried.source = None  # read; the folder may be gone when the configuration serves again

    def _default_targets(self, peft_config: AdapterFolderConfig) -> set[str] | str | None:
        names = self.default_modules(peft_config)
        if names and getattr(peft_config, "layers_to_transform", None) is not None:
            names = self._in_layers(peft_config, names)
        return names if isinstance(names, str) else set(names) or None

    def _in_layers(self, peft_config: AdapterFolderConfig, names: list[str]) -> list[str]:
        """The modules in the blocks that `layers_to_transform` counts. PEFT applies it to the ends of names alone."""
        by_ending = copy.copy(peft_config)
        by_ending.target_modules = {name.rpartition(".")[2] for name in names}
        modules = dict(self.model.named_modules())
        found = [n for n in names if n not in modules or self._check_target_module_exists(by_ending, n)]
        if not found:
            pattern = f" with layers_pattern={peft_config.layers_pattern}" if peft_config.layers_pattern else ""
            raise ValueError(
                f"layers_to_transform={peft_config.layers_to_transform}{pattern}: no block of "
                f"{type(self.model).__name__} has such a number; it has {module_patterns(names)}"
            )
        return found

    # Sums of adapters

    def check_combination(self, adapters: Sequence[str], weights: Sequence[float], **options: Any) -> None:
        """Raise ValueError unless the adapters can be summed, or one of them copied."""

    def create_sum(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, **options: Any) -> None:
        """Add the weighted sum of adapters, without the modules that they train in full."""
        raise NotImplementedError

    def combine(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, **options: Any) -> None:
        """What `add_weighted_adapter` does: an exact copy of one adapter with weight 1, or a sum; undone if it fails."""
        if adapter_name in self.peft_config:
            return  # as PEFT's LoRA does
        check_weights(self.peft_config, adapters, weights)
        self.check_combination(adapters, weights, **options)
        self._remember_labels()
        if is_copy(adapters, weights):
            copy_adapter(self, adapters[0], adapter_name, **self.while_copied)
            return
        with adding(self, adapter_name):
            self.create_sum(adapters, weights, adapter_name, **options)
            copy_classifiers(self, adapters, adapter_name)
