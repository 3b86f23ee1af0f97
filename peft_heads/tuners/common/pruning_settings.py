"""The settings of an adapter that makes its model smaller: which share of the MLP's neurons, or how much faster."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ...heads.neurons import NEURON_CRITERIA
from .setting_types import check_choice


MASK_SCOPES = ("adapter", "head")


@dataclass(kw_only=True)
class PruningConfig:
    """Mixed into the configuration of a method that masks MLP neurons, before [`HeadSelectionConfig`].

    Args:
        mask_scope: What is zero for a deactivated head: the adapter's part of it (`"adapter"`), or its whole output
            (`"head"`). None is read as `"head"` if neurons are pruned, else as `"adapter"`.
        neuron_ratio: Share of each layer's MLP neurons to switch off: `floor(neuron_ratio * num_neurons)`. 0 gives the
            neurons masks and switches none off; None gives them none.
        neuron_criterion: Name of the score of a neuron. The neurons with the lowest scores are switched off. `"gate"`,
            `"gate_signed"`, `"gate_squared"`: activation times gradient, per image (Michel et al. 2019);
            `"weight_norm"`; and the baselines `"random"`, `"front"`, `"most_responsive"` (the reverse of `"gate"`).
        target_speed: How many times fewer operations the pruned model needs, at least. The numbers of heads and neurons
            follow from it, so that `ne`, `ratio` and `neuron_ratio` are not given.

    Raises:
        ValueError: A setting is out of its range, or contradicts another.
    """

    mask_scope: Literal["adapter", "head"] | None = field(
        default=None, metadata={"help": "Zero the head's part of the update, or the head's whole output."}
    )
    neuron_ratio: float | None = field(
        default=None, metadata={"help": "Share of each layer's MLP neurons to switch off."}
    )
    neuron_criterion: str = field(
        default="gate",
        metadata={
            "help": "Score of an MLP neuron; the neurons with the lowest are switched off.",
            "choices": NEURON_CRITERIA,
        },
    )
    target_speed: float | None = field(
        default=None,
        metadata={"help": "At least so many times fewer operations, instead of `ne`, `ratio` and `neuron_ratio`."},
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.mask_scope is None:
            self.mask_scope = "head" if self.prunes_neurons else "adapter"
        super().__post_init__()
        check_choice(self, "mask_scope", MASK_SCOPES)
        check_choice(self, "neuron_criterion", NEURON_CRITERIA)
        if self.prunes_neurons and self.masks_heads and self.mask_scope != "head":
            asked = (
                f"neuron_ratio={self.neuron_ratio}"
                if self.target_speed is None
                else f"target_speed={self.target_speed}"
            )
            raise ValueError(
                f"mask_scope={self.mask_scope!r} cannot be combined with {asked}: only a head whose whole output is zero "
                "can be removed from the model; leave mask_scope out (it is 'head' then), or pass ne=0 with "
                "neuron_ratio to prune neurons alone"
            )

    @property
    def prunes_neurons(self) -> bool:
        """Whether neurons carry masks: also with `neuron_ratio=0`, which switches none off."""
        return self.neuron_ratio is not None or self.target_speed is not None

    @property
    def prunes(self) -> bool:
        """Whether heads or neurons are going to be off in the model as a whole, so that they can be removed."""
        return self.prunes_neurons or (self.mask_scope == "head" and self.masks_heads)

    @property
    def selection_settings(self) -> dict[str, Any]:
        """As of heads alone; with the settings of neurons where these are pruned."""
        settings = super().selection_settings
        return settings | {name: getattr(self, name) for name in NEURON_SETTINGS} if self.prunes_neurons else settings

    def _check_numbers(self) -> None:
        ratio, speed = self.neuron_ratio, self.target_speed
        if ratio is not None and not (_is_number(ratio) and 0 <= ratio < 1):
            raise ValueError(f"neuron_ratio is the share of MLP neurons to switch off, in [0, 1); got {ratio!r}")
        if speed is None:
            return
        if not (_is_number(speed) and 1 < speed < math.inf):
            raise ValueError(f"target_speed says how many times fewer operations, a number above 1; got {speed!r}")
        given = [f"{name}={getattr(self, name)}" for name in REPLACED if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"target_speed={speed} chooses the numbers of heads and neurons; got {', '.join(given)} as well: give "
                "target_speed, or these numbers"
            )


# Names of the settings of neurons, and of what `target_speed` stands in place of.
NEURON_SETTINGS = tuple(f.name for f in fields(PruningConfig) if f.name != "mask_scope")
REPLACED = ("ne", "ratio", "neuron_ratio")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
