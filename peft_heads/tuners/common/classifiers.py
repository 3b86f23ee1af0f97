"""Trained classifiers (`modules_to_save`) of several adapters on one model, of any size and number of bits; label names.

PEFT copies the base model's classifier for every adapter and fails to load a file with another number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ...heads.traversal import own_modules
from .quantizer import WeightQuantizer


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight acts by its quantised value; the parameter is the full-precision weight behind it."""

    quantizer: WeightQuantizer

    def quantized_weight(self) -> torch.Tensor:
        """(out, in)."""
        return self.quantizer(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.quantized_weight(), self.bias)

    def train(self, mode: bool = True) -> QuantizedLinear:
        if mode != self.training:
            self.quantizer.forget()
        return super().train(mode)


def check_quantizable(model: nn.Module, modules_to_save: Iterable[str] | None, bits: int) -> None:
    """Raise ValueError unless the modules that are trained in full are linear layers, which alone can be quantised."""
    ends = tuple(modules_to_save or ())
    classifiers = {
        name: getattr(module, "original_module", module)
        for name, module in own_modules(model)
        if ends and name.endswith(ends)
    }
    for name, classifier in classifiers.items():
        if type(classifier) is not nn.Linear:
            raise ValueError(
                f"classifier_bits={bits} needs a classifier that is a torch.nn.Linear, but {name} is a "
                f"{type(classifier).__name__}; pass classifier_bits=32"
            )
    if not classifiers:
        raise ValueError(
            f"classifier_bits={bits}, but the adapter trains no classifier; name it in modules_to_save, or "
            "pass classifier_bits=32"
        )


def quantize_classifiers(model: nn.Module, adapter_name: str, bits: int) -> None:
    """Quantise the weights of the adapter's trained classifier; its bias stays in full precision.

    A weight without any deviation (timm's models begin with zeros) could not be trained: it gets `nn.Linear`'s default
    initialisation.
    """
    for _, wrapper in _wrappers(model):
        classifier = wrapper.modules_to_save[adapter_name] if adapter_name in wrapper.modules_to_save else None
        if type(classifier) is not nn.Linear:
            continue
        if not classifier.weight.is_meta and classifier.weight.numel() > 1 and classifier.weight.detach().std() == 0:
            classifier.reset_parameters()
        classifier.__class__ = QuantizedLinear  # in place: hooks, and whoever holds the layer, stay
        classifier.quantizer = WeightQuantizer(bits)


def quantized_classifiers(model: nn.Module, adapter_name: str) -> list[QuantizedLinear]:
    """The layers that the adapter trains in full and that have few bits."""
    trained = [wrapper.modules_to_save for _, wrapper in _wrappers(model) if adapter_name in wrapper.modules_to_save]
    return [modules[adapter_name] for modules in trained if isinstance(modules[adapter_name], QuantizedLinear)]


