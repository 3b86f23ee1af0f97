"""From the statistics of heads and neurons to scores."""

from __future__ import annotations

import warnings

import torch

from ..heads.criterion_registry import BUILT_IN, CRITERIA, find_criterion
from ..heads.neuron_scores import neuron_scores, neurons_need_gates
from ..heads.scores import head_scores
from .acting_rows import row_norms
from .gated_modules import gated_modules
from .recorder import HeadRecorder


class UnitScores(HeadRecorder):
    """Scores what a recorder has gathered. The base of [`HeadScorer`], whose arguments and errors it has."""

    def scores(self, criterion: str | None = None) -> dict[str, torch.Tensor]:
        """Scores of every head, the mean over the steps so far.

        Args:
            criterion: A name in `peft_heads.heads.CRITERIA`; the adapter's own if None.

        Returns:
            `{projection: float64 (num_heads,) on the CPU}`, named as `get_head_masks` names them.

        Raises:
            ValueError: There is no such criterion, it needs gradients and no step with finite gradients was counted, or
                it needs gates and they are not gathered.
        """
        return self._scores_of(criterion or self.config.criterion, *self._measured())

    def _scores_of(
        self, criterion: str, statistics: dict[str, torch.Tensor], params: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The scores by a criterion, of what `_measured` has returned; errors are those of `scores`."""
        found = find_criterion(criterion)
        if found.needs_gradients and not self.num_steps:
            why = (
                f"the gradients of all {self.num_skipped} steps were not finite; lower the learning rate or the loss scale"
                if self.num_skipped
                else "no optimizer step was counted; call update() after the backward passes of each step"
            )
            raise ValueError(f"no head can be scored by {criterion!r}: {why}")
        gathered = found.needs_gates or self.has_head_gates
        return head_scores(
            criterion,
            self.layouts,
            statistics=statistics,
            params=params,
            seed=self.config.mask_seed,
            gates={name: sums / self.num_images for name, sums in self.gates("head").items()} if gathered else None,
        )

    def _measured(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What every criterion reads: the statistics by projection, and the present values of the scored parameters.

        Where the parameters are sharded this is a collective.
        """
        statistics = {name: sums / self.num_steps for name, sums in self._sums_by_name().items()}
        return statistics, self._by_projection(self._gradients.values(now=True))

    def neuron_scores(self, criterion: str | None = None) -> dict[str, torch.Tensor]:
        """Scores of every neuron of the model's MLPs; by gates, the mean over the images so far.

        Args:
            criterion: A name in `NEURON_CRITERIA`; the adapter's own `neuron_criterion` if None, which is `gate` unless
                the configuration has one. `weight_norm` is the L2 norm of the neuron's row of the MLP's first layer as
                it acts, with the adapter's update.

        Returns:
            `{name of the MLP's first layer: float64 (num_neurons,) on the CPU}`, named as in the base model.

        Raises:
            ValueError: There is no such criterion of neurons, it needs gates and they are not gathered, or the model
                has no MLP of two layers.
        """
        criterion = criterion or getattr(self.config, "neuron_criterion", "gate")
        by_gates = neurons_need_gates(criterion)
        modules = {each.name: each for each in gated_modules(self.model) if each.kind == "neuron"}
        if not modules:
            raise ValueError(f"{type(self.model).__name__} has no neurons to score: no block has an MLP of two layers")
        return neuron_scores(
            criterion,
            {name: each.num_units for name, each in modules.items()},
            gates={name: s / self.num_images for name, s in self.gates("neuron").items()} if by_gates else None,
            weight_norms={name: row_norms(name, each.first, self.adapter_name) for name, each in modules.items()}
            if criterion == "weight_norm"
            else None,
            seed=self.config.mask_seed,
        )

    def all_scores(self) -> dict[str, dict[str, torch.Tensor]]:
        """`{criterion: scores}` for every criterion that can be computed from the statistics so far."""
        scores, measured = {}, self._measured()
        for name, criterion in CRITERIA.items():
            if (criterion.needs_gradients and not self.num_steps) or (
                criterion.needs_gates and not self.has_head_gates
            ):
                continue
            try:
                scores[name] = self._scores_of(name, *measured)
            except Exception as error:  # a plugin's criterion that nobody asked for must not end a training
                if name in BUILT_IN or name == self.config.criterion:
                    raise
                warnings.warn(f"the scores by {name!r} are left out of the report: {type(error).__name__}: {error}")
        return scores
