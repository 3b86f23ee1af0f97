"""The gradients of an adapter's heads over one optimizer step, on however many processes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..functional.sharding import is_dtensor, whole, whole_shape, whole_value
from ..heads.protocol import HeadMaskable, ScoredParameter, module_patterns


class StepGradients:
    """Gathers the gradients of an adapter's head-wise parameters over the backward passes of a step.

    Args:
        layers: `{module name: layer}` of the adapter's head-maskable layers.
        adapter_name: The adapter.
    """

    def __init__(self, layers: dict[str, HeadMaskable], adapter_name: str) -> None:
        self.layers = layers
        self.adapter_name = adapter_name
        self._grads: dict[nn.Parameter, torch.Tensor] = {}
        # The values during the step's backward passes. Afterwards is too late: DeepSpeed steps by itself.
        self._values: dict[nn.Parameter, torch.Tensor] = {}
        self._num_gradients = 0
        self._handles: list[Any] = []

    @property
    def listening(self) -> bool:
        return bool(self._handles)

    def listen(self) -> None:
        # The hooks hold a weak reference: an object that is dropped without stop() stops listening.
        this = weakref.ref(self)
        for layer in self.layers.values():
            for scored in layer.scored_parameters(self.adapter_name):
                self._handles.append(scored.on_gradient(_accumulate_into(this, scored)))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """Begin the next step."""
        self._grads, self._values = {}, {}
        self._num_gradients = 0

    def values(self, now: bool = False) -> dict[str, torch.Tensor]:
        """The values that the gradients belong to, or with `now` the current ones: `{module name: (out_features, n)}`."""
        seen = {} if now else self._values
        return {
            name: _side_by_side(
                whole(seen[scored.param]) if scored.param in seen else whole_value(scored.tensor())
                for scored in layer.scored_parameters(self.adapter_name)
            )
            for name, layer in self.layers.items()
        }

    def over_processes(self, others: Iterable[nn.Parameter]) -> tuple[dict[str, torch.Tensor], bool]:
        """The gradients of the global batch, by one reduction for all modules and one synchronisation with the device.

        Args:
            others: Parameters whose gradients, if they have any, must be finite as well.

        Returns:
            `{module name: float32 (out_features, n)}`, the mean over processes, and whether everything is finite.

        Raises:
            RuntimeError: No gradient was heard on any process.
        """
        grads = {
            name: _side_by_side(
                # A process that ran out of data takes part with zeros.
                whole(self._grads[scored.param])
                if scored.param in self._grads
                else torch.zeros(whole_shape(scored.param), dtype=torch.float32, device=scored.param.device)
                for scored in layer.scored_parameters(self.adapter_name)
            )
            for name, layer in self.layers.items()
        }
        device = next(iter(grads.values())).device
        slopes = [param.grad for param in others if param.grad is not None]
        others_finite = _all_finite([slope.to_local() if is_dtensor(slope) else slope for slope in slopes], device)
        broken = (~others_finite).float()
        flags = torch.stack([torch.full_like(broken, self._num_gradients), broken])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # FSDP2 has already reduced its gradients.
            mine = {name: grad for name, grad in grads.items() if not self._is_sharded_by_fsdp(name)}
            flat = torch.cat([flags, *(grad.flatten().to(flags.device) for grad in mine.values())])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            flags, *parts = flat.split([2, *(grad.numel() for grad in mine.values())])
            grads |= {name: part.view_as(grad) for (name, grad), part in zip(mine.items(), parts, strict=True)}
        finite = _all_finite(list(grads.values()), device).float()
        num_gradients, others_broken, finite = torch.stack([*flags, finite]).tolist()
        if not num_gradients:
            raise RuntimeError(
                f"no gradient has reached adapter {self.adapter_name!r} since the last update, in any of its "
                f"projections ({module_patterns(self.layers)}): is it the active adapter, was backward() called, was "
                "update() called only once for the step, and does the loss depend on these layers?"
            )
        return grads, bool(finite) and not others_broken

    def _accumulate(self, scored: ScoredParameter, grad: torch.Tensor, is_total: bool) -> None:
        self._num_gradients += 1
        grad, param = grad.detach().float(), scored.param
        if param not in self._values:
            self._values[param] = scored.tensor().detach().clone()
        self._grads[param] = grad.clone() if is_total or param not in self._grads else self._grads[param] + grad

    def _is_sharded_by_fsdp(self, name: str) -> bool:
        return any(is_dtensor(scored.param) for scored in self.layers[name].scored_parameters(self.adapter_name))


def _accumulate_into(gradients: weakref.ref[StepGradients], scored: ScoredParameter):
    def hook(grad: torch.Tensor, is_total: bool) -> None:
        this = gradients()
        if this is not None:
            this._accumulate(scored, grad, is_total)

    return hook


def _side_by_side(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    tensors = [tensor.reshape(tensor.shape[0], -1) for tensor in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


def _all_finite(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Bool (), on `device`. The largest absolute value decides: a few kernels, however many tensors."""
    tensors = [tensor for tensor in tensors if tensor.numel()]  # a process may hold none of a sharded tensor's rows
    return torch.nn.utils.get_total_norm(tensors, norm_type=torch.inf).isfinite().to(device)
