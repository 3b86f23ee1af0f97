"""Criteria: what makes a head responsive, by name. A criterion is a function of a projection's [`HeadStatistics`].

With `p` a head's adapter parameters (its rows of `lora_B`) and `g` the gradient of the loss with respect to them, the
first-order Taylor expansion says that the loss changes by `-Σ p·g` when `p` is set to zero. The criteria of HEAT
(Eq. 9 and 11) are sums over these products, and the heads with the lowest scores are deactivated:

    absolute   Σ |p·g|   low where the head hardly matters to the loss
    positive   Σ  p·g    low where removing the head raises the loss
    negative   Σ -p·g    low where removing the head lowers the loss

That `positive` deactivates heads whose removal raises the loss looks wrong, but it is what the paper's formula says (its
prose is loose here), and the paper finds it best on most tasks.

These look at the adapter's part of a head. The criteria `gate`, `gate_signed` and `gate_squared` look at the whole output
of a head, of each image by itself (`gates`): the mean over images of `|g|`, `g` and `g²`.

Baselines say what a score must be better than: `random`, `front` (the first heads), and `most_responsive`, which
deactivates the heads that `absolute` would keep longest.

A criterion is an entry of `CRITERIA`. `register_criterion` adds one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class HeadStatistics:
    """What a criterion is given: all that is known of one projection's heads when heads are selected.

    Every tensor is float64 (num_heads,) on the CPU. All processes have the same numbers, since they were reduced before.

    Attributes:
        absolute: `Σ |p·g|` over the head's adapter parameters, the mean over the counted steps; None without a step.
        signed: `Σ p·g`, likewise. The loss changes by about `-signed` when the head is deactivated.
        grad_norm: L2 norm of `g`, likewise.
        weight_norm: L2 norm of `p` as it is now; None where no parameters were given.
        random: Numbers in [0, 1) that depend on `mask_seed` alone.
        gate: Mean of `|g|` over the images of the counted steps, where `g` is the derivative of an image's loss with
            respect to a gate on the head's whole output; None where gates were not gathered.
        gate_signed: Mean of `g`, likewise. The loss changes by about `-gate_signed` without the head.
        gate_squared: Mean of `g²`, likewise.
    """

    absolute: torch.Tensor | None
    signed: torch.Tensor | None
    grad_norm: torch.Tensor | None
    weight_norm: torch.Tensor | None
    random: torch.Tensor
    gate: torch.Tensor | None = None
    gate_signed: torch.Tensor | None = None
    gate_squared: torch.Tensor | None = None

    @property
    def num_heads(self) -> int:
        return len(self.random)


@dataclass(frozen=True)
class Criterion:
    """How heads are scored.

    Attributes:
        function: Scores (num_heads,) of one projection's heads; the lowest are deactivated.
        needs_gradients: Whether the function reads what training steps gather, so that heads cannot be scored without.
        is_taylor: Whether scores are products with the adapter's parameters: zero as long as these are, whatever the
            gradient.
        needs_gates: Whether the function reads what gates gather, which is gathered only where it is needed.
    """

    function: Callable[[HeadStatistics], torch.Tensor]
    needs_gradients: bool = True
    is_taylor: bool = False
    needs_gates: bool = False


_TABLE = {
    "absolute": Criterion(lambda heads: heads.absolute, is_taylor=True),
    "positive": Criterion(lambda heads: heads.signed, is_taylor=True),
    "negative": Criterion(lambda heads: -heads.signed, is_taylor=True),
    "weight_norm": Criterion(lambda heads: heads.weight_norm, needs_gradients=False),
    "grad_norm": Criterion(lambda heads: heads.grad_norm),
    "gate": Criterion(lambda heads: heads.gate, needs_gates=True),
    "gate_signed": Criterion(lambda heads: heads.gate_signed, needs_gates=True),
    "gate_squared": Criterion(lambda heads: heads.gate_squared, needs_gates=True),
    "random": Criterion(lambda heads: heads.random, needs_gradients=False),
    "front": Criterion(lambda heads: torch.arange(heads.num_heads).double(), needs_gradients=False),
    "most_responsive": Criterion(lambda heads: -heads.absolute, is_taylor=True),
}
BUILT_IN = frozenset(_TABLE)
CRITERIA: Mapping[str, Criterion] = MappingProxyType(_TABLE)
"""All criteria by name, in the order in which they are reported; it grows with `register_criterion`."""


def register_criterion(
    name: str,
    function: Callable[[HeadStatistics], torch.Tensor],
    *,
    needs_gradients: bool = True,
    is_taylor: bool = False,
    needs_gates: bool = False,
) -> None:
    """Add a criterion, which configurations, scorers and the command line then know by its name.

    Registering the same function again is harmless.

    Args:
        name: What `criterion=` is set to: letters, digits, `_`, `-` and `.`, a letter first.
        function: From a projection's [`HeadStatistics`] to the scores (num_heads,) of its heads. The heads with the
            lowest scores are deactivated; where projections share a mask, their scores are summed. It must depend on
            its argument alone, so that every process selects the same heads.
        needs_gradients: Whether the function reads `absolute`, `signed` or `grad_norm`. Without them heads can be
            selected before the first step.
        is_taylor: Whether all scores are zero as long as the adapter's parameters are (`lora_B` of a new adapter). A
            selection by the first step alone is then refused.
        needs_gates: Whether the function reads `gate`, `gate_signed` or `gate_squared`. They are gathered during
            training if the adapter's criterion needs them.

    Raises:
        ValueError: The name is taken, or no name; or `function` cannot be called.

    Example:

        ```py
        >>> register_criterion("grad_per_weight", lambda heads: heads.grad_norm / (heads.weight_norm + 1e-6))
        >>> config = HeadMaskedLoraConfig(ne=2, criterion="grad_per_weight")
        ```
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", name, re.ASCII):
        raise ValueError(
            f"the name of a criterion is a word of letters, digits, '_', '-' and '.', a letter first; got {name!r}"
        )
    if not callable(function):
        raise ValueError(f"criterion {name!r} needs a function of HeadStatistics; got {function!r}")
    criterion = Criterion(function, needs_gradients, is_taylor, needs_gates)
    if _TABLE.get(name, criterion) != criterion:
        raise ValueError(f"there is a criterion {name!r} already; choose another name")
    _TABLE[name] = criterion


def find_criterion(name: str) -> Criterion:
    """The criterion of that name; raises ValueError if there is none."""
    if name not in CRITERIA:
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}; got {name!r}. If a plugin adds it, import the plugin first "
            "(on the command line: --plugin MODULE), or choose another criterion"
        )
    return CRITERIA[name]
