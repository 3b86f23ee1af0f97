"""Many runs: settings are chosen on validation images, then reported on test images; shared warm-ups are trained once."""

from __future__ import annotations

import itertools
import logging
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ...adapter_folder.atomic import write_atomically
from ...data.tasks import Task
from ...tuners.common.options import HEAD_SETTINGS
from ..recipes import Recipe
from ..records.environment import source_state
from ..records.plans import Choice, unfinished_choices, write_plan
from ..records.record import Run, RunSpec, describe_method
from ..records.results import find_result
from ..report.rows import method_order
from .optuna_queue import WAIT, SharedQueue, default_study_name, take_turns
from .run import (
    clear_trunks,
    held_trunk,
    make_spec,
    run,
    train_trunk,
    training_key,
    trunk_epochs,
    trunk_key,
)
from .training import Places


logger = logging.getLogger(__name__)

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
        return _unique(combinations)

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


@dataclass
class Outcome:
    """The outcome of a list of runs: those finished, why others failed, and which choices that left open."""

    runs: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_chosen: list[str] = field(default_factory=list)


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


def execute(
    specs: Iterable[RunSpec],
    places: Places,
    outcome: Outcome,
    *,
    share_warmup: bool = True,
    test_every: int = 0,
    progress: Callable[[int, str], Any] | None = None,
    title: str = "",
    queue: SharedQueue | None = None,
) -> None:
    """Run specs in groups that share a warm-up; see `run_sweep`."""
    groups: dict[str, list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault(trunk_key(spec), []).append(spec)
    dirty = bool(source_state()[1])
    missing_of = {key: [spec for spec in group if not _is_done(spec, places, dirty)] for key, group in groups.items()}
    bar = progress(sum(map(len, missing_of.values())), title) if progress else None
    shared = _from_main(queue is not None)
    try:
        for key in _turns(groups, places, outcome, title, queue) if shared else groups:
            _run_group(groups[key], missing_of[key], places, outcome, share_warmup, test_every, bar)
    finally:
        if bar is not None:
            bar.close()
    for spec in () if shared else itertools.chain(*groups.values()):
        # another sweep in this folder may meanwhile have finished a run that was refused here
        if spec.run_id in outcome.failed and _is_done(spec, places, dirty):
            done = _attempt(outcome, spec, places, lambda spec=spec: run(spec, places))
            if done is not None:
                outcome.runs[spec.run_id] = done[0]
                outcome.failed.pop(spec.run_id, None)
    for spec in itertools.chain(*groups.values()) if shared else ():
        if _is_done(spec, places, dirty=True):  # by other machines
            outcome.runs[spec.run_id] = find_result(places.output_dir, spec, unofficial=True)
            outcome.failed.pop(spec.run_id, None)


def _run_group(
    group: list[RunSpec],
    missing: list[RunSpec],
    places: Places,
    outcome: Outcome,
    share_warmup: bool,
    test_every: int,
    bar: Any,
) -> None:
    """Run a group that shares a warm-up, which is trained once; `missing` are its runs without a result."""
    trunk = None
    with ExitStack() as stack:
        if share_warmup and len(set(map(training_key, missing))) > 1 and trunk_epochs(missing[0]) > 0:
            # A run without masks can go on from a checkpoint with masks, in which all heads are active. The reverse fails.
            first = max(missing, key=lambda spec: bool(spec.method.get("ne", 1)))
            trunk = _attempt(outcome, first, places, lambda: _hold_trunk(stack, first, places))
        # Runs to train together; none if they are evaluated in between, since each has its own best epoch.
        open_specs = [] if test_every else list(missing)
        for spec in group:
            twins = _twins(spec, open_specs, outcome)
            done = _attempt(
                outcome,
                spec,
                places,
                lambda spec=spec, twins=twins: run(spec, places, begin_with=trunk, test_every=test_every, also=twins),
            )
            if done is not None:
                outcome.runs[spec.run_id] = done[0]
                outcome.failed.pop(spec.run_id, None)
                if done[1]:  # trained, and its twins with it
                    open_specs = [other for other in open_specs if other not in (spec, *twins)]
            if bar is not None and spec in missing:
                bar.update()
        if trunk is not None and PartialState().is_main_process:
            shutil.rmtree(trunk.parent, ignore_errors=True)


def _hold_trunk(stack: ExitStack, spec: RunSpec, places: Places) -> Path:
    """Train the shared warm-up and hold it until the stack is closed."""
    stack.enter_context(held_trunk(spec, places))
    return train_trunk(spec, places)


def _twins(spec: RunSpec, open_specs: list[RunSpec], outcome: Outcome) -> tuple[RunSpec, ...]:
    """Other runs of the same training. A run that has failed is not among them."""
    key = training_key(spec)
    others = [other for other in open_specs if other != spec and other.run_id not in outcome.failed]
    return tuple(other for other in others if training_key(other) == key)


def _is_done(spec: RunSpec, places: Places, dirty: bool) -> bool:
    try:
        return find_result(places.output_dir, spec, unofficial=dirty) is not None
    except ValueError:
        return False  # a damaged file, which the run will name


def _turns(
    groups: dict[str, list[RunSpec]], places: Places, outcome: Outcome, title: str, queue: SharedQueue | None
) -> Iterator[str]:
    """Keys of the groups to run here; the main process asks the queue and tells the other processes."""
    turns = iter(()) if queue is None else take_turns(queue, groups, places.output_dir, outcome.failed, title)
    while (key := _from_main(next(turns, None))) is not None:
        if key != WAIT:
            yield key


def _from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value


def _attempt(outcome: Outcome, spec: RunSpec, places: Places, call: Callable[[], Any]) -> Any:
    """The value of the call; None if it failed, which is written down."""
    path = Path(places.output_dir) / "failed" / f"{spec.run_id}.txt"
    try:
        value = call()
    except Exception as error:
        outcome.failed[spec.run_id] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.error("%s failed (%s): %s", spec.run_id, path, outcome.failed[spec.run_id])
        if PartialState().is_main_process:
            write_atomically(path, traceback.format_exc())
        if PartialState().num_processes > 1:
            raise  # the other processes wait for this one; started again, the sweep goes on
        return None
    if PartialState().is_main_process:
        path.unlink(missing_ok=True)
    return value


def _without(method: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method that its row leaves open."""
    return {name: value for name, value in method.items() if name not in row}


def _unique(methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({describe_method(method): method for method in methods}.values())
