"""The LoRA layer that carries a binary mask per attention head."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import nn

from ...functional.sharding import on_gradient
from ...heads.layout import ProjectionLayout
from ..common.head_mask import HeadMask, HeadMaskedLayer
from ..common.quantizer import WeightQuantizer
from .config import FULL_PRECISION, HeadMaskedLoraConfig


# The up-projection of a k-bit adapter (Bi-LoRA): a normal that is cut off. Zeros would have no deviation.
UP_STD, UP_LIMIT = 0.001, 0.002


class HeadMaskVariant(LoraVariant):
    """Wraps a LoRA variant (None for vanilla LoRA) and takes the deactivated heads out of what it does.

    Vanilla LoRA acts by quantised weights here where the adapter has them, with a dropout between if it has one.
    In the forward pass the mask multiplies the rows of `lora_B`, not the output: out·r numbers instead of
    batch·tokens·out. Merging is left to the inner variant; the layer restores the rows of deactivated heads.
    """

    def __init__(self, inner: LoraVariant | None, mask_scope: str) -> None:
        self.inner = inner
        self.mask_scope = mask_scope

    def supports_lora_conversion(self) -> bool:
        # with mask_scope="head" the delta holds minus the frozen weight, and the bias changes: not a low-rank update
        return self.mask_scope == "adapter" and (self.inner is None or self.inner.supports_lora_conversion())

    def init(self, module: HeadMaskedLinear, adapter_name: str, **kwargs: Any) -> None:
        if self.inner is not None:
            self.inner.init(module, adapter_name=adapter_name, **kwargs)

    def forward(
        self, module: HeadMaskedLinear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        if self.inner is None:
            hidden = self._down(module, active_adapter, module.lora_dropout[active_adapter](x))  # (…, r)
            output = result + self._up(module, active_adapter, hidden)
        else:
            if module.get_base_layer().weight.is_meta and not x.is_meta:
                raise ValueError(
                    f"{type(self.inner).__name__} computes with the frozen weight itself, which is not there (on the meta "
                    "device, as offloaded weights are): load the model without offloading"
                )
            output = self.inner.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
            if active_adapter in module.lora_head_mask:
                output = torch.where(module.frozen_rows(active_adapter), result, output)
        if self.mask_scope == "head" and active_adapter in module.lora_head_mask:
            output = torch.where(module.deactivated_rows(active_adapter), 0, output)
        return output

    @staticmethod
    def _down(module: HeadMaskedLinear, active_adapter: str, x: torch.Tensor) -> torch.Tensor:
        """`lora_A`, and the dropout behind it: (…, in) to (…, r)."""
        if active_adapter in module.lora_quantizer:
            hidden = F.linear(x, module.quantized_down(active_adapter))
        else:
            hidden = module.lora_A[active_adapter](x)
        if active_adapter in module.lora_bottleneck_dropout:
            hidden = module.lora_bottleneck_dropout[active_adapter](hidden)
        return hidden

    @staticmethod
    def _up(module: HeadMaskedLinear, active_adapter: str, hidden: torch.Tensor) -> torch.Tensor:
        """`lora_B` without the rows of deactivated heads, times s: (…, r) to (…, out)."""
        lora_B, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = "forward" in vars(lora_B) or any(getattr(lora_B, name) for name in hooks)  # the first: Accelerate
        is_quantized = active_adapter in module.lora_quantizer
        if is_quantized or (type(lora_B) is nn.Linear and not hooked):
            weight = module.quantized_up(active_adapter) if is_quantized else lora_B.weight
            bias = None if lora_B.bias is None else module.mask_rows(active_adapter, lora_B.bias)
            update = F.linear(hidden, module.mask_rows(active_adapter, weight), bias)
            # one pass over an output less; a tensor after prepare_model_for_compiled_hotswap, which may change
            is_one = not isinstance(scaling, torch.Tensor) and scaling == 1
            return update if is_one else update * scaling
        # It must be called: it is a unit of FSDP, which gathers its weight then, or is cast or moved by its hooks.
        update = lora_B(hidden)
        if active_adapter in module.lora_head_mask:
            update = torch.where(module.frozen_rows(active_adapter), 0, update)
        return update * scaling

    def merge_safe(self, module: HeadMaskedLinear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if self.inner is not None:
            return self.inner.merge_safe(module, active_adapter, orig_weight)
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: HeadMaskedLinear, active_adapter: str, orig_weight: torch.Tensor) -> None:
        if self.inner is not None:
            self.inner.merge_unsafe(module, active_adapter, orig_weight)
        else:
            orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: HeadMaskedLinear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if self.inner is not None:
            return self.inner.unmerge(module, active_adapter, orig_weight)
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class HeadMaskedLinear(HeadMaskedLayer, Linear):
    """LoRA on a query, key or value projection, with one binary mask entry per attention head.

    From the moment a head is deactivated its part of the update is exactly zero: in the forward pass, in
    `get_delta_weight`, in merged weights, with DoRA and in mixed batches. With `mask_scope="head"` the projection's
    whole output for that head is zero, bias included.

    With `adapter_bits` below 32, everything that the layer does it does with the quantised factors; the parameters
    are the full-precision weights behind them.

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
        if not hasattr(self, "lora_head_mask"):  # the parent's __init__ comes here to create the first adapter
            self.lora_head_mask = nn.ModuleDict({})
            self.lora_bottleneck_dropout = nn.ModuleDict({})
            self.classifier_bits: dict[str, int] = {}
            # rows of the base weight and bias that a merge has overwritten, per merged adapter
            self._overwritten_rows: dict[str, list[torch.Tensor]] = {}
        layout = self.head_layout.get(adapter_name)
        if layout is not None and (config.masks_heads or not layout.covers_all_rows):
            self.lora_head_mask[adapter_name] = HeadMask(layout.num_heads)
        self.classifier_bits[adapter_name] = config.classifier_bits
        if config.bottleneck_dropout > 0:
            self.lora_bottleneck_dropout[adapter_name] = nn.Dropout(config.bottleneck_dropout)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

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
        ours = config.masks_heads or self.freezes_rows or config.changes_lora
        return HeadMaskVariant(inner, config.mask_scope) if ours else inner

    # k-bit adapters

    def quantized_down(self, adapter_name: str) -> torch.Tensor:
        """`lora_A` as a k-bit adapter has it, (r, in)."""
        return self.lora_quantizer[adapter_name](self.lora_A[adapter_name])

    def quantized_up(self, adapter_name: str) -> torch.Tensor:
        """`lora_B` as a k-bit adapter has it, (out, r), with zeros in the rows that the adapter must not change."""
        return self.lora_quantizer[adapter_name](self.lora_B[adapter_name], **self.heads_of_rows(adapter_name))

    def heads_of_rows(self, adapter_name: str) -> dict[str, Any]:
        """What tells the quantiser which rows `lora_B` has; empty if all of them."""
        if adapter_name not in self.lora_head_mask:
            return {}
        return {"layout": self.head_layout[adapter_name], "head_mask": self.lora_head_mask[adapter_name]}

    def train(self, mode: bool = True) -> HeadMaskedLinear:
        if mode != self.training:
            for quantizer in self.lora_quantizer.values():
                quantizer.forget()
        return super().train(mode)

    # The protocol of heads/protocol.py

    def head_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """`lora_B`'s weight (out, r) and, if it has one, bias (out,); `lora_A` is shared by all heads."""
        lora_B = self.lora_B[adapter_name]
        return [lora_B.weight] if lora_B.bias is None else [lora_B.weight, lora_B.bias]

    def scored_tensor(self, adapter_name: str, param: nn.Parameter) -> torch.Tensor:
        if not self._is_quantized(adapter_name, param):
            return param
        with torch.enable_grad():  # the value that the passes with gradients act by, also if asked in a hook
            return self.quantized_up(adapter_name)

    def on_scored_gradient(
        self, adapter_name: str, param: nn.Parameter, call: Callable[[torch.Tensor, bool], None]
    ) -> Any:
        if self._is_quantized(adapter_name, param):
            return self.lora_quantizer[adapter_name].on_gradient(self.lora_B[adapter_name], call)
        return on_gradient(param, call)

    def _is_quantized(self, adapter_name: str, param: nn.Parameter) -> bool:
        return adapter_name in self.lora_quantizer and param is self.lora_B[adapter_name].weight

    def mask_rows(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        """`rows` (out, ...) with the rows that the adapter must not change replaced by zero."""
        if adapter_name not in self.lora_head_mask:
            return rows  # ne=0
        frozen = self.frozen_rows(adapter_name).view(-1, *[1] * (rows.dim() - 1))
        return torch.where(frozen, 0, rows)  # no product: a row that has become inf or nan is zero as well

    def active_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (out,), True = the adapter may change the row."""
        return self.head_layout[adapter_name].active_rows(self.get_head_mask(adapter_name))

    def frozen_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (out,), True = the adapter, which has a mask, must not change the row."""
        return self.head_layout[adapter_name].rows_of(self.lora_head_mask[adapter_name](), outside=True)

    # Everything that merges rests on the delta weight and, for what PEFT adds outside of it (DoRA's magnitude,
    # lora_B's bias), on restoring the rows of deactivated heads.

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
                # one by one, so that each knows the rows it found; the adapters before it are no news
                warnings.filterwarnings("ignore", message="Already following adapters were merged")
                super().merge(safe_merge=safe_merge, adapter_names=[adapter_name])
            if rows and adapter_name in self.merged_adapters:
                self._overwritten_rows[adapter_name] = rows
                self._write_frozen_base_rows(adapter_name, rows)
                if self.lora_variant[adapter_name].mask_scope == "head":
                    for tensor in self._base_tensors():
                        tensor[self.deactivated_rows(adapter_name)] = 0

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
        if adapter_name not in self.lora_head_mask:
            return []
        off = self.frozen_rows(adapter_name)
        return [tensor[off].clone() for tensor in self._base_tensors()] if off.any() else []

    def _write_frozen_base_rows(self, adapter_name: str, rows: list[torch.Tensor]) -> None:
        off = self.frozen_rows(adapter_name)
        for tensor, values in zip(self._base_tensors(), rows, strict=True):
            tensor[off] = values.to(tensor)  # the model may have been cast or moved since

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT converts the delta weight alone, neither DoRA's magnitude nor the bias of lora_B, and copies the trained
        # head's parameters, which are not what a head of few bits acts by
        beside = self.use_dora.get(adapter_name) or self.lora_bias.get(adapter_name)
        few_bits = self.classifier_bits.get(adapter_name, FULL_PRECISION) != FULL_PRECISION
        return not beside and not few_bits and super().supports_lora_conversion(adapter_name)

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "head_masked_lora.", 1)
