"""Gates on the outputs of a model's heads and neurons: the derivatives of each image's loss, while training listens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._compat.torch import backward_pass, device_with_float64
from ..heads.gates import GATE_STATISTICS, gate_statistics, gated, new_gates
from .gated_modules import KINDS, GatedModule, gated_modules, modules_around_blocks


@dataclass(frozen=True)
class StepGates:
    """The statistics of a step's images, the same on all processes.

    Attributes:
        sums: float64 (3, units of all modules) in the order of `GATE_STATISTICS`.
        num_images: Number of images.
        finite: Whether all sums are finite.
    """

    sums: torch.Tensor
    num_images: int
    finite: bool


class GateRecorder:
    """Gathers the derivatives by gates over the backward passes of optimizer steps, and sums their statistics.

    A forward pass with gradients puts a gate of 1 on each head and each neuron, for each image; the numbers stay the
    same to the bit. The derivatives that its backward pass brings, times what the loss was divided by, are those of
    each image's own loss: the loss of a micro-batch is the mean over its images, and that of a step the mean over its
    micro-batches, or (`num_items_in_batch` of Trainer) over all its images. A forward pass without a backward pass
    leaves nothing behind.

    Args:
        model: The model, with adapters or without, as it is called.

    Raises:
        ValueError: It has no blocks with heads or neurons that gates could stand on.

    Attributes:
        modules: The modules whose inputs get gates, in the model's order.
        sums: float64 (3, units of all modules) in the order of `GATE_STATISTICS`; None before the first step.
        num_images: Number of images that have been summed over, on all processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = gated_modules(model)
        if not self.modules:
            raise ValueError(
                f"{type(model).__name__} has no blocks whose heads or neurons could have gates; choose criteria that need "
                "none (absolute, grad_norm)"
            )
        self.sums: torch.Tensor | None = None
        self.num_images = 0
        # What is called with the images: the model, or whatever part of it is called by itself.
        self._outer = modules_around_blocks(model)
        self._entered: nn.Module | None = None  # the outermost of these that is being called
        self._images_now = 0
        self._num_images: dict[tuple[GatedModule, int], int] = {}
        self._heard: dict[GatedModule, dict[int, torch.Tensor]] = {}
        self._backward_passes: set[int] = set()
        self._is_mean_of_all = False
        self._handles: list[Any] = []

    @property
    def listening(self) -> bool:
        return bool(self._handles)

    def listen(self) -> None:
        # The hooks hold a weak reference, as those of StepGradients do.
        this = weakref.ref(self)
        for module in self._outer:
            enter, leave = _call(this, GateRecorder._enter), _call(this, GateRecorder._leave)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        for each in self.modules:
            put = _call(this, GateRecorder._put_gates, each)
            self._handles.append(each.module.register_forward_pre_hook(put, with_kwargs=True))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._entered = [], None
        self.clear()

    def clear(self) -> None:
        """Begin the next step."""
        self._heard, self._backward_passes, self._is_mean_of_all = {}, set(), False

    def reset(self) -> None:
        """Begin the sums anew."""
        self.sums, self.num_images = None, 0

    def over_processes(self, loss_scale: float = 1.0) -> StepGates:
        """The statistics of the step's images on all processes, by one reduction.

        Args:
            loss_scale: Factor by which the loss was multiplied.

        Raises:
            RuntimeError: No gate was heard on any process.
        """
        images = {each: sum(map(len, gates.values())) for each, gates in self._heard.items()}
        num_images = max(images.values(), default=0)
        device = device_with_float64(next(self.modules[0].module.parameters()).device)
        sums = [self._sums_of(each, num_images, loss_scale).to(device) for each in self.modules]
        flat = torch.cat(
            [torch.tensor([num_images], dtype=torch.float64, device=device), *(s.flatten() for s in sums)]
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
        num_images, *parts = flat.split([1, *(s.numel() for s in sums)])
        joined = torch.cat([part.view_as(s) for part, s in zip(parts, sums, strict=True)], dim=1)
        num_images, finite = torch.stack([num_images[0], torch.isfinite(flat).all().double()]).tolist()
        if not num_images:
            raise RuntimeError(
                "no gradient has reached the gates of the model's heads and neurons since the last update: call the model "
                "itself, let the loss depend on its blocks, and do not compile it (torch.compile overlooks new hooks)"
            )
        return StepGates(joined, int(num_images), bool(finite))

    def add(self, step: StepGates) -> None:
        """Count the images of a step."""
        self.sums = step.sums if self.sums is None else self.sums.to(step.sums.device) + step.sums
        self.num_images += step.num_images

    def sums_by_name(self, kind: str) -> dict[str, torch.Tensor]:
        """`{name of the GatedModule: float64 (3, units) on the CPU}`; empty before the first step."""
        if self.sums is None:
            return {}
        parts = self.sums.cpu().split([each.num_units for each in self.modules], dim=1)
        return {each.name: part for each, part in zip(self.modules, parts, strict=True) if each.kind == kind}

    def num_units(self, kind: str) -> dict[str, int]:
        """`{name of the GatedModule: number of units}`."""
        return {each.name: each.num_units for each in self.modules if each.kind == kind}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far as values that JSON can hold."""
        sums = {kind: {n: s.tolist() for n, s in self.sums_by_name(kind).items()} for kind in KINDS}
        return {"num_images": self.num_images, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: The state belongs to another model.
        """
        sums = {
            kind: {name: torch.tensor(values, dtype=torch.float64) for name, values in state["sums"][kind].items()}
            for kind in KINDS
        }
        found = {kind: {name: tuple(value.shape) for name, value in sums[kind].items()} for kind in KINDS}
        expected = {kind: {n: (len(GATE_STATISTICS), u) for n, u in self.num_units(kind).items()} for kind in KINDS}
        if any(sums.values()) and found != expected:
            raise ValueError(f"the saved gates are those of another model: they have {found}, not {expected}")
        joined = [sums[each.kind][each.name] for each in self.modules] if any(sums.values()) else []
        self.sums = torch.cat(joined, dim=1) if joined else None
        self.num_images = state["num_images"]

    def _sums_of(self, each: GatedModule, num_images: int, loss_scale: float) -> torch.Tensor:
        """float64 (3, units) of this process's images of the step."""
        sums = torch.zeros(len(GATE_STATISTICS), each.num_units, dtype=torch.float64)
        for gates in self._heard.get(each, {}).values():
            divided_by = num_images if self._is_mean_of_all else len(gates) * max(len(self._backward_passes), 1)
            gradients = gates.grad.to(device_with_float64(gates.device), torch.float64)
            sums = sums.to(gradients.device) + gate_statistics(gradients * (divided_by / loss_scale))
        return sums

    # Forward hooks

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return  # a pass without gradients, which may lie within one with gradients
        num_images = _num_images(args, kwargs) if self._entered is None else None
        if num_images is not None:
            self._entered, self._images_now = module, num_images
            self._is_mean_of_all |= kwargs.get("num_items_in_batch") is not None

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is not self._entered or not torch.is_grad_enabled():
            return
        self._entered = None
        if backward_pass() != -1:  # gradient checkpointing calls it again
            return
        this = weakref.ref(self)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(_call(this, GateRecorder._count_backward_pass))

    def _count_backward_pass(self, grad: torch.Tensor) -> None:
        self._backward_passes.add(backward_pass())

    def _put_gates(self, each: GatedModule, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.listening:  # a compiled model goes on calling hooks that it has seen
            return None
        if self._entered is None and not torch.is_grad_enabled():
            return None  # no pass of its own; the first pass of reentrant checkpointing lies within one
        key = None if args else next(iter(kwargs))
        activation = args[0] if args else kwargs[key]
        num_images = self._images_of(each, activation)
        if not torch.is_grad_enabled():
            return None
        gates = new_gates(activation, num_images, each.num_units)
        gates.register_post_accumulate_grad_hook(_call(weakref.ref(self), GateRecorder._keep, each))
        activation = gated(activation, gates)
        return ((activation, *args[1:]), kwargs) if args else (args, {**kwargs, key: activation})

    def _images_of(self, each: GatedModule, activation: torch.Tensor) -> int:
        """Number of images in a module's input, of which each may be divided into windows."""
        place = each, len(activation)
        if backward_pass() == -1:
            if self._entered is None or len(activation) % self._images_now:
                raise ValueError(
                    f"the input of the module after the units of {each.name} has the shape {tuple(activation.shape)}, and "
                    f"the model was called with {self._images_now} images: its leading dimension must be a multiple of them"
                )
            self._num_images[place] = self._images_now
        return self._num_images[place]  # gradient checkpointing calls modules again, but not the model

    def _keep(self, each: GatedModule, gates: torch.Tensor) -> None:
        if self.listening:  # a second backward pass through the same graph adds to the gradient
            self._heard.setdefault(each, {})[id(gates)] = gates


def _call(recorder: weakref.ref[GateRecorder], method: Callable, *first: Any) -> Callable:
    """A hook that calls a method of a recorder as long as there is one."""

    def hook(*args: Any) -> Any:
        this = recorder()
        return None if this is None else method(this, *first, *args)

    return hook


def _num_images(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Number of images that a module is called with; None if it is called without any."""
    values = [kwargs["pixel_values"]] if "pixel_values" in kwargs else [*args, *kwargs.values()]
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.dim() > 1), None)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a module returns: in sequences and mappings as well."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
