"""The execution of many runs: in groups that train a shared warm-up once, alone or in turns with other machines."""

from __future__ import annotations

import itertools
import logging
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ...adapter_folder.atomic import write_atomically
from ..records.environment import source_state
from ..records.results import find_result
from ..records.run_record import Run, RunSpec
from .optuna_queue import WAIT, SharedQueue, take_turns
from .places import Places
from .run import run
from .trunk import held_trunk, train_trunk, training_key, trunk_epochs, trunk_key


logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """The outcome of a list of runs: those finished, why others failed, and which choices that left open."""

    runs: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_chosen: list[str] = field(default_factory=list)


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
