"""Responsiveness of heads, gathered over the optimizer steps of a training loop."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..functional.sharding import whole_shape, zero_rows
from ..heads.protocol import (
    HeadMaskable,
    describe_masks,
    head_layers,
    module_patterns,
    named_layouts,
    read_masks,
    write_masks,
)
from ..heads.scores import BUILT_IN, CRITERIA, STATISTICS, all_head_statistics, find_criterion, head_scores
from ..heads.selection import HeadGroup, degenerate_groups, group_scores, groups_kept_whole, plan_groups, select_heads
from .gradients import StepGradients


# Which scorer listens to a layer's adapter: a second one would be a mistake nobody sees.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[HeadScorer]]] = weakref.WeakKeyDictionary()


class HeadScorer:
    """Scores the heads of an adapter in a plain PyTorch or Accelerate loop, and deactivates the least responsive.

    One pass gathers the statistics of *all* criteria for every projection and head; the adapter's configuration (or
    the arguments of `select`) decides only at selection, so one warm-up serves every variant.

    Gradients are taken by hooks on the adapter's parameters, micro-batch by micro-batch: before gradient clipping and,
    on several processes, before the reduction, which `update` does itself (except under FSDP2, where PyTorch has done
    it). The scores are therefore those of the global batch however it was split. Every backward pass between two
    updates counts as part of the step. Where parameters are sharded, create the scorer after that was done.

    With k-bit adapters the weights that are scored are the quantised ones, and the gradients theirs.

    Under DoRA the score is still p·g of `lora_B`, but no longer the derivative with respect to a gate on the delta.

    Args:
        model: A model with a head-masked adapter, possibly wrapped for distributed training.
        adapter_name: The adapter to score. It must be active and trainable.
        recording: Whether to listen from now on; otherwise after `start()`.

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

    def __init__(self, model: nn.Module, adapter_name: str = "default", *, recording: bool = True) -> None:
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        self.adapter_name = adapter_name
        self.layers: dict[str, HeadMaskable] = head_layers(model, adapter_name)
        # a fused projection is one layer, and one entry here per adapted part
        self.layouts = named_layouts(self.layers, adapter_name)
        self._trained = [param for param in model.parameters() if param.requires_grad]
        self._module_of = {
            key: name
            for name, layer in self.layers.items()
            for key in layer.head_layout[adapter_name].named_parts(name)
        }
        self.config = model.peft_config[adapter_name]
        # The run (a TrainerState) on whose behalf a callback scores; None in a plain loop.
        self.run: Any = None
        self.num_steps = 0
        self.num_skipped = 0
        # float64 (3, heads of all projections), the statistics of the steps so far
        self._sums: torch.Tensor | None = None
        self._gradients = StepGradients(self.layers, adapter_name)
        self._attach()
        if recording:
            self.start()

    @property
    def recording(self) -> bool:
        return self._gradients.listening

    def start(self) -> None:
        """Listen to the adapter's gradients from the next backward pass on."""
        if self.recording:
            return
        self.check()
        self._gradients.listen()

    def check(self) -> None:
        """Raise ValueError, and let another scorer have the adapter, if its heads cannot be scored."""
        for name, layer in self.layers.items():
            for scored in layer.scored_parameters(self.adapter_name):
                problem = self._why_not(name, layer, scored.param)
                if problem is not None:
                    self.close()
                    raise ValueError(f"the heads of adapter {self.adapter_name!r} cannot be scored: {problem}")

    def stop(self) -> None:
        """Stop listening; what has been gathered stays."""
        self._gradients.stop()

    def close(self) -> None:
        """Stop listening and let another scorer have the adapter."""
        self.stop()
        for layer in self.layers.values():
            attached = _ATTACHED.get(layer, {})
            if attached.get(self.adapter_name, lambda: None)() is self:
                del attached[self.adapter_name]

    @torch.no_grad()
    def update(self, loss_scale: float = 1.0) -> bool:
        """Count one optimizer step: call it after its last backward pass and before `optimizer.step()`.

        Args:
            loss_scale: The factor the loss was multiplied by (`GradScaler.get_scale()`).

        Returns:
            Whether the step counts. A step is skipped, on every process alike, if a gradient of the heads or of
            anything else that is trained is not finite: a loss scaler skips it too.

        Raises:
            RuntimeError: No gradient has reached the adapter since the last update.
        """
        if not self.recording:
            raise RuntimeError("HeadScorer.update() while it is not recording; call start() before the backward pass")
        (grads, finite), values = self._gradients.over_processes(self._trained), self._gradients.values()
        if finite:
            step = all_head_statistics(
                self._by_projection(values), self._by_projection(grads), self.layouts, loss_scale
            )
            # the layers of one model may be on several devices
            device = next(iter(step.values())).device
            step = torch.cat([statistics.to(device) for statistics in step.values()], dim=1)
            self._sums = step if self._sums is None else self._sums.to(device) + step
            self.num_steps += 1
        else:
            self.num_skipped += 1
        self._gradients.clear()
        return finite

    def scores(self, criterion: str | None = None) -> dict[str, torch.Tensor]:
        """Scores of every head, the mean over the steps so far.

        Args:
            criterion: A name in `peft_heads.heads.CRITERIA`; the adapter's own if None.

        Returns:
            `{projection: float64 (num_heads,) on the CPU}`, named as `get_head_masks` names them.

        Raises:
            ValueError: There is no such criterion, or it needs gradients and no step with finite gradients was counted.
        """
        criterion = criterion or self.config.criterion
        if find_criterion(criterion).needs_gradients and not self.num_steps:
            why = (
                f"the gradients of all {self.num_skipped} steps were not finite; lower the learning rate or the loss scale"
                if self.num_skipped
                else "no optimizer step was counted; call update() after the backward passes of each step"
            )
            raise ValueError(f"no head can be scored by {criterion!r}: {why}")
        return head_scores(
            criterion,
            self.layouts,
            statistics={name: sums / self.num_steps for name, sums in self._sums_by_name().items()},
            params=self._by_projection(self._gradients.values(now=True)),
            seed=self.config.mask_seed,
        )

    def all_scores(self) -> dict[str, dict[str, torch.Tensor]]:
        """`{criterion: scores}` for every criterion that can be computed from what was gathered."""
        scores = {}
        for name, criterion in CRITERIA.items():
            if criterion.needs_gradients and not self.num_steps:
                continue
            try:
                scores[name] = self.scores(name)
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

        Warns of groups whose heads all have the same score, as zero gradients give: there the order of the heads alone
        decides. Warns of projections that no gradient has reached in the steps so far.

        Returns:
            `{projection: bool (num_heads,)}`, True = active.

        Raises:
            ValueError: As `scores` does, or `ne`, `ratio`, `granularity`, `joint` do not fit the model.
        """
        groups = self.groups(ne, ratio, granularity, joint)
        kept = groups_kept_whole(groups, ne)
        if kept and ne != self.config.ne:  # the adapter's own ne was warned about when it was created
            warnings.warn(kept)
        silent = self.without_gradient()
        if not any(group.num_deactivated for group in groups):  # ne=0 needs no scores
            masks = {name: torch.ones(layout.num_heads, dtype=torch.bool) for name, layout in self.layouts.items()}
        else:
            scores = self.scores(criterion)
            masks = select_heads(scores, groups)
            degenerate = degenerate_groups(scores, groups)
            if degenerate:
                warnings.warn(self._describe_degenerate(criterion or self.config.criterion, scores, degenerate))
            silent = [name for name in silent if not any(name in group.modules for group in degenerate)]
        if silent:
            warnings.warn(
                f"no gradient has reached {module_patterns(silent, self.layouts)} in the {self.num_steps} step(s) that "
                f"were scored: adapter {self.adapter_name!r} is trained and saved there for nothing. Where the task "
                "does not use these layers, leave them out (exclude_modules); else look for what keeps the loss from "
                "depending on them"
            )
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
        """Whether the adapter's own criterion leaves it to the order of heads which are deactivated, in some group.

        Raises:
            ValueError: As `scores` does.
        """
        groups = self.groups()
        wanted = any(group.num_deactivated for group in groups)
        return wanted and bool(degenerate_groups(self.scores(), groups))

    def without_update(self) -> list[str]:
        """Projections of groups that give up heads while all their head-wise parameters are zero.

        The product with any gradient is zero there, and with it the scores by a Taylor criterion (`Criterion.is_taylor`).
        """
        norms = self.scores("weight_norm")
        equal = [group.modules for group in degenerate_groups(norms, self.groups())]
        return [name for names in equal if not any(norms[each].any() for each in names) for name in names]

    def without_gradient(self) -> list[str]:
        """Projections that no gradient other than zero has reached in the steps so far."""
        norms = {name: sums[STATISTICS.index("grad_norm")] for name, sums in self._sums_by_name().items()}
        return [name for name, norm in norms.items() if not norm.any()]

    @torch.no_grad()
    def apply(self, optimizer: Any = None, masks: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Select, set the masks, and stop listening.

        The deactivated rows of the adapter are set to zero, and their entries in the optimizer's state are cleared:
        momentum would move them again (which the mask hides, but not from somebody who reads the raw weights).

        Args:
            optimizer: The optimizer of the adapter's parameters, possibly prepared by Accelerate.
            masks: What to apply instead of `select()`, e.g. `scorer.select(ne=3)`.

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

    def state_dict(self) -> dict[str, Any]:
        """What was gathered, as JSON takes it; floats come back exactly."""
        return {
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "sums": {name: sums.tolist() for name, sums in self._sums_by_name().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: The state is that of another model.
        """
        sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in state["sums"].items()}
        shapes = {name: tuple(values.shape) for name, values in sums.items()}
        expected = {name: (len(STATISTICS), layout.num_heads) for name, layout in self.layouts.items()}
        if sums and shapes != expected:
            raise ValueError(f"the saved head scores are those of another model: they have {shapes}, not {expected}")
        self._sums = torch.cat([sums[name] for name in self.layouts], dim=1) if sums else None
        self.num_steps, self.num_skipped = state["num_steps"], state["num_skipped"]

    def _describe_degenerate(self, criterion: str, scores: dict[str, torch.Tensor], groups: list[HeadGroup]) -> str:
        where = "; ".join(
            f"the score of all {group.num_heads} heads is {group_scores(scores, group)[0]:g} in "
            f"{module_patterns(group.modules, self.layouts)}, and head{'s' * (group.num_deactivated > 1)} "
            f"{', '.join(map(str, range(group.num_deactivated)))} will be deactivated"
            for group in groups
        )
        return (
            f"the scores by {criterion!r} do not tell heads apart, so that their order decides: {where}. A score "
            "of 0 means that no gradient has reached these projections or that their adapter was zero when it was "
            "scored: score later or more steps, and leave out layers that the task does not use (exclude_modules)"
        )

    def _by_projection(self, of_modules: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`{module name: (out_features, n)}` to `{projection: (num_rows, n)}`."""
        return {name: layout.rows(of_modules[self._module_of[name]]) for name, layout in self.layouts.items()}

    def _sums_by_name(self) -> dict[str, torch.Tensor]:
        """`{projection: float64 (3, num_heads) on the CPU}`; empty before the first step."""
        if self._sums is None:
            return {}
        num_heads = [layout.num_heads for layout in self.layouts.values()]
        return dict(zip(self.layouts, self._sums.cpu().split(num_heads, dim=1), strict=True))

    def _attach(self) -> None:
        for layer in self.layers.values():
            other = _ATTACHED.setdefault(layer, {}).get(self.adapter_name, lambda: None)()
            if other is not None:
                raise TwoScorersError(other)
        for layer in self.layers.values():
            _ATTACHED[layer][self.adapter_name] = weakref.ref(self)

    def _why_not(self, name: str, layer: HeadMaskable, param: nn.Parameter) -> str | None:
        """What keeps a parameter from being scored, None if nothing does."""
        if not param.requires_grad:
            return f"its parameters in {name} are frozen; load the adapter with is_trainable=True and make it active"
        rows, shape = layer.head_layout[self.adapter_name].out_features, tuple(whole_shape(param))
        if shape[:1] != (rows,):
            return (
                f"a parameter in {name} has the shape {shape} instead of ({rows}, …): it was flattened, as FSDP1 does; "
                "use FSDP2 (fsdp_version 2, torch.distributed.fsdp.fully_shard), DistributedDataParallel or ZeRO"
            )
        return None


class TwoScorersError(ValueError):
    """Another scorer listens to the adapter."""

    def __init__(self, other: HeadScorer) -> None:
        super().__init__(
            f"another scorer is attached to adapter {other.adapter_name!r}; use one, or call close() on the other "
            "(a HeadScorer, or the TaylorHeadScorer of a run that broke off) first"
        )
        self.other = other
