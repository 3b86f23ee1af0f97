"""Labels and trained modules that follow the active adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...adapter_folder.contents import folder_contents
from ...heads.traversal import own_modules
from .classifiers import (
    check_mixed_batch,
    classifier_owners,
    default_labels,
    fit_classifiers,
    get_labels,
    set_labels,
    show_classifiers,
    shown_classifiers,
    trained_classifiers,
)


def merged_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers into which adapters have been merged."""
    return [layer for _, layer in own_modules(model) if isinstance(layer, BaseTunerLayer) and layer.merged]


def merged_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that have been merged into any layer."""
    return list(dict.fromkeys(name for layer in merged_layers(model) for name in layer.merged_adapters))


def _who(adapter_name: str | None) -> str:
    return "the base model" if adapter_name is None else f"adapter {adapter_name!r}"


class LabelledTuner:
    """Mixed into a PEFT tuner, before it: the model's configuration names the classes of the active adapter.

    Attributes:
        base_labels: Labels of the base model.
        adapter_labels: Labels of the adapters that have trained modules, by adapter.
    """

    base_labels: dict[int, str] | None
    adapter_labels: dict[str, dict[int, str] | None]
    _labels_of: str | None  # the adapter whose labels the model's configuration shows

    def begin_labels(self) -> None:
        """To be called before an adapter is added."""
        if not hasattr(self, "base_labels"):
            self.base_labels = get_labels(self.model)
            self.adapter_labels = {}
            self._labels_of = None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s); the model's labels become those of the adapter, or of the first of them."""
        self._remember_labels()
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._show_labels()

    def delete_adapter(self, adapter_name: str) -> None:
        self._remember_labels()
        super().delete_adapter(adapter_name)
        self.adapter_labels.pop(adapter_name, None)
        self._show_labels()

    def disable_adapter_layers(self) -> None:
        self._remember_labels()
        super().disable_adapter_layers()
        self._labels_of = None
        set_labels(self.model, self.base_labels)

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        if self._labels_of is None:
            self._show_labels()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's.

        Raises:
            ValueError: An adapter does not exist; or the model would act by the projections of the merged adapters and
                by the trained classifier of another, or of none.
        """
        names = self._names_to_merge(adapter_names)
        shown = shown_classifiers(self.model)
        for module_name, trained in trained_classifiers(self.model, [*merged_adapters(self.model), *names]).items():
            if shown[module_name] not in (trained or [None]):
                expected = " or ".join(map(_who, trained or [None]))
                raise ValueError(
                    f"merging {', '.join(names)} would leave the model with the {module_name} of {_who(shown[module_name])} "
                    f"(expected that of {expected}); call set_adapter({names[-1]!r}) first"
                )
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    @contextmanager
    def unloading(self, merge: bool, adapter_names: list[str] | None) -> Iterator[list[str]]:
        """While the tuner is taken off: trained classifiers and labels are those of the adapters that are merged.

        Without a merge they are the active adapter's, as PEFT has it, or the base model's where adapters are disabled.
        Should it fail, classifiers and labels are as they were.

        Args:
            merge: Whether adapters are merged.
            adapter_names: Which; None means the active ones.

        Yields:
            The adapters to merge.

        Raises:
            ValueError: An adapter does not exist, or two of them have trained the same module.
        """
        names = self._names_to_merge(adapter_names) if merge else []
        merged, shown, labels_of = merged_adapters(self.model), shown_classifiers(self.model), self._labels_of
        disabled = labels_of is None
        labels = get_labels(self.model)
        self._remember_labels()
        try:
            if names:
                show_classifiers(self.model, classifier_owners(self.model, [*merged, *names]))
                self._show_labels([*merged, *names])
            elif disabled:
                for layer in merged_layers(self.model):
                    layer.unmerge()
                show_classifiers(self.model, dict.fromkeys(shown))
            yield names
        except BaseException:
            show_classifiers(self.model, shown)
            self._labels_of = labels_of
            set_labels(self.model, labels)
            raise
        self.base_labels, self.adapter_labels = None, {}  # the model has its own now

    def _names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}")
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"there is no adapter {', '.join(map(repr, unknown))} to merge; the model has "
                f"{', '.join(self.peft_config) or 'none'}"
            )
        return names

    def _remember_labels(self) -> None:
        """Keep the model's labels for the adapter that they belong to: they may have been renamed since they were shown."""
        shown = self.peft_config.get(self._labels_of)
        if shown is not None and shown.modules_to_save:
            self.adapter_labels[self._labels_of] = get_labels(self.model)

    def _show_labels(self, adapter_names: list[str] | None = None) -> None:
        """Let the model's configuration name the classes of the adapter whose classifier it uses (of these, or the active ones)."""
        names = [name for name in adapter_names or self.active_adapters if name in self.peft_config]
        with_classifier = [name for name in names if self.peft_config[name].modules_to_save]
        self._labels_of = next(iter(with_classifier or names), None)
        shown = self.peft_config.get(self._labels_of)
        if shown is not None:
            own = self.adapter_labels.get(self._labels_of) if shown.modules_to_save else None
            set_labels(self.model, own or self.base_labels)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names"):
            check_mixed_batch(self.model, kwargs["adapter_names"], self.peft_config)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    @staticmethod
    def labels_to_save(model: nn.Module, adapter_name: str) -> dict[int, str] | None:
        """The labels that belong to an adapter.

        Args:
            model: The model with the adapter in it, with a PeftModel around it or without.
            adapter_name: The adapter.
        """
        tuner = getattr(model, "base_model", None)
        if getattr(tuner, "_labels_of", adapter_name) == adapter_name:
            return get_labels(model.get_base_model() if hasattr(model, "get_base_model") else model)
        return tuner.adapter_labels.get(adapter_name)

    @staticmethod
    def take_classifiers_and_labels(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
        """Give the adapter's trained classifiers the sizes, and the model the labels, of a file that is being loaded.

        Classifiers of another size keep theirs, and the model its labels, if PEFT was told to `ignore_mismatched_sizes`.

        Args:
            model: The model with the adapter in it, with a PeftModel around it or without.
            adapter_name: The adapter.
            state_dict: The weights, by the names they have in the model.
        """
        # labels take effect once, together with the weights: those that are given later are not overwritten
        contents = folder_contents(model, adapter_name)
        labels, contents.labels_in_file = contents.labels_in_file, None
        tuner = getattr(model, "base_model", None)

        def show(labels: dict[int, str]) -> None:
            if not isinstance(tuner, LabelledTuner):  # injected, without a PeftModel around it
                set_labels(model, labels)
                return
            tuner.adapter_labels[adapter_name] = labels
            if tuner._labels_of == adapter_name:
                tuner._show_labels()

        def show_resized(num_labels: int) -> None:
            show(labels if len(labels or {}) == num_labels else default_labels(num_labels))

        resized = fit_classifiers(model, adapter_name, state_dict, call=show_resized)
        if labels and not resized and isinstance(tuner, LabelledTuner):
            show(labels)
