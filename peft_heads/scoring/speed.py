"""A target speed, and the numbers of heads and neurons that reach it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..backbones.operations import count_operations
from ..backbones.prunable import prunable
from ..heads.budget import Cut, check_speed, choose_cut, lost_scores, reachable_cuts


class SpeedBudget:
    """What every layer of a model may give up for a speed, such that an ordinary configuration can say it.

    Args:
        model: The model, plain or with adapters in it.
        target_speed: At least so many times fewer operations.

    Raises:
        ValueError: No numbers of heads and neurons reach that speed; the message lists speeds that are reached, and says
            why units cannot go. Or the operations of the model cannot be counted.

    Attributes:
        num_heads: Present number of heads of each layer.
        num_neurons: Present number of neurons of each layer.
    """

    def __init__(self, model: nn.Module, target_speed: float) -> None:
        self.target_speed = target_speed
        self._operations, self._may_remain = count_operations(model), prunable(model)
        self.num_heads, self.num_neurons = self._may_remain.num_heads, self._may_remain.num_neurons
        stay = {"heads": self._may_remain.why_heads, "neurons": self._may_remain.why_neurons}
        why = "; ".join(f"no {unit} can be removed: {reason}" for unit, reason in stay.items() if reason)
        check_speed(target_speed, reachable_cuts(self.speed, self._may_remain.heads, self._may_remain.neurons), why)

    def speed(self, num_heads: int, num_neurons: int) -> float:
        """How many times fewer operations so many heads and neurons per layer take than the model does at present."""
        return self._operations.speed(num_heads, num_neurons)

    def choose(self, head_gates: Iterable[torch.Tensor], neuron_gates: Iterable[torch.Tensor]) -> Cut:
        """The numbers that lose least, by the mean of `|g|` of the units' gates.

        Args:
            head_gates: Of each attention layer, (num_heads,).
            neuron_gates: Of each MLP, (num_neurons,).
        """
        lost = lost_scores(head_gates), lost_scores(neuron_gates)
        return choose_cut(self.target_speed, self.speed, self._may_remain.heads, self._may_remain.neurons, *lost)