def settle_classifiers(model: nn.Module) -> nn.Module:
    """Make ordinary linear layers of quantised classifiers that have become the model's own; return the model."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            with torch.no_grad():
                module.weight.copy_(module.quantized_weight())
            module.__class__ = nn.Linear
            del module.quantizer
    return model


def fit_classifiers(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], call: Callable[[int], None]
) -> bool:
    """Give the adapter's copies of the trained modules as many outputs as `state_dict` has for them.

    Only output sizes are changed, of linear layers and convolutions; PEFT reports any other mismatch. They are changed
    at the moment when PyTorch loads the weights, because PEFT leaves out what does not fit just before, if it was asked
    to (`ignore_mismatched_sizes=True`), and tells no tuner: then the modules stay as they are.

    Args:
        model: The model with the adapter in it.
        adapter_name: The adapter that is being loaded.
        state_dict: Its weights, by the names they have in the model.
        call: Called with the new number of outputs (the last module's) whenever a module gets its.

    Returns:
        Whether any module has another number of outputs.
    """
    misfits = []
    for name, wrapper in _wrappers(model):
        if adapter_name not in wrapper.modules_to_save:
            continue
        for inner, module in wrapper.modules_to_save[adapter_name].named_modules():
            prefix = ".".join(filter(None, [name, "modules_to_save", adapter_name, inner]))
            saved = state_dict.get(f"{prefix}.weight")
            if saved is None or not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            if saved.shape[0] == module.weight.shape[0]:
                continue
            misfits.append((module, saved.shape[0]))
    for module, outputs in misfits:
        _resize_on_load(module, outputs, lambda: call(misfits[-1][1]))
    return bool(misfits)


def _resize_on_load(module: nn.Module, outputs: int, resized: Callable[[], None]) -> None:
    """Give a module so many outputs when weights are loaded into it next, unless they are left out."""

    def resize(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        handle.remove()
        if f"{prefix}weight" not in state_dict:
            module.packed_weight = None  # its codes are those of the file
            return
        for name, param in list(module.named_parameters(recurse=False)):
            new = param.new_empty(outputs, *param.shape[1:])
            setattr(module, name, nn.Parameter(new, requires_grad=param.requires_grad))
        setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", outputs)
        resized()

    handle = module.register_load_state_dict_pre_hook(resize)


def check_mixed_batch(model: nn.Module, adapter_names: Iterable[str], existing: Container[str]) -> None:
    """Raise ValueError if one of the adapters of a mixed batch has no trained classifier, or theirs differ in size.

    Outputs of different sizes would not fit into one tensor.

    Args:
        model: The model with the adapters in it.
        adapter_names: One name per image, or `__base__`.
        existing: The model's adapters.
    """
    for name, wrapper in _wrappers(model):
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for adapter_name in dict.fromkeys(adapter_names):
            in_base = adapter_name == "__base__"
            if not in_base and adapter_name not in wrapper.modules_to_save:
                if adapter_name not in existing:
                    continue  # PEFT's to report
                raise ValueError(
                    f"a mixed batch needs adapters that all train {name}, but {adapter_name!r} does not (those that do: "
                    f"{', '.join(wrapper.modules_to_save)}); predict with one adapter at a time (set_adapter)"
                )
            module = wrapper.original_module if in_base else wrapper.modules_to_save[adapter_name]
            shapes[adapter_name] = [tuple(param.shape) for param in module.parameters()]
        if len({str(shape) for shape in shapes.values()}) > 1:
            sizes = ", ".join(f"{adapter} {shape[-1][0]}" for adapter, shape in shapes.items() if shape)
            raise ValueError(
                f"a mixed batch needs adapters whose trained classifiers have the same size, but the outputs of {name} are: "
                f"{sizes}; predict with one adapter at a time (set_adapter)"
            )


def trained_classifiers(model: nn.Module, adapter_names: Iterable[str]) -> dict[str, list[str]]:
    """`{module: the adapters among these that have trained it}` of the modules that adapters train in full."""
    names = list(dict.fromkeys(adapter_names))
    return {
        module_name: [name for name in names if name in wrapper.modules_to_save]
        for module_name, wrapper in _wrappers(model)
    }


def classifier_owners(model: nn.Module, adapter_names: Iterable[str]) -> dict[str, str | None]:
    """`{module: the adapter among these that has trained it, or None}` of the modules that adapters train in full.

    Raises:
        ValueError: Two of the adapters have trained the same module.
    """
    owners = {}
    for module_name, trained in trained_classifiers(model, adapter_names).items():
        if len(trained) > 1:
            raise ValueError(
                f"adapters {', '.join(trained)} have each trained {module_name}, of which a merged model can have one; "
                "merge one of these adapters alone"
            )
        owners[module_name] = trained[0] if trained else None
    return owners


def shown_classifiers(model: nn.Module) -> dict[str, str | None]:
    """`{module: the adapter whose copy the model uses while adapters are enabled}`; None where it uses its own."""
    return {name: _shown(wrapper) for name, wrapper in _wrappers(model)}


def show_classifiers(model: nn.Module, owners: dict[str, str | None]) -> None:
    """Let the model use the trained modules of these adapters; what requires a gradient still does."""
    for name, wrapper in _wrappers(model):
        owner = owners[name]
        trained = {param: param.requires_grad for param in wrapper.modules_to_save.parameters()}
        wrapper.set_adapter([owner] if owner is not None else [])
        for param, requires_grad in trained.items():
            param.requires_grad_(requires_grad)


def get_labels(base_model: nn.Module) -> dict[int, str] | None:
    """Label names in a model's configuration; None where it has none."""
    labels = getattr(getattr(base_model, "config", None), "id2label", None)
    return dict(labels) if labels else None


def set_labels(base_model: nn.Module, id2label: dict[int, str] | None) -> None:
    """Let a model's configuration name these labels, from which transformers takes the number of classes as well."""
    if id2label and get_labels(base_model):
        base_model.config.id2label = dict(id2label)
        base_model.config.label2id = {label: index for index, label in id2label.items()}
        if hasattr(base_model, "num_labels"):
            base_model.num_labels = len(id2label)


def default_labels(num_labels: int) -> dict[int, str]:
    """The names that transformers gives to labels without names."""
    return {index: f"LABEL_{index}" for index in range(num_labels)}


def _shown(wrapper: ModulesToSaveWrapper) -> str | None:
    return next((name for name in wrapper.active_adapters if name in wrapper.modules_to_save), None)


def _wrappers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in own_modules(model) if isinstance(module, ModulesToSaveWrapper)]
