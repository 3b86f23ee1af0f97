"""Quantised weights of linear layers: decided once per optimizer step in training, otherwise for every pass."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ..._compat.torch import tensor_version
from ...functional.packing import PackedWeight
from ...functional.quantization import Decision, code_book, decide, quantize_by_autograd, straight_through
from ...functional.sharding import is_dtensor
from ...heads.layout import ProjectionLayout
from .stored_codes import as_packed, packed_weight


# Number of optimizer steps in this process so far, of all optimizers. They are counted because many optimizers write
# through `.data` or a pointer, which moves no version counter.
_steps = [0]
_step_hooks: list[RemovableHandle] = []
# What the running pass without gradients has decided; None outside of one.
_passing: ContextVar[dict[nn.Linear, Decision] | None] = ContextVar("passing", default=None)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _steps[0] += 1


@contextmanager
def one_pass() -> Iterator[None]:
    """A forward pass of the whole model: without gradients, all codes are decided together, once."""
    token = _passing.set({})
    try:
        yield
    finally:
        _passing.reset(token)


class WeightQuantizer:
    """Returns the quantised weights of the linear layers that share it, with the straight-through gradient.

    Weights without a gradient (frozen, or under `torch.no_grad()`): the codes are decided whenever a weight is asked
    for, but only once inside [`one_pass`], and for matrices of one shape together. So every change of a weight is seen,
    however it was written.

    Weights with a gradient: the codes are decided again when a weight is asked for and its layer or mask has changed,
    and then for all layers that have changed. That is once per optimizer step, however many passes a step takes. A
    change is seen by the identity, the version counter and the address of a tensor, and by any optimizer's step.
    Whoever writes through `.data` between two passes with gradients, without a step of an optimizer, calls `forget()`;
    a layer that goes from training to evaluation or back does so itself. Decisions depend on the weights alone, so
    copies and pickles do not take them along.

    A layer whose attribute `packed_weight` is a [`PackedWeight`] acts by these codes, mean and deviation as long as its
    weight is the one behind them; they are dropped as soon as the weight is another. They need no decision.

    Args:
        bits: 1, 2, 4 or 8.
        awaits_codes: Whether a packed file is still to be read, before which the weights are of no use.
    """

    def __init__(self, bits: int, awaits_codes: bool = False) -> None:
        self.bits = bits
        self.awaits_codes = awaits_codes
        code_book(bits)  # computed here, so that no compiler traces it
        if not _step_hooks:
            _step_hooks.append(register_optimizer_step_post_hook(_count_step))
        self._entries: weakref.WeakKeyDictionary[nn.Linear, _Entry] = weakref.WeakKeyDictionary()
        self._listeners: weakref.WeakKeyDictionary[nn.Linear, OrderedDict] = weakref.WeakKeyDictionary()
        self._heard = False
        self._num_forgotten = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"bits": self.bits, "awaits_codes": self.awaits_codes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(
        self, linear: nn.Linear, layout: ProjectionLayout | None = None, head_mask: nn.Module | None = None
    ) -> torch.Tensor:
        """The quantised weight, (out, in).

        Args:
            linear: The layer. Only its weight is read; it is not called.
            layout, head_mask: The heads of its rows, and the module whose property `active` says which are active.
                Rows of the others are left out. None keeps all rows.

        Raises:
            ValueError: The weight is sharded or flattened, so that its mean and deviation are not known here; or the
                codes of a packed adapter have not been loaded.
        """
        if self.awaits_codes:
            raise ValueError(
                "the adapter's configuration says that it is packed, but no codes have been loaded: transformers' own "
                "load_adapter and from_pretrained do not read them. Use PeftModel.from_pretrained or "
                "peft_heads.load_image_classifier; for a new adapter with these settings set config.packed = False; "
                "`peft-heads export ADAPTER --to lora DIR` writes what all can read"
            )
        weight = linear.weight
        problem = _why_not(linear)
        if problem is not None:
            raise ValueError(
                f"a weight with {self.bits} bits is quantised by the mean and deviation of the whole matrix "
                f"({linear.out_features}, {linear.in_features}), but {problem}, or use adapter_bits=32 and "
                "classifier_bits=32"
            )
        # A compiler traces the plain expression. So does every weight that is no parameter: in a replica or a functional
        # call it is a new tensor each time, of which nothing is worth keeping.
        if torch.compiler.is_compiling() or not isinstance(weight, nn.Parameter) or weight.is_inference():
            rows = None if head_mask is None else layout.active_rows(head_mask.active)
            quantized = as_packed(linear, rows, quantize_by_autograd(weight, self.bits, rows))
        else:
            entry = self._entries.get(linear)
            if entry is None or entry.head_mask is not head_mask:
                entry = self._entries[linear] = _Entry(layout, head_mask)
            if torch.is_grad_enabled() and weight.requires_grad:
                if entry.state != self._state(linear, entry):
                    self._decide_changed()
                decision = entry.decision
            else:
                decision = self._decide_in_passing(linear)
            quantized = straight_through(weight, decision)
        if self._heard:
            self._let_hear(linear, quantized)
        return quantized

    def forget(self) -> None:
        """Decide again for all layers when they are next asked for."""
        self._num_forgotten += 1

    def decision(self, linear: nn.Linear, **heads: Any) -> Decision:
        """A layer's current decision: codes, mean and deviation. Arguments as for a call."""
        with torch.no_grad():
            self(linear, **heads)
            return self._decide_in_passing(linear)

    def on_gradient(self, linear: nn.Linear, call: Callable[[torch.Tensor, bool], None]) -> RemovableHandle:
        """Call `call(gradient, False)` with the gradient of the *quantised* weight in each backward pass from now on.

        As with `sharding.on_gradient`, it is this process's gradient of the micro-batch alone, before anything clips it.
        """
        calls = self._listeners.setdefault(linear, OrderedDict())
        handle = RemovableHandle(calls)
        calls[handle.id] = call
        self._heard = True
        return handle

    # Not compiled: a graph breaks here as long as somebody listens.
    @torch.compiler.disable
    def _let_hear(self, linear: nn.Linear, quantized: torch.Tensor) -> None:
        self._heard = any(self._listeners.values())
        if quantized.requires_grad:
            for call in self._listeners.get(linear, {}).values():
                quantized.register_hook(lambda grad, call=call: call(grad, False))

    def _state(self, linear: nn.Linear, entry: _Entry) -> tuple:
        """A key that changes whenever a decision may have become wrong."""
        weight, mask = linear.weight, getattr(entry.head_mask, "off", None)
        steps = _steps[0] if weight.requires_grad else None
        return (_identity(weight), _identity(mask), steps, self._num_forgotten)

    def _decide_changed(self) -> None:
        """Decide for all layers that have changed since their last pass with gradients."""
        changed = []
        for linear, entry in self._entries.items():
            state = self._state(linear, entry)
            if entry.state != state and _why_not(linear) is None:
                entry.state = state
                changed.append(linear)
        for linear, decision in self._decide(changed).items():
            self._entries[linear].decision = decision

    def _decide_in_passing(self, linear: nn.Linear) -> Decision:
        """Decide for this layer, or inside [`one_pass`] once for all."""
        passing = _passing.get()
        if passing is None:
            return self._decide([linear])[linear]
        if linear not in passing:
            passing.update(self._decide([one for one in self._entries if _why_not(one) is None]))
        return passing[linear]

    @torch.no_grad()
    def _decide(self, linears: list[nn.Linear]) -> dict[nn.Linear, Decision]:
        decisions, groups = {}, defaultdict(list)
        for linear in linears:
            entry, weight = self._entries[linear], linear.weight
            packed = packed_weight(linear, entry.active_rows())
            if packed is None:
                groups[weight.shape, weight.dtype, weight.device, entry.head_mask is None].append(linear)
                continue
            if entry.packed is not packed:
                entry.packed, entry.decision_of_packed = packed, self._of_packed(linear, packed)
            decisions[linear] = entry.decision_of_packed
        for (_, _, device, all_rows), members in groups.items():
            with torch.autocast(device.type, enabled=False):
                weights = torch.stack([linear.weight.detach() for linear in members])
                rows = None if all_rows else torch.stack([self._entries[linear].active_rows() for linear in members])
                together = decide(weights, self.bits, rows)
            decisions |= {linear: together.matrix(index) for index, linear in enumerate(members)}
        return decisions

    def _of_packed(self, linear: nn.Linear, packed: PackedWeight) -> Decision:
        """The decision with the stored codes, mean and deviation, and the gradient of the weight behind them."""
        weight = linear.weight.detach()
        with torch.autocast(weight.device.type, enabled=False):
            decision = decide(weight, self.bits, None if packed.rows is None else packed.rows.to(weight.device))
        return decision._replace(values=packed.values(), codes=packed.codes, mean=packed.mean, std=packed.std)


