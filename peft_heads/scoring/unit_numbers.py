"""How many heads and neurons an adapter's settings switch off, and whether scores tell them apart."""

from __future__ import annotations

import functools

from ..heads.budget import Cut
from ..heads.gates import GATE_STATISTICS
from ..heads.neurons import neuron_layers
from ..heads.protocol import HeadMaskable, read_masks
from ..heads.selection import HeadGroup, degenerate_groups, floor_ratio, plan_groups
from .speed import SpeedBudget
from .unit_scores import UnitScores


class UnitNumbers(UnitScores):
    """Knows how many units go. The base of [`HeadScorer`], whose arguments and errors it has."""

    cut: Cut | None = None
    """What remains for the adapter's `target_speed`, once it is chosen."""

    @functools.cached_property
    def neuron_layers(self) -> dict[str, HeadMaskable]:
        """`{first layer of an MLP: layer}` of the neurons that the adapter can switch off; empty if it prunes none."""
        prunes = getattr(self.config, "prunes_neurons", False)
        return neuron_layers(self.model, self.adapter_name) if prunes else {}

    @functools.cached_property
    def budget(self) -> SpeedBudget | None:
        """The numbers that the adapter's `target_speed` leaves open; None without one.

        Raises:
            ValueError: The speed cannot be reached by any.
        """
        speed = getattr(self.config, "target_speed", None)
        return None if speed is None else SpeedBudget(self.model, speed)

    def check(self) -> None:
        super().check()
        _ = self.budget  # an unreachable speed

    def groups(
        self,
        ne: int | None = None,
        ratio: float | None = None,
        granularity: str | None = None,
        joint: bool | None = None,
    ) -> list[HeadGroup]:
        """The groups of projections that share a mask. Arguments left out are the adapter's own."""
        if ne is None and ratio is None:
            ne, ratio = self.config.ne, self.config.ratio
            if self.budget is not None:
                ne = self.budget.num_heads - self.choose_cut().num_heads
        return plan_groups(
            self.layouts,
            ne=ne,
            ratio=ratio,
            granularity=granularity or self.config.granularity,
            joint=self.config.joint if joint is None else joint,
        )

    def neurons_off(self) -> dict[str, int]:
        """`{first layer of an MLP: number of neurons that the adapter's settings switch off}`; empty without neurons."""
        sizes = {name: len(mask) for name, mask in read_masks(self.neuron_layers, self.adapter_name).items()}
        if self.budget is None:
            return {name: floor_ratio(self.config.neuron_ratio, size) for name, size in sizes.items()}
        remain = self.choose_cut().num_neurons
        return {name: size - remain for name, size in sizes.items()}

    def choose_cut(self) -> Cut:
        """The numbers of heads and neurons that remain for the adapter's `target_speed`, chosen once, by their gates.

        Raises:
            ValueError: No step with gates was counted.
        """
        if self.cut is None:
            heads, neurons = (
                [sums[GATE_STATISTICS.index("gate")] / self.num_images for sums in by_name.values()]
                for by_name in (self.attention_gates(), self.gates("neuron"))
            )
            self.cut = self.budget.choose(heads, neurons)
        return self.cut

    def is_degenerate(self, groups: list[HeadGroup] | None = None) -> bool:
        """Whether the heads of some group all have the same score by the adapter's own criterion, so that order decides.

        Raises:
            ValueError: As `scores` does.
        """
        groups = self.groups() if groups is None else groups
        wanted = any(group.num_chosen for group in groups)
        return wanted and bool(degenerate_groups(self.scores(), groups))

    def without_update(self) -> list[str]:
        """Projections of groups that give up heads while all their head-wise parameters are zero.

        The product with any gradient is zero there. So are the scores by a Taylor criterion (`Criterion.is_taylor`).
        """
        norms = self.scores("weight_norm")
        groups = self.groups(ne=None if self.budget is None else 1)  # how many, the gates will say
        equal = [group.modules for group in degenerate_groups(norms, groups)]
        return [name for names in equal if not any(norms[each].any() for each in names) for name in names]
