"""Packed adapters: k-bit weights saved as their codes, one uint8 tensor per module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ...functional.packing import PackedWeight, pack_module, unpack_module
from ...heads.layout import ProjectionLayout
from ...heads.traversal import own_modules
from ..common.classifiers import QuantizedLinear
from ..common.head_mask import rows_in_file
from ..common.quantizer import WeightQuantizer
from ..common.saved_keys import PACKED
from ..common.stored_codes import packed_weight
from .config import FULL_PRECISION
from .layer import HeadMaskedLinear


def pack_adapter(model: nn.Module, adapter_name: str = "default") -> None:
    """Reduce a k-bit adapter to its codes, means and deviations: from now on it is saved packed, `bits` per weight.

    Logits stay as they are, bit for bit, also after saving and loading. The full-precision weights behind the codes are
    replaced by others with the same codes, those that loading the packed file restores. The first step of training ends
    this: the adapter is no longer packed, and is saved in full precision again. Rows of deactivated heads are not
    stored. What is not quantised (biases, a classifier with `classifier_bits=32`) is saved as it is.

    Args:
        model: A [`PeftModel`], or its tuner.
        adapter_name: The adapter.

    Raises:
        ValueError: There is nothing to pack, or no such adapter.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"there is no adapter {adapter_name!r}; the model has {', '.join(configs) or 'none'}")
    config = configs[adapter_name]
    if not getattr(config, "has_few_bits", False):
        raise ValueError(
            f"adapter {adapter_name!r} ({config.peft_type.value}) has no k-bit weights to pack; it needs adapter_bits "
            f"or classifier_bits below {FULL_PRECISION}"
        )
    with torch.no_grad():
        quantized = list(_quantized(model, adapter_name))
        broken = next((name for name, linear, *_ in quantized if not linear.weight.isfinite().all()), None)
        if broken:
            raise ValueError(
                f"adapter {adapter_name!r} cannot be packed: {broken}.weight has entries that are not finite"
            )
        for _, linear, quantizer, heads in quantized:
            if _in_force(linear, heads) is None:
                decision = quantizer.decision(linear, **heads)
                packed = PackedWeight.from_decision(decision, quantizer.bits)
                linear.packed_weight = packed
                linear.weight.copy_(packed.latents)
            quantizer.forget()
    config.packed = True


