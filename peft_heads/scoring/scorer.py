"""From the statistics of heads to scores, and from scores to masks."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..functional.sharding import zero_rows
from ..heads.criterion_registry import BUILT_IN, CRITERIA, find_criterion
from ..heads.protocol import describe_masks, read_masks, write_masks
from ..heads.scores import head_scores
from ..heads.selection import HeadGroup, degenerate_groups, groups_kept_whole, plan_groups, select_heads
from .recorder import HeadRecorder
from .selection_warnings import equal_scores_warning, no_gradient_warning


class HeadScorer(HeadRecorder):
    """Scores the heads of an adapter in a plain PyTorch or Accelerate loop, and deactivates the least responsive.

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

    Raises:
        ValueError: The model has no such head-masked adapter, or another scorer is attached to it.

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

    def scores(self, criterion: str | None = None) -> dict[str, torch.Tensor]:
        """Scores of every head, the mean over the steps so far.

        Args:
            criterion: A name in `peft_heads.heads.CRITERIA`; the adapter's own if None.

        Returns:
            `{projection: float64 (num_heads,) on the CPU}`, named as `get_head_masks` names them.

        Raises:
            ValueError: There is no such criterion, or it needs gradients and no step with finite gradients was counted.
        """
        return self._scores_of(criterion or self.config.criterion, *self._measured())

    def _scores_of(
        self, criterion: str, statistics: dict[str, torch.Tensor], params: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The scores by a criterion, of what `_measured` has returned; errors are those of `scores`."""
        if find_criterion(criterion).needs_gradients and not self.num_steps:
            why = (
                f"the gradients of all {self.num_skipped} steps were not finite; lower the learning rate or the loss scale"
                if self.num_skipped
                else "no optimizer step was counted; call update() after the backward passes of each step"
            )
            raise ValueError(f"no head can be scored by {criterion!r}: {why}")
        return head_scores(criterion, self.layouts, statistics=statistics, params=params, seed=self.config.mask_seed)

    def _measured(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What every criterion reads: the statistics by projection, and the present values of the scored parameters.

        Where the parameters are sharded this is a collective.
        """
        statistics = {name: sums / self.num_steps for name, sums in self._sums_by_name().items()}
        return statistics, self._by_projection(self._gradients.values(now=True))

    def all_scores(self) -> dict[str, dict[str, torch.Tensor]]:
        """`{criterion: scores}` for every criterion that can be computed from the statistics so far."""
        scores, measured = {}, self._measured()
        for name, criterion in CRITERIA.items():
            if criterion.needs_gradients and not self.num_steps:
                continue
            try:
                scores[name] = self._scores_of(name, *measured)
            except Exception as error:  # a plugin's criterion that nobody asked for must not end a training
                if name in BUILT_IN or name == self.config.criterion:
                    raise
                warnings.warn(f"the scores by {name!r} are left out of the report: {type(error).__name__}: {error}")
        return scores

    def select(
        self,
        ne: int | None = None,
        ratio: float | None = None,
        criterion: str | None = None,
        granularity: str | None = None,
        joint: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """The masks that the scores ask for; nothing is changed. Arguments left out are the adapter's own.

        Warns of groups whose heads all have the same score, for instance after zero gradients: there the order of the
        heads alone decides. Warns of projections that no gradient has reached in the steps so far.

        Returns:
            `{projection: bool (num_heads,)}`, True = active.

        Raises:
            ValueError: As `scores` does, or `ne`, `ratio`, `granularity`, `joint` do not fit the model.
        """
        groups = self.groups(ne, ratio, granularity, joint)
        kept = groups_kept_whole(groups, ne)
        if kept and ne != self.config.ne:  # the adapter's own ne was warned about when it was created
            warnings.warn(kept)
        unreached = self.without_gradient()
        if not any(group.num_deactivated for group in groups):  # ne=0 needs no scores
            masks = {name: torch.ones(layout.num_heads, dtype=torch.bool) for name, layout in self.layouts.items()}
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
        return plan_groups(
            self.layouts,
            ne=ne,
            ratio=ratio,
            granularity=granularity or self.config.granularity,
            joint=self.config.joint if joint is None else joint,
        )

    def is_degenerate(self) -> bool:
        """Whether the heads of some group all have the same score by the adapter's own criterion, so that order decides.

        Raises:
            ValueError: As `scores` does.
        """
        groups = self.groups()
        wanted = any(group.num_deactivated for group in groups)
        return wanted and bool(degenerate_groups(self.scores(), groups))

    def without_update(self) -> list[str]:
        """Projections of groups that give up heads while all their head-wise parameters are zero.

        The product with any gradient is zero there. So are the scores by a Taylor criterion (`Criterion.is_taylor`).
        """
        norms = self.scores("weight_norm")
        equal = [group.modules for group in degenerate_groups(norms, self.groups())]
        return [name for names in equal if not any(norms[each].any() for each in names) for name in names]

    @torch.no_grad()
    def apply(self, optimizer: Any = None, masks: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Select, set the masks, and stop listening.

        The deactivated rows of the adapter are set to zero, and their entries in the optimizer's state are cleared.
        Otherwise momentum would move the rows again. The mask hides that, but not from a reader of the raw weights.

        Args:
            optimizer: The optimizer of the adapter's parameters, possibly prepared by Accelerate.
            masks: Masks to apply instead of those of `select()`, e.g. `scorer.select(ne=3)`.

        Returns:
            The masks that are now in force. An adapter that has masks already keeps them, with a warning.

        Raises:
            ValueError: As `select` does, or `masks` name an unknown projection or have a wrong shape or dtype; nothing
                is changed then.
        """
        present = read_masks(self.layers, self.adapter_name)
        if any(not mask.all() for mask in present.values()):
            warnings.warn(
                f"adapter {self.adapter_name!r} has deactivated heads already and keeps them "
                f"({describe_masks(present)}); use set_head_masks to change them"
            )
            self.close()
            return present

        masks = self.select() if masks is None else masks
        write_masks(self.layers, masks, self.adapter_name)
        for layer in self.layers.values():
            if layer.get_head_mask(self.adapter_name).all():
                continue
            for scored in layer.scored_parameters(self.adapter_name):
                zero_rows(scored.param, layer.active_rows(self.adapter_name), optimizer)
        self.close()
        return read_masks(self.layers, self.adapter_name)
