"""From scores to masks: which heads and neurons are switched off."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..heads.neurons import describe_neurons
from ..heads.protocol import describe_masks, read_masks
from ..heads.selection import (
    HeadGroup,
    degenerate_groups,
    groups_kept_whole,
    select_heads,
    select_units,
)
from .selection_warnings import equal_neurons_warning, equal_scores_warning, no_gradient_warning
from .switching import check_deeper, switch_off
from .unit_numbers import UnitNumbers


class HeadScorer(UnitNumbers):
    """Scores the heads of an adapter in a plain PyTorch or Accelerate loop, and deactivates the least responsive.

    The MLP neurons of an adapter that prunes them are scored and switched off as well.

    One pass collects the statistics of *all* criteria for every projection and head. The adapter's configuration (or
    the arguments of `select`) matters only at the selection, so one warm-up serves every variant.

    Gradients are taken by hooks on the adapter's parameters, micro-batch by micro-batch: before gradient clipping and,
    on several processes, before the reduction, which `update` does itself (except under FSDP2, where PyTorch has done
    it). The scores are therefore those of the global batch however it was split. Every backward pass between two
    updates counts as part of the step. Where parameters are sharded, create the scorer after the sharding.

    With k-bit adapters the quantised weights are scored, with their own gradients.

    Under DoRA the score is still p·g of `lora_B`, but no longer the derivative with respect to a gate on the delta.

    Args:
        model: A model with a head-masked adapter, possibly wrapped for distributed training.
        adapter_name: The adapter to score. It must be active and trainable.
        recording: Whether to listen at once; otherwise from `start()` on.
        run: The run of a Trainer (its TrainerState), whose scorer replaces one that an earlier run has left behind.
        gates: Whether to put gates on the outputs of heads and neurons while listening (`scoring.gates`), for the
            criteria that need them; None where the adapter's settings do. The model must then be called as a whole,
            and must not be compiled.

    Raises:
        ValueError: The model has no such head-masked adapter, another scorer is attached to it, or gates are needed and
            the model offers no place for them.

    Example:

        ```py
        >>> scorer = HeadScorer(model)
        >>> for step, batch in enumerate(loader):
        ...     model(**batch).loss.backward()
        ...     scorer.update()  # after the last backward pass of a step, before optimizer.step()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     if step == 100:
        ...         masks = scorer.apply(optimizer)
        ```
    """

    def select(
        self,
        ne: int | None = None,
        ratio: float | None = None,
        criterion: str | None = None,
        granularity: str | None = None,
        joint: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """The masks of heads that the scores ask for; nothing is changed. Arguments left out are the adapter's own.

        Warns of groups whose heads all have the same score, for instance after zero gradients: there the order of the
        heads alone decides. Warns of projections that no gradient has reached in the steps so far.

        Returns:
            `{projection: bool (num_heads,)}`, True = active.

        Raises:
            ValueError: As `scores` does, or `ne`, `ratio`, `granularity`, `joint` do not fit the model; or the numbers
                follow from `target_speed`, and no gates were gathered.
        """
        groups = self.groups(ne, ratio, granularity, joint)
        kept = groups_kept_whole(groups, ne)
        if kept and ne != self.config.ne:  # the adapter's own ne was warned about when it was created
            warnings.warn(kept)
        return self.select_groups(groups, criterion)

    def select_groups(self, groups: list[HeadGroup], criterion: str | None = None) -> dict[str, torch.Tensor]:
        """As `select`, for groups that say how many heads they give up and which are off already."""
        unreached = self.without_gradient()
        if not any(group.num_chosen for group in groups):  # ne=0 needs no scores
            masks = select_heads({name: torch.zeros(part.num_heads) for name, part in self.layouts.items()}, groups)
        else:
            scores = self.scores(criterion)
            masks = select_heads(scores, groups)
            degenerate = degenerate_groups(scores, groups)
            if degenerate:
                criterion = criterion or self.config.criterion
                warnings.warn(equal_scores_warning(criterion, scores, degenerate, self.layouts))
            unreached = [name for name in unreached if not any(name in group.modules for group in degenerate)]
        if unreached:
            warnings.warn(no_gradient_warning(unreached, self.layouts, self.num_steps, self.adapter_name))
        return masks

    def select_neurons(
        self, num_off: dict[str, int] | None = None, criterion: str | None = None
    ) -> dict[str, torch.Tensor]:
        """The masks of neurons that the scores ask for; nothing is changed. Neurons that are off already stay off.

        Args:
            num_off: `{first layer of an MLP: number of neurons that are off afterwards}`; those of the adapter's
                `neuron_ratio` or `target_speed` if None.
            criterion: The adapter's `neuron_criterion` if None.

        Returns:
            `{first layer of an MLP: bool (num_neurons,)}`, True = active; empty for an adapter that prunes none.

        Raises:
            ValueError: As `neuron_scores` does, or a number is out of its range.
        """
        num_off = self.neurons_off() if num_off is None else num_off
        present = read_masks(self.neuron_layers, self.adapter_name)
        if not any(num_off.values()):  # which needs no scores
            return present
        scores, equal, masks = self.neuron_scores(criterion), [], {}
        for name, mask in present.items():
            masks[name] = select_units(scores[name], num_off[name], already_off=~mask)
            remaining = scores[name][mask]
            if not torch.equal(masks[name], mask) and remaining.eq(remaining[0]).all():
                equal.append(name)
        if equal:
            warnings.warn(equal_neurons_warning(criterion or self.config.neuron_criterion, equal, list(present)))
        return masks

    @torch.no_grad()
    def apply(
        self,
        optimizer: Any = None,
        masks: dict[str, torch.Tensor] | None = None,
        neuron_masks: dict[str, torch.Tensor] | None = None,
        *,
        deepen: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Select, set the masks of heads and of neurons, and stop listening.

        The deactivated rows of the adapter are set to zero, and their entries in the optimizer's state are cleared.
        Otherwise momentum would move the rows again. The mask hides that, but not from a reader of the raw weights.

        Args:
            optimizer: The optimizer of the adapter's parameters, possibly prepared by Accelerate.
            masks: Masks to apply instead of those of `select()`, e.g. `scorer.select(ne=3)`.
            neuron_masks: Masks to apply instead of those of `select_neurons()`.
            deepen: Whether to switch off more units than are off already, by masks that are given. The scorer then goes
                on: its statistics begin anew, and `start()` listens again.

        Returns:
            The masks of heads that are now in force. An adapter that has masks already keeps them, with a warning,
            unless they are deepened.

        Raises:
            ValueError: As `select` does, or `masks` name an unknown projection, have a wrong shape or dtype, or would
                switch a unit on again; nothing is changed then.
        """
        if not deepen and self.has_units_off:
            warnings.warn(
                f"adapter {self.adapter_name!r} has deactivated heads already and keeps them "
                f"({self.describe_present()}); use set_head_masks to change them"
            )
            self.close()
            return self.present_masks()[0]

        masks = self.select() if masks is None else masks
        neuron_masks = self.select_neurons() if neuron_masks is None else neuron_masks
        check_deeper(self.layers, masks, self.adapter_name)
        check_deeper(self.neuron_layers, neuron_masks, self.adapter_name)
        switch_off(self.layers, masks, self.adapter_name, optimizer)
        switch_off(self.neuron_layers, neuron_masks, self.adapter_name, optimizer)
        if deepen:
            self.reset()
        else:
            self.close()
        return read_masks(self.layers, self.adapter_name)

    def present_masks(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The masks of heads and those of neurons that are in force; of neurons none for an adapter that prunes none."""
        heads, neurons = (read_masks(layers, self.adapter_name) for layers in (self.layers, self.neuron_layers))
        return heads, neurons

    @property
    def has_units_off(self) -> bool:
        """Whether a head or a neuron of the adapter is off."""
        return any(not mask.all() for masks in self.present_masks() for mask in masks.values())

    def describe_present(self) -> str:
        """The units that are off, in one line."""
        heads, neurons = self.present_masks()
        return describe_masks(heads) + ("; " * bool(neurons)) + "; ".join(describe_neurons(neurons))
