"""The LoRA layer that carries a binary mask per attention head."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import nn

from ...functional.rows import without_rows
from ...heads.layout import ProjectionLayout
from ...heads.protocol import ScoredParameter
from ..common.head_mask import HeadMask, HeadMaskedLayer
from ..common.quantizer import WeightQuantizer
from .config import FULL_PRECISION, HeadMaskedLoraConfig
from .masked_forward import HeadMaskVariant, KBitVariant


# `lora_B` of a k-bit adapter is initialised by a normal that is cut off (Bi-LoRA): zeros would have no deviation.
UP_STD, UP_LIMIT = 0.001, 0.002


class HeadMaskedLinear(HeadMaskedLayer, Linear):
    """LoRA on a query, key or value projection, with one binary mask entry per attention head.

    From the moment a head is deactivated its part of the update is exactly zero: in the forward pass, in
    `get_delta_weight`, in merged weights, with DoRA and in mixed batches. With `mask_scope="head"` the projection's
    whole output for that head is zero, bias included.

    With `adapter_bits` below 32 the layer always uses the quantised factors; the parameters are the full-precision
    weights behind them.

    An adapter with `ne=0`, in full precision, has no mask here and takes stock LoRA's path.
    """

    head_masks_name = "lora_head_mask"
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = (
        *Linear.other_param_names,
        "lora_head_mask",
        "head_layout",
        "lora_bottleneck_dropout",
        "lora_quantizer",
        "classifier_bits",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: HeadMaskedLoraConfig,
        *,
        layout: ProjectionLayout | None = None,
        quantizer: WeightQuantizer | None = None,
        **kwargs: Any,
    ) -> None:
        self.head_layout: dict[str, ProjectionLayout] = {}
        self.lora_quantizer: dict[str, WeightQuantizer] = {}
        self.expect_adapter(adapter_name, layout, quantizer)
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def expect_adapter(
        self, adapter_name: str, layout: ProjectionLayout | None, quantizer: WeightQuantizer | None
    ) -> None:
        """To be called before `update_layer` adds an adapter, to which PEFT passes no arguments of ours.

        Args:
            adapter_name: The adapter.
            layout: Heads of the projection; None if it has none.
            quantizer: The quantiser of the adapter's factors; None if they are in full precision.
        """
        if layout is not None:
            self.head_layout[adapter_name] = layout
        if quantizer is not None:
            self.lora_quantizer[adapter_name] = quantizer

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: HeadMaskedLoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter that `expect_adapter` has announced."""
        self.add_mask(adapter_name, config)
        self.classifier_bits[adapter_name] = config.classifier_bits
        if config.bottleneck_dropout > 0:
            self.lora_bottleneck_dropout[adapter_name] = nn.Dropout(config.bottleneck_dropout)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def add_mask(self, adapter_name: str, config: HeadMaskedLoraConfig) -> None:
        """Give an adapter that `expect_adapter` has announced its mask, if it has one here: everything is active."""
        if not hasattr(self, self.head_masks_name):  # the parent's __init__ adds the first adapter
            setattr(self, self.head_masks_name, nn.ModuleDict({}))
            self.lora_bottleneck_dropout = nn.ModuleDict({})
            self.classifier_bits: dict[str, int] = {}
            # rows of the base weight and bias that a merge has overwritten, per merged adapter
            self._overwritten_rows: dict[str, list[torch.Tensor]] = {}
        layout = self.head_layout.get(adapter_name)
        if layout is not None and (config.masks_heads or not layout.covers_all_rows or layout.has_neurons):
            self.head_masks[adapter_name] = HeadMask(layout.num_heads)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        super().reset_lora_parameters(adapter_name, init_lora_weights)
        if adapter_name in self.lora_quantizer and init_lora_weights is not False:
            nn.init.trunc_normal_(self.lora_B[adapter_name].weight, std=UP_STD, a=-UP_LIMIT, b=UP_LIMIT)

    @property
    def freezes_rows(self) -> bool:
        """Whether rows are out of bounds for any adapter: those of a fused projection's other parts."""
        return not all(layout.covers_all_rows for layout in self.head_layout.values())

    def resolve_lora_variant(self, *, config: HeadMaskedLoraConfig, **kwargs) -> LoraVariant | None:
        inner = super().resolve_lora_variant(config=config, **kwargs)
        if inner is None and config.changes_lora:
            inner = KBitVariant()
        return HeadMaskVariant(inner, self.scope_of(config)) if self.has_masks(config) else inner

    def has_masks(self, config: HeadMaskedLoraConfig) -> bool:
        """Whether an adapter of a configuration may have rows that it must leave alone."""
        return config.masks_heads or self.freezes_rows

    def scope_of(self, config: HeadMaskedLoraConfig) -> str:
        """What a deactivated unit loses: `"adapter"` or `"head"`."""
        return config.mask_scope

    def silences_rows(self, adapter_name: str) -> bool:
        """Whether the whole output of a deactivated unit is zero, and not only the adapter's part of it."""
        return self.lora_variant[adapter_name].mask_scope == "head"

    # k-bit adapters

    def quantized_down(self, adapter_name: str) -> torch.Tensor:
        """The quantised `lora_A` of a k-bit adapter, (r, in)."""
        return self.lora_quantizer[adapter_name](self.lora_A[adapter_name])

    def quantized_up(self, adapter_name: str) -> torch.Tensor:
        """The quantised `lora_B` of a k-bit adapter, (out, r); rows that the adapter must not change are zeros."""
        return self.lora_quantizer[adapter_name](self.lora_B[adapter_name], **self.heads_of_rows(adapter_name))

    def heads_of_rows(self, adapter_name: str) -> dict[str, Any]:
        """The quantiser's arguments that say which rows `lora_B` has; empty if it has all of them."""
        if adapter_name not in self.head_masks:
            return {}
        return {"layout": self.head_layout[adapter_name], "head_mask": self.head_masks[adapter_name]}

    def train(self, mode: bool = True) -> HeadMaskedLinear:
        if mode != self.training:
            for quantizer in self.lora_quantizer.values():
                quantizer.forget()
        return super().train(mode)

    # The protocol of heads/protocol.py

    def scored_parameters(self, adapter_name: str) -> list[ScoredParameter]:
        """`lora_B`'s weight (out, r) and, if it has one, bias (out,); `lora_A` is shared by all heads."""
        lora_B = self.lora_B[adapter_name]
        if adapter_name in self.lora_quantizer:
            scored = [QuantizedUp(lora_B.weight, self, adapter_name)]
        else:
            scored = [ScoredParameter(lora_B.weight)]
        return scored if lora_B.bias is None else [*scored, ScoredParameter(lora_B.bias)]

    def mask_rows(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        """`rows` (out, ...) with the rows that the adapter must not change replaced by zero."""
        if adapter_name not in self.head_masks:
            return rows  # ne=0
        return without_rows(rows, self.frozen_rows(adapter_name))

    def active_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (out,), True = the adapter may change the row."""
        return self.head_layout[adapter_name].active_rows(self.get_head_mask(adapter_name))

    def frozen_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (out,), True = the adapter, which has a mask, must not change the row."""
        return self.head_layout[adapter_name].rows_of(self.head_masks[adapter_name](), outside=True)

    # Merging uses the delta weight. PEFT adds more outside of it (DoRA's magnitude, lora_B's bias), so the rows of
    # deactivated heads are restored afterwards.

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's update of the weight, (out, in), with zero rows where it must not change the base."""
        if adapter in self.lora_quantizer:
            down, up = self.quantized_down(adapter), self.quantized_up(adapter)
            wide = torch.promote_types(up.dtype, torch.float32)
            delta = transpose(up.to(wide) @ down.to(wide), self.fan_in_fan_out) * self.scaling[adapter]
            return self.mask_rows(adapter, delta.to(up.dtype))
        return self.mask_rows(adapter, super().get_delta_weight(adapter))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            rows = self._frozen_base_rows(adapter_name)
            with warnings.catch_warnings():
                # Merged one by one, so that each adapter's overwritten rows are known. PEFT would warn of the earlier ones.
                warnings.filterwarnings("ignore", message="Already following adapters were merged")
                self.merge_update(adapter_name, safe_merge)
            if rows and adapter_name in self.merged_adapters:
                self._overwritten_rows[adapter_name] = rows
                self._write_frozen_base_rows(adapter_name, rows)
                if self.silences_rows(adapter_name):
                    for tensor in self._base_tensors():
                        tensor[self.deactivated_rows(adapter_name)] = 0

    def merge_update(self, adapter_name: str, safe_merge: bool) -> None:
        """Merge an adapter without regard to rows that it must not change."""
        super().merge(safe_merge=safe_merge, adapter_names=[adapter_name])

    def unmerge(self) -> None:
        if not self.merged:
            super().unmerge()  # warns
        while self.merged_adapters:  # last merged, first unmerged, each with its rows
            *rest, adapter_name = self.merged_adapters
            self.merged_adapters = [adapter_name]
            try:
                super().unmerge()
            finally:
                self.merged_adapters = rest
            rows = self._overwritten_rows.get(adapter_name)
            if rows:
                self._write_frozen_base_rows(adapter_name, rows)
                del self._overwritten_rows[adapter_name]

    def _base_tensors(self) -> list[torch.Tensor]:
        base_layer = self.get_base_layer()
        return [tensor.data for tensor in (base_layer.weight, base_layer.bias) if tensor is not None]

    def _frozen_base_rows(self, adapter_name: str) -> list[torch.Tensor]:
        """Copies of the base weight's and bias's rows that the adapter must not change; empty if there are none."""
        if adapter_name not in self.head_masks:
            return []
        off = self.frozen_rows(adapter_name)
        return [tensor[off].clone() for tensor in self._base_tensors()] if off.any() else []

    def _write_frozen_base_rows(self, adapter_name: str, rows: list[torch.Tensor]) -> None:
        off = self.frozen_rows(adapter_name)
        for tensor, values in zip(self._base_tensors(), rows, strict=True):
            tensor[off] = values.to(tensor)  # the model may have been cast or moved since

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT converts the delta weight alone, without DoRA's magnitude and the bias of lora_B. It copies the trained
        # classifier's parameters, but a classifier of few bits acts by others.
        beside = self.use_dora.get(adapter_name) or self.lora_bias.get(adapter_name)
        few_bits = self.classifier_bits.get(adapter_name, FULL_PRECISION) != FULL_PRECISION
        return not beside and not few_bits and super().supports_lora_conversion(adapter_name)

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "head_masked_lora.", 1)


@dataclass(frozen=True, eq=False)
class QuantizedUp(ScoredParameter):
    """`lora_B`'s weight of a k-bit adapter, which is scored by its quantised value.

    Attributes:
        layer: The layer.
        adapter_name: The adapter.
    """

    layer: HeadMaskedLinear
    adapter_name: str

    def tensor(self) -> torch.Tensor:
        # A hook runs without gradients, but the value of a pass with gradients is meant.
        with torch.enable_grad():
            return self.layer.quantized_up(self.adapter_name)

    def on_gradient(self, call: Callable[[torch.Tensor, bool], None]) -> Any:
        return self.layer.lora_quantizer[self.adapter_name].on_gradient(self.layer.lora_B[self.adapter_name], call)
