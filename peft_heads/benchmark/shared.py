"""A sweep that several machines share through a storage of Optuna: each takes the next group of runs that is free.

A group, the runs that share a warm-up, is a trial. What came out travels with it, so that in the end every machine has all
result files, with a common disk or without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from .results import Environment, Run, RunResult, RunSpec, find_result, write_result


logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
CLAIM_SECONDS = 0.2
ATTEMPTS = 5


class SharedQueue:
    """The groups of a sweep in a storage.

    Args:
        storage: URL of a database (`sqlite:///sweep.db`, `postgresql://…`), as Optuna reads it.
        study_name: The same on all machines.
        output_dir: Of this machine's results. With the host it says who took a group: begun again, it goes on with it.
        take_over: Take groups as well that other machines have begun and not finished, because they are gone.

    Raises:
        ValueError: Optuna is not installed, or there is no such storage.
    """

    def __init__(self, storage: str, study_name: str, output_dir: str | os.PathLike, take_over: bool = False) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ValueError("--storage needs Optuna: pip install 'peft-heads[optuna]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = _open_study(storage, study_name)
        self.states = optuna.trial.TrialState
        self.new_trial = optuna.trial.Trial
        self.finished = optuna.exceptions.UpdateFinishedTrialError
        self.worker = f"{socket.gethostname()}:{os.path.abspath(output_dir)}"
        self.take_over = take_over

    def enqueue(self, groups: list[str]) -> None:
        """Put up the groups that nobody has put up yet."""
        known = {trial.user_attrs.get("group") for trial in self._trials()}
        for group in groups:
            if group not in known:
                self.study.enqueue_trial({}, user_attrs={"group": group})

    def take(self, groups: list[str]) -> tuple[Any, str] | None:
        """`(trial, group)` of the next group to run here, first those begun before; None if none is left to take."""
        for trial in self._trials(self.states.RUNNING):
            mine = trial.user_attrs.get("worker") == self.worker or self.take_over
            if mine and trial.user_attrs.get("group") in groups:
                trial = self.new_trial(self.study, trial._trial_id)
                if self._claim(trial):
                    return trial, trial.user_attrs["group"]
        while any(trial.user_attrs.get("group") in groups for trial in self._trials(self.states.WAITING)):
            trial = self.study.ask()  # of two machines that ask at once each gets another
            group = trial.user_attrs.get("group")
            if group not in groups or trial.number != self._first(group):
                # the last waiting one was taken meanwhile; or two machines have put the group up at once
                self._tell(trial, state=self.states.FAIL)
            elif self._claim(trial):
                return trial, group
        return None

    def finish(self, trial: Any, runs: list[Run], failed: dict[str, str]) -> None:
        """Say what came out of a group."""
        contents = [
            {"spec": x.spec.to_json(), "result": x.result.to_json(), "environment": x.environment.to_json()}
            for x in runs
        ]
        accuracies = [run.result.accuracy for run in runs]
        if self._set(trial, results=json.dumps(contents), failed=failed):
            if accuracies:
                self._tell(trial, sum(accuracies) / len(accuracies))
            else:
                self._tell(trial, state=self.states.FAIL)

    def unfinished(self, groups: list[str]) -> list[str]:
        """The groups that are waiting, or are being run by some machine."""
        return [group for group in groups if self._result(group) is None]

    def collect(self, groups: list[str], output_dir: str | os.PathLike) -> dict[str, str]:
        """Write the result files that this machine lacks; gives `{run: why it failed}`."""
        failed = {}
        for attributes in filter(None, map(self._result, groups)):
            failed |= attributes.get("failed", {})
            for content in json.loads(attributes["results"]):
                spec = RunSpec.from_json(content["spec"])
                if find_result(output_dir, spec, unofficial=True) is None:
                    result = RunResult.from_json(content["result"])
                    write_result(output_dir, spec, result, Environment.from_json(content["environment"]))
        return failed

    def _claim(self, trial: Any) -> bool:
        """Write the worker's name on it. SQLite can give one trial to two that ask at once: the last name stands."""
        if not self._set(trial, worker=self.worker):
            return False
        time.sleep(CLAIM_SECONDS)
        return self._trials()[trial.number].user_attrs.get("worker") == self.worker

    def _set(self, trial: Any, **attributes: Any) -> bool:
        """False if another machine has finished the trial."""
        try:
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
        except self.finished:
            return False
        return True

    def _tell(self, trial: Any, *values: Any, **state: Any) -> None:
        with contextlib.suppress(self.finished, ValueError):  # the second: told by another machine
            self.study.tell(trial, *values, **state)

    def _result(self, group: str) -> dict[str, Any] | None:
        for trial in self._trials(self.states.COMPLETE, self.states.FAIL):
            if trial.user_attrs.get("group") == group and "results" in trial.user_attrs:
                return trial.user_attrs
        return None

    def _first(self, group: str) -> int:
        return min(trial.number for trial in self._trials() if trial.user_attrs.get("group") == group)

    def _trials(self, *states: Any) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=states or None)


def _open_study(storage: str, study_name: str) -> Any:
    import optuna

    for attempt in range(ATTEMPTS):
        try:
            return optuna.create_study(
                storage=storage, study_name=study_name, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # of whatever library is behind the URL
            # two machines have made the tables of a new storage at once
            if "already exists" not in str(error) or attempt == ATTEMPTS - 1:
                raise ValueError(f"--storage {storage!r} cannot be used: {' '.join(str(error).split())}") from error
            time.sleep(1.0)


def group_name(key: str, title: str) -> str:
    """What a group is called in the storage."""
    return f"{title} {hashlib.sha256(key.encode()).hexdigest()[:16]}"


def default_study_name(specs: list[RunSpec]) -> str:
    """Equal for equal plans."""
    digest = hashlib.sha256("\n".join(sorted(spec.run_id for spec in specs)).encode()).hexdigest()
    return f"peft-heads-{digest[:12]}"


def take_turns(
    queue: SharedQueue,
    groups: dict[str, list[RunSpec]],
    output_dir: str | os.PathLike,
    failed: dict[str, str],
    title: str,
) -> Iterator[str]:
    """The keys of the groups that are this machine's to run, one after the other; then waits for the others.

    Args:
        queue: The groups of all machines.
        groups: `{key: runs}`, the same on all machines.
        output_dir: Where the runs' results are found when the next group is asked for; the others' are written there.
        failed: `{run: why}`, filled by the caller for its own runs, and here for the others'.
        title: Of this part of the sweep.
    """
    names = {group_name(key, title): key for key in groups}
    queue.enqueue(list(names))
    waited = False
    while True:
        taken = queue.take(list(names))
        if taken is not None:
            trial, name = taken
            yield names[name]
            specs = groups[names[name]]
            found = [find_result(output_dir, spec, unofficial=True) for spec in specs]
            why = {spec.run_id: failed[spec.run_id] for spec in specs if spec.run_id in failed}
            queue.finish(trial, [run for run in found if run is not None], why)
            continue
        left = queue.unfinished(list(names))
        if not left:
            break
        if not waited:
            logger.warning("%s: waiting for %d groups of runs on other machines", title, len(left))
        waited = True
        time.sleep(POLL_SECONDS)
    failed |= queue.collect(list(names), output_dir)
