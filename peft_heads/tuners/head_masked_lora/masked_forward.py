"""How an adapter acts on a projection: vanilla and k-bit LoRA, and the wrapper that takes deactivated heads out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import nn

from ..._compat.torch import must_be_called
from ...functional.rows import without_rows


class VanillaVariant(LoraVariant):
    """LoRA as PEFT applies it without a variant, `result + lora_B(lora_A(dropout(x))) · s`, in steps to override.

    Rows of `lora_B` can be left out: they count as zeros, in its bias as well.
    """

    def init(self, module: Linear, adapter_name: str, **kwargs: Any) -> None:
        pass

    def forward(
        self,
        module: Linear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        off: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The layer's output, (…, out).

        Args:
            module: The layer.
            active_adapter: The adapter.
            x: (…, in).
            result: What the base layer returned, (…, out).
            off: bool (out,), the rows that are left out; None for none.
            kwargs: Other variants' arguments.
        """
        hidden = self.down(module, active_adapter, module.lora_dropout[active_adapter](x))
        return result + self.up(module, active_adapter, hidden, off)

    def down(self, module: Linear, active_adapter: str, x: torch.Tensor) -> torch.Tensor:
        """What `lora_B` is applied to: (…, in) to (…, r)."""
        return module.lora_A[active_adapter](x)

    def up_weight(self, module: Linear, active_adapter: str) -> torch.Tensor | None:
        """The weight by which `lora_B` acts, (out, r); None where `lora_B` itself must be called.

        It is a unit of FSDP then, which gathers its weight around the call, or its hooks cast or move the weight.
        """
        lora_B = module.lora_B[active_adapter]
        return None if type(lora_B) is not nn.Linear or must_be_called(lora_B) else lora_B.weight

    def up(self, module: Linear, active_adapter: str, hidden: torch.Tensor, off: torch.Tensor | None) -> torch.Tensor:
        """The update of the output: (…, r) to (…, out)."""
        lora_B, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        weight = self.up_weight(module, active_adapter)
        if weight is None:
            update = lora_B(hidden)
            return (update if off is None else torch.where(off, 0, update)) * scaling
        # Rows of the weight, not of the output: out·r numbers instead of batch·tokens·out.
        bias = lora_B.bias
        if off is not None:
            weight, bias = without_rows(weight, off), None if bias is None else without_rows(bias, off)
        update = F.linear(hidden, weight, bias)
        # Saves a pass over the output. After prepare_model_for_compiled_hotswap the scaling is a tensor and may change.
        is_one = not isinstance(scaling, torch.Tensor) and scaling == 1
        return update if is_one else update * scaling

    def merge_safe(self, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class KBitVariant(VanillaVariant):
    """LoRA by quantised factors, with a dropout between the two, or only one of these (Bi-LoRA)."""

    def down(self, module: Linear, active_adapter: str, x: torch.Tensor) -> torch.Tensor:
        if active_adapter in module.lora_quantizer:
            hidden = F.linear(x, module.quantized_down(active_adapter))
        else:
            hidden = super().down(module, active_adapter, x)
        if active_adapter in module.lora_bottleneck_dropout:
            hidden = module.lora_bottleneck_dropout[active_adapter](hidden)
        return hidden

    def up_weight(self, module: Linear, active_adapter: str) -> torch.Tensor | None:
        if active_adapter in module.lora_quantizer:
            return module.quantized_up(active_adapter)
        return super().up_weight(module, active_adapter)


class HeadMaskVariant(LoraVariant):
    """Wraps a LoRA variant and takes the deactivated heads out of what it does.

    Merging is left to the inner variant; the layer restores the rows of deactivated heads.

    Args:
        inner: The variant; None for vanilla LoRA.
        mask_scope: As of the configuration.
    """

    def __init__(self, inner: LoraVariant | None, mask_scope: str) -> None:
        self.inner = VanillaVariant() if inner is None else inner
        self.mask_scope = mask_scope

    def supports_lora_conversion(self) -> bool:
        # with mask_scope="head" the delta holds minus the frozen weight, and the bias changes: not a low-rank update
        return self.mask_scope == "adapter" and self.inner.supports_lora_conversion()

    def init(self, module: Linear, adapter_name: str, **kwargs: Any) -> None:
        self.inner.init(module, adapter_name=adapter_name, **kwargs)

    def forward(
        self, module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        has_mask = active_adapter in module.head_masks
        off = module.frozen_rows(active_adapter) if has_mask else None
        arguments = {"active_adapter": active_adapter, "x": x, "result": result, **kwargs}
        if isinstance(self.inner, VanillaVariant):
            output = self.inner.forward(module, off=off, **arguments)
        else:
            if module.get_base_layer().weight.is_meta and not x.is_meta:
                raise ValueError(
                    f"{type(self.inner).__name__} computes with the frozen weight itself, which is not there (on the meta "
                    "device, as offloaded weights are): load the model without offloading"
                )
            output = self.inner.forward(module, **arguments)
            if has_mask:
                output = torch.where(off, result, output)
        if has_mask and self.mask_scope == "head":
            output = torch.where(module.deactivated_rows(active_adapter), 0, output)
        return output

    def merge_safe(self, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return self.inner.merge_safe(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> None:
        self.inner.merge_unsafe(module, active_adapter, orig_weight)

    def unmerge(self, module: Linear, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return self.inner.unmerge(module, active_adapter, orig_weight)
