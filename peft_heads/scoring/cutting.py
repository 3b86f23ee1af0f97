"""The cuts of a run of Trainer: when heads and neurons are switched off, and how many at once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..backbones.operations import Operations, count_operations
from ..heads.budget import Cut
from ..heads.neurons import describe_neurons
from ..heads.protocol import describe_masks, read_masks
from ..heads.selection import HeadGroup
from .checks import switches_off
from .cuts import units_after
from .scorer import HeadScorer
from .window import SelectionWindow


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CutReport:
    """What a cut has done.

    Attributes:
        number: Number of the cut, counted from 1.
        cuts: Number of cuts.
        window: The steps that were scored.
        steps_counted, steps_skipped: Numbers of those that count, and of those with gradients that were not finite.
        masks: `{projection: bool (num_heads,)}`, True = active.
        neuron_masks: `{first layer of an MLP: bool (num_neurons,)}`, likewise; empty where none are pruned.
        scores: `{criterion: {projection: (num_heads,)}}` by which heads were chosen, and the other criteria's.
        degenerate: Whether in some group all heads had the same score, so that their order alone has decided.
        speed: How many times fewer operations the model would need without these units; None where layers differ in
            their number, where the operations cannot be counted, or where nothing is pruned.
        chosen: The numbers that `target_speed` has led to; None without one.
    """

    number: int
    cuts: int
    window: SelectionWindow
    steps_counted: int
    steps_skipped: int
    masks: dict[str, torch.Tensor]
    neuron_masks: dict[str, torch.Tensor]
    scores: dict[str, dict[str, torch.Tensor]]
    degenerate: bool
    speed: float | None
    chosen: Cut | None

    def lines(self, config: Any) -> list[str]:
        """What is logged: one line on heads, and where they are pruned, on neurons and speed."""
        cut = f" (cut {self.number} of {self.cuts})" if self.cuts > 1 else ""
        lines = [f"deactivated heads by {config.criterion}{cut}: {describe_masks(self.masks)}"]
        if self.neuron_masks:
            neurons = "; ".join(describe_neurons(self.neuron_masks))
            lines.append(f"deactivated neurons by {config.neuron_criterion}{cut}: {neurons}")
        if self.chosen is not None and self.number == 1:
            lines.insert(0, f"target_speed={config.target_speed:g}: the nearest reachable cut is {self.chosen}")
        if self.speed is not None:
            lines.append(f"without these units the model takes {self.speed:.3g} times fewer operations")
        return lines

    def log_entry(self) -> dict[str, Any]:
        """What Trainer logs. Where units are pruned or go in several cuts: how many are off in each layer."""
        entry: dict[str, Any] = {"deactivated_heads": describe_masks(self.masks), "degenerate": self.degenerate}
        if self.cuts > 1 or self.neuron_masks:
            entry |= {
                "cut": self.number,
                "heads_off": _most_off(self.masks),
                "neurons_off": _most_off(self.neuron_masks),
            }
        if self.neuron_masks:
            entry["deactivated_neurons"] = "; ".join(describe_neurons(self.neuron_masks))
        if self.speed is not None and "cut" in entry:
            entry["speed"] = round(self.speed, 4)
        return entry


class Cutting:
    """Carries out the cuts of a run, one after the other; units that are off stay off.

    Args:
        scorer: The adapter's scorer.
        windows: The steps that are scored for each cut, after the last of which it is made.
        made: Number of cuts that were made before, as a checkpoint says.
    """

    def __init__(self, scorer: HeadScorer, windows: Sequence[SelectionWindow], made: int = 0) -> None:
        self.scorer, self.windows, self.made = scorer, tuple(windows), made
        self._operations: Operations | None = None

    @property
    def next(self) -> SelectionWindow | None:
        """The window of the next cut; None after the last one."""
        return self.windows[self.made] if self.made < len(self.windows) else None

    @property
    def current(self) -> SelectionWindow:
        """The window of the next cut, or of the last one if all are made."""
        return self.windows[min(self.made, len(self.windows) - 1)]

    @property
    def switches_off(self) -> bool:
        """Whether the adapter's settings switch any unit off."""
        return switches_off(self.scorer.config)

    def end(self) -> None:
        """Make no further cut."""
        self.made = len(self.windows)

    def listens_at(self, step: int) -> bool:
        """Whether the gradients of a step count for a cut to come."""
        return self.next is not None and self.next.first <= step

    def is_due(self, step: int) -> bool:
        """Whether a cut is to be made after a step."""
        return self.next is not None and self.next.last <= step

    def cut(self, optimizer: Any = None) -> CutReport:
        """Switch off as many units as the schedule says, those with the lowest scores.

        Raises:
            ValueError: As `HeadScorer.select` does.
        """
        scorer, number, cuts = self.scorer, self.made + 1, len(self.windows)
        groups = [self._stage(group, number) for group in scorer.groups()]
        scores, degenerate = scorer.all_scores(), scorer.is_degenerate(groups)
        masks = scorer.select_groups(groups)
        neurons = {name: units_after(off, number, cuts) for name, off in scorer.neurons_off().items()}
        neuron_masks = scorer.select_neurons(neurons)
        steps, window = (scorer.num_steps, scorer.num_skipped), self.next
        masks = scorer.apply(optimizer, masks, neuron_masks, deepen=cuts > 1)
        self.made = number
        if self.next is None:
            scorer.close()
        speed = self._speed(masks, neuron_masks)
        return CutReport(
            number, cuts, window, *steps, masks, neuron_masks, scores, degenerate, speed, chosen=scorer.cut
        )

    def _stage(self, group: HeadGroup, number: int) -> HeadGroup:
        """The group as it is after a cut."""
        masks = read_masks(self.scorer.layers, self.scorer.adapter_name)
        off = torch.stack([~masks[name] for name in group.modules]).any(dim=0).nonzero().flatten().tolist()
        wanted = units_after(group.num_deactivated, number, len(self.windows))
        return replace(group, num_deactivated=wanted, already_off=tuple(off))

    def _speed(self, masks: dict[str, torch.Tensor], neuron_masks: dict[str, torch.Tensor]) -> float | None:
        if not getattr(self.scorer.config, "prunes", False):
            return None
        heads, neurons = (_number_off(some) for some in (masks, neuron_masks))
        if heads is None or neurons is None:
            return None
        try:
            self._operations = self._operations or count_operations(self.scorer.model)
        except ValueError:  # the layers differ, or the model is none of transformers
            return None
        operations = self._operations
        return operations.speed(operations.num_heads - heads, operations.num_neurons - neurons)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint says of the cuts; `first_step` and `select_step` are the window of the next one."""
        cut = self.scorer.cut
        return {
            "first_step": self.current.first,
            "select_step": self.current.last,
            "cuts": [window.last for window in self.windows],
            "cuts_made": self.made,
            "remain": None if cut is None else asdict(cut),
        }

    def begin(self, saved: dict[str, Any], again: Cutting | None) -> int | None:
        """Take up the cuts that were made before; an adapter with units off otherwise keeps them, and no cut is made.

        Args:
            saved: A checkpoint's `progress()`, and `selected_at`; empty where training begins at its beginning.
            again: The cuts of a run that Trainer begins again, with a smaller batch.

        Returns:
            The step of the first cut; None if none was made.

        Raises:
            ValueError: The checkpoint has made cuts by another schedule than this run's.
        """
        if saved:
            self._resume(saved)
        if saved.get("selected_at") is not None or not self.scorer.has_units_off:
            return saved.get("selected_at")
        units = self.scorer.describe_present()
        if again is not None:
            logger.info("training begins again, with the heads that were selected: %s", units)
            self.made, self.scorer.cut = again.made, again.scorer.cut
            return 0
        warnings.warn(
            f"adapter {self.scorer.adapter_name!r} has deactivated heads already and keeps them: {units}. Nothing is scored"
        )
        self.end()
        return None

    def _resume(self, saved: dict[str, Any]) -> None:
        # before there were several cuts, there was one
        self.made = saved.get("cuts_made", int(saved.get("selected_at") is not None))
        remain = saved.get("remain")
        self.scorer.cut = None if remain is None else Cut(**remain)
        steps = [window.last for window in self.windows]
        before = saved.get("cuts", [saved["select_step"]])
        if self.made == len(before):
            self.end()
        elif self.made and before != steps:
            raise ValueError(
                f"the checkpoint has made {self.made} of {len(before)} cuts, planned after the steps "
                f"{', '.join(map(str, before))}, but this run plans {', '.join(map(str, steps))}; resume with the same "
                "select_at, warmup_epochs, cuts, last_cut and length of training"
            )


def _most_off(masks: dict[str, torch.Tensor]) -> int:
    """The largest number of units that are off in a layer."""
    return max((int((~mask).sum()) for mask in masks.values()), default=0)


def _number_off(masks: dict[str, torch.Tensor]) -> int | None:
    """Number of units that are off in each layer; None where layers differ."""
    numbers = {int((~mask).sum()) for mask in masks.values()} or {0}
    return numbers.pop() if len(numbers) == 1 else None
