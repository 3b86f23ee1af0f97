"""The numbers of a Bi-LoRA file as the weights of a packed adapter, and back."""

from __future__ import annotations

from typing import Any

import torch

from ...functional.packing import PackedWeight, pack_module, read_mask, unpack_module
from ...tuners.common.saved_keys import BASE, module_of, renamed_keys
from ...tuners.head_masked_lora.config import FULL_PRECISION
from ...tuners.head_masked_lora.packed import PACKED
from .base_model import empty_vit, projections
from .files import Weights
from .settings import NUM_BLOCKS, OTHER_FORMS, WIDTH


CLASSIFIER = f"{BASE}classifier"


def state_dict_of(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights as a packed adapter's file holds them."""
    state_dict = {
        f"{BASE}{name}.{PACKED}": pack_module(factors)
        for name, factors in zip(projections(empty_vit()), weights.factors, strict=True)
    }
    if weights.bias is None:  # the authors' 1-bit classifier has none, but transformers' has
        state_dict |= {
            f"{CLASSIFIER}.weight": pack_module([weights.classifier]),
            f"{CLASSIFIER}.bias": torch.zeros(weights.num_class),
        }
    else:
        state_dict |= {
            f"{CLASSIFIER}.weight": weights.classifier.contiguous(),
            f"{CLASSIFIER}.bias": weights.bias.contiguous(),
        }
    return state_dict


def weights_of(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> Weights:
    """The numbers of a Bi-LoRA file from the weights of a packed adapter.

    Args:
        state_dict: The weights, as they stand in the adapter's file.
        config: The adapter's configuration.

    Raises:
        ValueError: The form has no place for one of them, or one is missing.
    """
    vit = empty_vit()
    present = [name for name, _ in vit.named_modules()]
    tensors = {new: state_dict[key] for key, new in renamed_keys(state_dict, present).items()}
    keys = [f"{BASE}{name}.{PACKED}" for name in projections(vit)]
    expected = {*keys, f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"}
    surplus, missing = sorted(set(tensors) - expected), sorted(expected - set(tensors))
    if surplus or missing:
        what = f"besides it has {surplus[0]}" if surplus else f"it has no {missing[0]}"
        raise ValueError(
            f"the form is q and v of all {NUM_BLOCKS} blocks of a ViT-B/16 and its classifier, but {what}{OTHER_FORMS}"
        )
    factors = [_factors(key, tensors[key], config["adapter_bits"], config["r"]) for key in keys]
    classifier_bits = config.get("classifier_bits", FULL_PRECISION)
    return Weights(
        factors, *_classifier(tensors[f"{CLASSIFIER}.weight"], tensors[f"{CLASSIFIER}.bias"], classifier_bits)
    )


def _factors(key: str, data: torch.Tensor, bits: int, rank: int) -> tuple[PackedWeight, PackedWeight]:
    """Down and up of one projection; `bits` and `rank` are those of the settings."""

    try:
        mask = read_mask(data)
        if mask is not None and not mask.all():
            raise ValueError(
                f"heads {(~mask).nonzero().flatten().tolist()} are deactivated, and the form has no place for head "
                f"masks{OTHER_FORMS}"
            )
        (down, up), _ = unpack_module(data, 2)
    except ValueError as error:
        raise ValueError(f"{module_of(key)}: {error}") from error
    shapes = [tuple(matrix.codes.shape) for matrix in (down, up)]
    if shapes != [(rank, WIDTH), (WIDTH, rank)] or down.bits != bits:
        raise ValueError(
            f"{module_of(key)} has factors of shape {shapes[0]} and {shapes[1]} with {down.bits} bits; expected "
            f"{(rank, WIDTH)} and {(WIDTH, rank)} with {bits}"
        )
    return down, up


def _classifier(
    weight: torch.Tensor, bias: torch.Tensor, bits: int
) -> tuple[PackedWeight | torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the classifier as the file holds them: in float32, or packed and without a bias."""
    if bits == FULL_PRECISION:
        matrix, bias = weight.float(), bias.float()
        shape, found_bits = tuple(matrix.shape), bits
        if not (matrix.isfinite().all() and bias.isfinite().all()):
            raise ValueError("the classifier has entries that are not finite")
    else:
        try:
            (matrix,), _ = unpack_module(weight, 1)
        except ValueError as error:
            raise ValueError(f"the classifier: {error}") from error
        shape, found_bits = tuple(matrix.codes.shape), matrix.bits
        if bias.count_nonzero():
            raise ValueError(
                f"the classifier of {bits} bit has a bias, for which the form has no place; train it with "
                f"classifier_bits={FULL_PRECISION}{OTHER_FORMS}"
            )
    if shape != (bias.numel(), WIDTH) or found_bits != bits:
        raise ValueError(
            f"the classifier has the shape {shape} with {found_bits} bits; expected {(bias.numel(), WIDTH)} with {bits}"
        )
    return matrix, bias if bits == FULL_PRECISION else None
