"""What sums of adapters have in common, whatever the method: checks, exact copies, trained classifiers."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ...heads.layout import ProjectionLayout
from ...heads.traversal import own_modules
from .classifiers import classifier_owners
from .head_mask import HeadMaskedLayer
from .labels import LabelledTuner


def check_weights(existing: Container[str], adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Raise ValueError unless there is one finite weight for each of the adapters, and all of these exist."""
    missing = [name for name in adapters if name not in existing]
    if missing or not adapters:
        raise ValueError(f"Adapter {', '.join(missing) or '(none given)'} does not exist")
    if len(adapters) != len(weights):
        raise ValueError(f"one weight per adapter is needed; got {len(adapters)} adapters, {len(weights)} weights")
    if not all(_is_finite(weight) for weight in weights):
        raise ValueError(f"weights must be finite numbers, one per adapter; got {weights}")


def check_same_heads(name: str, layouts: Iterable[ProjectionLayout], said_by: str = "other heads (num_heads)") -> None:
    """Raise ValueError unless all summands have the same heads in a layer.

    Args:
        name: The layer.
        layouts: Its heads as the summands have them.
        said_by: What differs, and which options say it.
    """
    found = set(layouts)
    if len(found) > 1:
        raise ValueError(
            f"adapters with {said_by} cannot be combined; in {name} they have {' and '.join(map(str, found))}"
        )


def is_copy(adapters: Sequence[str], weights: Sequence[float]) -> bool:
    """Whether a sum is one adapter as it is."""
    return len(adapters) == 1 and float(weights[0]) == 1


def copy_adapter(tuner: LabelledTuner, source: str, adapter_name: str, **while_created: Any) -> None:
    """Add an exact copy of an adapter: its configuration, weights, masks, trained modules and labels. It is frozen.

    Args:
        tuner: The tuner.
        source: The adapter.
        adapter_name: The name of the copy.
        while_created: Options of the configuration that have other values only while the copy's layers are made.

    Raises:
        ValueError: The layers cannot be made a second time; nothing has changed then.
    """
    config = dataclasses.replace(copy.deepcopy(tuner.peft_config[source]))
    wanted = {option: getattr(config, option) for option in while_created}
    for option, value in while_created.items():
        setattr(config, option, value)
    with adding(tuner, adapter_name):
        tuner.peft_config[adapter_name] = config
        tuner.inject_adapter(tuner.model, adapter_name)
        for option, value in wanted.items():
            setattr(config, option, value)
        for name, layer in own_modules(tuner.model):
            if isinstance(layer, BaseTunerLayer):
                _copy_in_layer(name, layer, source, adapter_name)
        copy_classifiers(tuner, [source], adapter_name)


@contextmanager
def adding(tuner: BaseTuner, adapter_name: str) -> Iterator[None]:
    """While an adapter is added: other adapters are trained as before, the new one is not. Undone if it fails."""
    trained = [(param, param.requires_grad) for param in tuner.model.parameters()]
    active = tuner.active_adapter
    try:
        yield
    except BaseException:
        if adapter_name in tuner.peft_config:
            tuner.delete_adapter(adapter_name)
            tuner.active_adapter = active
        raise
    finally:
        for param, requires_grad in trained:
            param.requires_grad_(requires_grad)
    tuner.set_requires_grad(adapter_name, adapter_name in tuner.active_adapters)


def copy_classifiers(tuner: LabelledTuner, adapters: Sequence[str], adapter_name: str) -> None:
    """Give an adapter copies of the modules that others have trained in full, and their labels."""
    owners = classifier_owners(tuner.model, adapters)
    for name, wrapper in own_modules(tuner.model):
        if isinstance(wrapper, ModulesToSaveWrapper) and owners[name] is not None:
            wrapper.modules_to_save[adapter_name] = copy.deepcopy(wrapper.modules_to_save[owners[name]])
    labels = [tuner.adapter_labels.get(owner) for owner in owners.values() if owner is not None]
    if any(labels):
        tuner.adapter_labels[adapter_name] = dict(next(filter(None, labels)))


def classifiers_of_sum(configs: dict[str, Any], adapters: Sequence[str]) -> list[str]:
    """`modules_to_save` of a sum: those of all summands."""
    return list(dict.fromkeys(name for adapter in adapters for name in configs[adapter].modules_to_save or []))


def _copy_in_layer(name: str, layer: BaseTunerLayer, source: str, adapter_name: str) -> None:
    for kind in layer.adapter_layer_names:
        parts = getattr(layer, kind)
        if (source in parts) != (adapter_name in parts):
            raise ValueError(
                f"{kind} of {name} differs between adapter {source!r} and what its configuration asks for"
            )
        if source in parts:
            for old, new in zip(_tensors(parts[source]), _tensors(parts[adapter_name]), strict=True):
                new.data = old.data.clone()
    scaling = getattr(layer, "scaling", {})
    if source in scaling:  # may have been set by hand
        scaling[adapter_name] = copy.deepcopy(scaling[source])
    if isinstance(layer, HeadMaskedLayer) and source in layer.head_masks:
        layer.set_head_mask(adapter_name, layer.get_head_mask(source))


def _tensors(part: nn.Module | torch.Tensor) -> list[torch.Tensor]:
    return [part] if isinstance(part, torch.Tensor) else [*part.parameters(), *part.buffers()]


def _is_finite(weight: Any) -> bool:
    """Of Python's numbers, NumPy's and tensors of one number."""
    try:
        return math.isfinite(weight)
    except (TypeError, ValueError, RuntimeError):
        return False
