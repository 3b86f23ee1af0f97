"""A sweep: settings are chosen on validation images, then reported on test images."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from ...data.tasks import Task
from ...tuners.common.options import HEAD_SETTINGS
from ..recipes import Recipe
from ..records.plans import Choice, unfinished_choices, write_plan
from ..records.run_record import Run, RunSpec, describe_method
from ..records.schema import unique
from ..report.rows import method_order
from .execution import Outcome, execute
from .optuna_queue import SharedQueue, default_study_name
from .places import Places
from .run import make_spec
from .trunk import clear_trunks


TUNED = ("scale", "lora_alpha")


@dataclass(frozen=True)
class Sweep:
    """A comparison of settings.

    Attributes:
        tasks: Tasks of one suite.
        method: `{"name": …}` and, per setting, a value or a list of values: all combinations are run.
        recipe, backbone: Recipe and backbone of all runs.
        seeds: Seeds of the runs that are reported.
        search_seeds: Seeds of the runs by which settings are chosen.
        tuned: Settings whose value is chosen task by task on validation images. Each combination of the others is a
            row of the report.
        shots, list_seeds: Images per class and numbers of the lists, in few-shot tasks.
    """

    tasks: tuple[Task, ...]
    method: dict[str, Any]
    recipe: Recipe
    backbone: str
    seeds: tuple[int, ...] = (0, 1, 2)
    search_seeds: tuple[int, ...] = (0,)
    tuned: tuple[str, ...] = TUNED
    shots: tuple[int | None, ...] = (None,)
    list_seeds: tuple[int | None, ...] = (None,)

    def methods(self) -> list[dict[str, Any]]:
        """All combinations that differ: where no head is deactivated, the settings of the selection are left out."""
        names = list(self.method)
        values = [value if isinstance(value, list | tuple) else [value] for value in self.method.values()]
        combinations = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
        for method in combinations:
            if method.get("ne") == 0:
                for name in HEAD_SETTINGS:  # read when heads are selected
                    if name != "ne":
                        method.pop(name, None)
        return unique(combinations, key=describe_method)

    def variants(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """`(settings of a row of the report, combinations among which one is chosen per task)`."""
        families: dict[str, tuple[dict, list]] = {}
        for method in self.methods():
            row = {name: value for name, value in method.items() if name not in self.tuned}
            families.setdefault(describe_method(row), (row, []))[1].append(method)
        return list(families.values())

    def cells(self) -> Iterator[tuple[Task, int | None]]:
        return itertools.product(self.tasks, self.shots)

    def search(self) -> list[RunSpec]:
        """The runs by which settings are chosen; none if there is one combination only."""
        methods = self.methods()
        return self.runs(methods, self.search_seeds, final=False) if len(methods) > 1 else []

    def plan(self) -> list[RunSpec]:
        """All runs that may be needed, whichever settings are chosen."""
        return self.search() + self.runs(self.methods(), self.seeds, final=True)

    def runs(self, methods: list[dict[str, Any]], seeds: tuple[int, ...], *, final: bool) -> list[RunSpec]:
        """The runs of these methods on every task and list, with every seed."""
        return [
            self._spec(task, method, seed, shots, list_seed, final=final)
            for task, shots in self.cells()
            for seed in seeds
            for list_seed in self.list_seeds
            for method in methods
        ]

    def final(self, results: Callable[[RunSpec], Run | None]) -> list[RunSpec]:
        """The runs that are reported, once those of `search` are done.

        Args:
            results: Returns the finished run of a spec; None if it failed, was refused or is not finished. Nothing is
                chosen then, and the row is not run on this task: the best of the candidates that happen to be finished
                would be another choice than the protocol's.
        """
        specs = []
        for task, shots in self.cells():
            for _, candidates in self.variants():
                chosen = self._best(task, shots, candidates, results)
                if chosen is not None:
                    specs += [
                        self._spec(task, chosen, seed, shots, list_seed, final=True)
                        for seed in self.seeds
                        for list_seed in self.list_seeds
                    ]
        return specs

    def choices(self) -> list[Choice]:
        """The choices that the runs of `search` decide, task by task."""
        return [
            Choice(
                what=f"{describe_method(row)} on {task.name}" + ("" if shots is None else f", {shots} shots"),
                split=self._candidate(task, candidates[0], shots)[0].eval_split,
                runs={
                    spec.run_id: describe_method({"name": "", **_without(method, row)}).strip()
                    for method in candidates
                    for spec in self._candidate(task, method, shots)
                },
            )
            for task, shots in self.cells()
            for row, candidates in self.variants()
            if len(candidates) > 1
        ]

    def _best(self, task, shots, candidates, results) -> dict[str, Any] | None:
        """The candidate with the highest mean accuracy on validation images; among equals the first in the report's order.

        None if a run of a candidate is missing.
        """
        if len(candidates) == 1:
            return candidates[0]
        means = {}
        candidates = sorted(candidates, key=method_order)
        for index, method in enumerate(candidates):
            runs = [results(spec) for spec in self._candidate(task, method, shots)]
            if not all(runs):
                return None
            means[index] = round(statistics.fmean(100 * run.result.accuracy for run in runs), 7)
        return candidates[max(means, key=means.get)]

    def _candidate(self, task, method, shots) -> list[RunSpec]:
        """The runs by which one candidate is judged."""
        return [
            self._spec(task, method, seed, shots, list_seed, final=False)
            for seed in self.search_seeds
            for list_seed in self.list_seeds
        ]

    def _spec(self, task, method, seed, shots, list_seed, *, final: bool) -> RunSpec:
        return make_spec(task, method, self.recipe, self.backbone, seed, final=final, shots=shots, list_seed=list_seed)


def run_sweep(
    sweep: Sweep,
    places: Places,
    outcome: Outcome | None = None,
    *,
    share_warmup: bool = True,
    test_every: int = 0,
    progress: Callable[[int, str], Any] | None = None,
    queue: SharedQueue | None = None,
) -> Outcome:
    """Run what has no result yet. A run that fails is recorded, and the others go on.

    Settings are chosen only among this sweep's own candidates, not among others in the output folder, and only if all
    candidates are finished.

    Args:
        sweep: The sweep.
        places: Folders of data and results.
        outcome: Outcome that is filled as runs finish, and returned; a new one by default.
        share_warmup: Whether runs that differ in the selection of heads alone train the epochs before it once. The
            results are the same.
        test_every: `test_every` of `run`, for the runs on test images.
        progress: Called with the number of runs to be done and a title; returns an object with `update()` and
            `close()`, such as a tqdm.
        queue: Queue that machines share, on the main process of each.
    """
    outcome, plan, choices = Outcome() if outcome is None else outcome, sweep.plan(), sweep.choices()
    clear_trunks(places, needed=plan)
    if choices and PartialState().is_main_process:
        write_plan(places.output_dir, default_study_name(plan), choices)
    execute(sweep.search(), places, outcome, share_warmup=share_warmup, progress=progress, title="search", queue=queue)

    outcome.not_chosen, _ = unfinished_choices(choices, set(outcome.runs))
    final = sweep.final(lambda spec: outcome.runs.get(spec.run_id))
    execute(
        final,
        places,
        outcome,
        share_warmup=share_warmup,
        test_every=test_every,
        progress=progress,
        title="report",
        queue=queue,
    )
    clear_trunks(places)
    return outcome


def _without(method: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method that its row leaves open."""
    return {name: value for name, value in method.items() if name not in row}