class _Entry:
    """What is known of a layer. It refers to the mask, but never to the layer, which it must not keep alive."""

    def __init__(self, layout: ProjectionLayout | None, head_mask: nn.Module | None) -> None:
        self.layout = layout
        self.head_mask = head_mask
        self.state: tuple | None = None
        self.decision: Decision | None = None  # of the last pass with gradients
        self.packed: PackedWeight | None = None
        self.decision_of_packed: Decision | None = None

    def active_rows(self) -> torch.Tensor | None:
        return None if self.head_mask is None else self.layout.active_rows(self.head_mask.active)


def _identity(tensor: torch.Tensor | None) -> tuple | None:
    return (
        None
        if tensor is None
        else (id(tensor), tensor_version(tensor), tensor.data_ptr(), tensor.device, tensor.dtype)
    )


def _why_not(linear: nn.Linear) -> str | None:
    """The reason why a weight cannot be quantised; None if it can."""
    weight, unsharded = linear.weight, "use DistributedDataParallel or ZeRO 1 or 2"
    if is_dtensor(weight):
        return f"it is sharded over the processes (FSDP2); {unsharded}"
    if tuple(weight.shape) != (linear.out_features, linear.in_features):
        return f"this process holds a part of the shape {tuple(weight.shape)} (FSDP1, ZeRO 3); {unsharded}"
    if weight.is_meta:
        return "it is on the meta device (not loaded, or offloaded); load the model without offloading"
    return None
