"""The base class of all RLRR layers."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..._compat.torch import must_be_called
from ...functional.rescaling import Rescaling
from ...heads.layout import ProjectionLayout
from .config import RLRRConfig


class RLRRLayer(nn.Module, BaseTunerLayer):
    """Base class of all RLRR layers: adapters by name, merging, mixed batches.

    The changes of several active adapters to the frozen tensors add up, whatever the order of naming or merging.
    """

    # All names of layers that may contain adapter (trainable) weights
    adapter_layer_names: tuple[str, ...] = ("rlrr_left", "rlrr_right", "rlrr_scale_delta", "rlrr_shift")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = ("rlrr_head_mask", "head_layout", "rlrr_variant")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RLRRConfig, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rlrr_left = nn.ParameterDict({})  # S_out (out, r)
        self.rlrr_right = nn.ParameterDict({})  # S_in (r, in)
        # γ - 1 (channels,): weight decay pulls it towards the pre-trained model, and half precision resolves it
        self.rlrr_scale_delta = nn.ParameterDict({})
        self.rlrr_shift = nn.ParameterDict({})  # f (out,), or β (channels,)
        self.rlrr_head_mask = nn.ModuleDict({})
        self.head_layout: dict[str, ProjectionLayout] = {}
        self.rlrr_variant: dict[str, Rescaling] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # the tensors that a merge has overwritten: weight, and bias (None where there was none)
        self._frozen: dict[str, torch.Tensor | None] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, **kwargs)

    def update_layer(
        self, adapter_name: str, config: RLRRConfig, layout: ProjectionLayout | None = None, **kwargs: Any
    ) -> None:
        """Add an adapter. `layout`: the heads of the base layer that it may deactivate; None if there are none."""
        self.rlrr_variant[adapter_name] = config.variant
        self.create_parameters(adapter_name, config, layout)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def create_parameters(self, adapter_name: str, config: RLRRConfig, layout: ProjectionLayout | None) -> None:
        raise NotImplementedError

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """The layer's output with these adapters, none of them merged."""
        raise NotImplementedError

    def changed_tensors(self, adapter_names: list[str]) -> dict[str, torch.Tensor]:
        """`{"weight": …, "bias": …}` of the base layer with the changes of these adapters; no bias where there is none."""
        raise NotImplementedError

    @property
    def must_be_called(self) -> bool:
        """Whether somebody listens to the base layer, or has put a forward of his own into it (Accelerate)."""
        return must_be_called(self.get_base_layer())

    def call_base_layer(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Call the base layer with its changed tensors, which autograd keeps for the backward pass."""
        return torch.func.functional_call(self.get_base_layer(), self.changed_tensors(adapter_names), (x,))

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self.rlrr_variant

    def frozen_weight(self) -> torch.Tensor:
        """The base layer's weight without anything merged into it."""
        return self._frozen["weight"].to(self.weight) if self.merged else self.get_base_layer().weight

    def frozen_bias(self) -> torch.Tensor | None:
        bias = self._frozen["bias"] if self.merged else self.get_base_layer().bias
        return bias.to(self.weight) if self.merged and bias is not None else bias

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        self._check_weight(x, self.frozen_weight())
        return self.adapted_forward(x, active)

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any):
        """Output for each example with the adapter named for it; `__base__` is the frozen layer."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        self._check_weight(x, self.frozen_weight())
        result = None
        for name in dict.fromkeys(adapter_names):
            index = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            part = x[index]
            part = self.adapted_forward(part, [name]) if self.has_adapter(name) else self.base_layer(part)
            result = part.new_empty(len(x), *part.shape[1:]) if result is None else result
            result[index] = part
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the base layer, which gets a bias if it has none; see PEFT's layers.

        The overwritten tensors are kept, so that `unmerge` restores them bit for bit. Until then the adapted weights are
        in memory twice (not after `merge_and_unload`).
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not adapter_names:
            return
        base_layer, frozen = self.get_base_layer(), {"weight": self.frozen_weight(), "bias": self.frozen_bias()}
        merged = [*self.merged_adapters, *adapter_names]
        with torch.no_grad():
            changed = self.changed_tensors(merged)
        for name, tensor in changed.items() if safe_merge else ():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"NaNs detected in the merged {name}. The adapter {adapter_names} seems to be broken")
        if not self.merged:
            self._frozen = {name: None if tensor is None else tensor.data for name, tensor in frozen.items()}
        for name, tensor in changed.items():
            if getattr(base_layer, name) is None:
                setattr(base_layer, name, nn.Parameter(tensor, requires_grad=False))
            else:
                getattr(base_layer, name).data = tensor
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Restore what `merge` has overwritten, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        base_layer, frozen = self.get_base_layer(), self._frozen
        for name, tensor in frozen.items():
            param = getattr(base_layer, name)
            if tensor is not None:
                param.data = tensor.to(param)  # the model may have been cast or moved since
            elif param is not None:
                setattr(base_layer, name, None)
        self._frozen, self.merged_adapters = {}, []

    def __repr__(self) -> str:
        return "rlrr." + super().__repr__()

    @staticmethod
    def _check_weight(x: torch.Tensor, weight: torch.Tensor) -> None:
        """Raise ValueError if the frozen weight is not there.

        ZeRO 3 and offloading put it in place only while the frozen layer is called, which this layer does not do.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "RLRR computes with the frozen weight itself, which ZeRO 3 of DeepSpeed keeps in parts; use ZeRO 1 or 2, "
                "DistributedDataParallel or FSDP2"
            )
        if weight.is_meta and not x.is_meta:
            raise ValueError(
                "RLRR computes with the frozen weight itself, which is not there (on the meta device, as offloaded "
                "weights are): load the model without offloading"
            )