def is_packed(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether all k-bit weights of the adapter are still as they were packed or loaded, in the model and in `state_dict`.

    False for an adapter without k-bit weights.
    """
    linears = list(_quantized(model, adapter_name))
    for name, linear, _, heads in linears:
        saved, packed = state_dict.get(f"{name}.weight"), _in_force(linear, heads)
        if saved is None or packed is None or not packed.is_behind(saved, _rows(heads)):
            return False
    return bool(linears)


def write_packed(
    model: nn.Module,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    model_state_dict: dict[str, torch.Tensor],
) -> None:
    """Replace the k-bit weights in an adapter's `state_dict` by their codes.

    Args:
        model: The model with the adapter in it, which is packed.
        adapter_name: The adapter.
        state_dict: The adapter's weights, without the modules that are trained in full.
        model_state_dict: The model's state dict, from which PEFT takes the modules that are trained in full afterwards.
    """
    for name, layer in _layers(model, adapter_name):
        if adapter_name in layer.lora_quantizer:
            factors = [layer.lora_A[adapter_name].packed_weight, layer.lora_B[adapter_name].packed_weight]
            mask = layer.get_head_mask(adapter_name) if adapter_name in layer.head_masks else None
            for key in (
                f"lora_A.{adapter_name}.weight",
                f"lora_B.{adapter_name}.weight",
                f"{layer.head_masks_name}.{adapter_name}.off",
            ):
                state_dict.pop(f"{name}.{key}", None)
            state_dict[f"{name}.{PACKED}.{adapter_name}"] = pack_module(factors, mask)
    for name, classifier in _classifiers(model, adapter_name):
        model_state_dict[f"{name}.weight"] = pack_module([classifier.packed_weight])


def read_packed(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], bool]:
    """Replace the codes in a file's weights by full-precision weights, and give the codes to the layers.

    Args:
        model: The model with the adapter in it.
        adapter_name: The adapter that is being loaded.
        state_dict: The file's weights. LoRA's have the file's names (without the adapter's), those of modules that are
            trained in full have the model's.

    Returns:
        The weights, and whether there were any codes.

    Raises:
        ValueError: Packed weights do not fit the adapter, or are damaged.
    """
    unpacked, found = dict(state_dict), False
    for name, layer in _layers(model, adapter_name):
        if adapter_name in layer.lora_quantizer:
            layer.lora_quantizer[adapter_name].awaits_codes = False
        key = next((key for key in (f"{name}.{PACKED}", f"base_model.model.{name}.{PACKED}") if key in unpacked), None)
        factors = [layer.lora_A[adapter_name], layer.lora_B[adapter_name]]
        if key is None:
            for linear in factors:
                linear.packed_weight = None
            continue
        found = True
        expected = [(linear.out_features, linear.in_features) for linear in factors]
        bits = layer.lora_quantizer[adapter_name].bits if adapter_name in layer.lora_quantizer else FULL_PRECISION
        matrices, mask = _unpack(key, unpacked.pop(key), bits, expected, layer.head_layout.get(adapter_name))
        prefix = key.removesuffix(PACKED)
        for factor, linear, matrix in zip(("lora_A", "lora_B"), factors, matrices, strict=True):
            linear.packed_weight = matrix
            unpacked[f"{prefix}{factor}.weight"] = matrix.latents.to(linear.weight.dtype)
        if mask is not None:
            unpacked[f"{prefix}{layer.head_masks_name}.mask"] = mask
        if adapter_name in layer.lora_quantizer:
            layer.lora_quantizer[adapter_name].forget()
    for key, value in unpacked.items():
        if value.dtype == torch.uint8 and f".modules_to_save.{adapter_name}." in key:
            unpacked[key], found = _read_classifier(model, key, value), True
    return unpacked, found


def _unpack(
    key: str,
    data: torch.Tensor,
    bits: int,
    expected: list[tuple[int | None, int]],
    layout: ProjectionLayout | None = None,
) -> tuple[list[PackedWeight], torch.Tensor | None]:
    """Unpack an entry; `expected` are the shapes, with None for any number of rows."""
    try:
        matrices, mask = unpack_module(data, len(expected), partial(rows_in_file, layout, "the adapter's layer"))
    except ValueError as error:
        raise ValueError(f"{key} of the adapter file cannot be unpacked: {error}") from error
    found = [tuple(matrix.codes.shape) for matrix in matrices]
    fits = all(b == d and a in (None, c) for (a, b), (c, d) in zip(expected, found, strict=True))
    if matrices[0].bits != bits or not fits:
        raise ValueError(
            f"{key} of the adapter file does not fit: it is packed with {matrices[0].bits} bits and shapes {found}, "
            f"but the adapter was created with {bits} bits and shapes {expected}; create it with the settings it was "
            "saved with (adapter_bits, classifier_bits, r)"
        )
    return matrices, mask


def _read_classifier(model: nn.Module, key: str, data: torch.Tensor) -> torch.Tensor:
    name = key.removesuffix(".weight")
    classifier = dict(model.named_modules()).get(name)
    if not isinstance(classifier, QuantizedLinear):
        raise ValueError(
            f"{key} of the adapter file is packed, but the adapter's head is in full precision; create it with the "
            "classifier_bits it was saved with"
        )
    (matrix,), _ = _unpack(key, data, classifier.quantizer.bits, [(None, classifier.in_features)])
    classifier.packed_weight = matrix
    classifier.quantizer.forget()
    return matrix.latents.to(classifier.weight.dtype)


def _quantized(
    model: nn.Module, adapter_name: str
) -> Iterator[tuple[str, nn.Linear, WeightQuantizer, dict[str, Any]]]:
    """The k-bit weights of an adapter: `(name in the model's state dict, layer, quantiser, heads)`.

    The heads are the quantiser's arguments that say which rows the layer has.
    """
    for name, layer in _layers(model, adapter_name):
        if adapter_name in layer.lora_quantizer:
            quantizer, heads = layer.lora_quantizer[adapter_name], layer.heads_of_rows(adapter_name)
            yield f"{name}.lora_A.{adapter_name}", layer.lora_A[adapter_name], quantizer, {}
            yield f"{name}.lora_B.{adapter_name}", layer.lora_B[adapter_name], quantizer, heads
    for name, classifier in _classifiers(model, adapter_name):
        yield name, classifier, classifier.quantizer, {}


def _in_force(linear: nn.Linear, heads: dict[str, Any]) -> PackedWeight | None:
    return packed_weight(linear, _rows(heads))


def _rows(heads: dict[str, Any]) -> torch.Tensor | None:
    mask = heads.get("head_mask")
    return None if mask is None else heads["layout"].active_rows(mask.active)


def _layers(model: nn.Module, adapter_name: str) -> Iterable[tuple[str, HeadMaskedLinear]]:
    for name, module in own_modules(model):
        if isinstance(module, HeadMaskedLinear) and adapter_name in module.lora_A:
            yield name, module


def _classifiers(model: nn.Module, adapter_name: str) -> Iterable[tuple[str, QuantizedLinear]]:
    """The k-bit classifiers of an adapter: `(name in the model's state dict, classifier)`."""
    for name, module in own_modules(model):
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            classifier = module.modules_to_save[adapter_name]
            if isinstance(classifier, QuantizedLinear):
                yield f"{name}.modules_to_save.{adapter_name}", classifier
