"""A sweep that several machines share through a storage of Optuna: each takes the next free group of runs.

A group is a trial: the runs that share a warm-up. Their results are stored with the trial, so that in the end every
machine has all result files, even without a common disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from ..._compat.libraries import trial_id
from ..records.results import find_result, write_result
from ..records.run_record import Environment, Run, RunResult, RunSpec


logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
CLAIM_SECONDS = 0.2
ATTEMPTS = 5
# Words in a database's errors when two machines create the same tables or rows, or write at once.
AT_ONCE = ("already exists", "unique", "duplicate", "locked")
RESULT = "result "
WAIT = ""


class SharedQueue:
    """The groups of a sweep, in a storage.

    Args:
        storage: URL of a database (`sqlite:///sweep.db`, `postgresql://…`), or the path of a file, which becomes a journal
            of Optuna: that one may lie on a network drive.
        study_name: Name of the study, the same on all machines.
        output_dir: Folder of this machine's results. Host and folder name the worker: started again, it goes on with
            the groups that it has taken.
        take_over: Whether groups that other machines have started and not finished are taken as well, because those
            machines are gone.

    Raises:
        ValueError: Optuna is not installed, or there is no such storage.
    """

    def __init__(self, storage: str, study_name: str, output_dir: str | os.PathLike, take_over: bool = False) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ValueError("--storage needs Optuna: pip install 'peft-heads[optuna]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.study = _open_study(storage, study_name)
        self.states = optuna.trial.TrialState
        self.finished = optuna.exceptions.UpdateFinishedTrialError
        self.worker = f"{socket.gethostname()}:{os.path.abspath(output_dir)}"
        # groups that a running machine starts later stay its own
        begun = self._trials(self.states.RUNNING) if take_over else []
        self.left_behind = {(trial.number, trial.user_attrs.get("worker")) for trial in begun}

    def enqueue(self, groups: list[str]) -> None:
        """Add the groups that no machine has added yet."""
        known = {trial.user_attrs.get("group") for trial in self._trials()}
        for group in groups:
            if group not in known:
                self.study.enqueue_trial({}, user_attrs={"group": group})

    def take(self, groups: list[str]) -> tuple[Any, str] | None:
        """`(trial, group)` of the next group to run here, those started before first; None if none is left to take.

        Trials are taken by number: `Study.ask` would also take those of another plan in the study, and create new ones.
        """
        first = self._first()
        for trial in self._trials(self.states.RUNNING):
            worker, group = trial.user_attrs.get("worker"), trial.user_attrs.get("group")
            mine = worker == self.worker or (trial.number, worker) in self.left_behind
            if mine and group in groups and self._claim(trial):
                return trial, group
        for trial in self._trials(self.states.WAITING):
            group = trial.user_attrs.get("group")
            if group not in groups:
                continue
            if trial.number != first[group]:  # two machines have added it at once
                self._become(trial, self.states.FAIL)
            # The name is written first: if the machine is killed in between, no running trial is left without an owner.
            elif self._set(trial, worker=self.worker) and self._become(trial, self.states.RUNNING):
                if self._claim(trial):
                    return trial, group
        return None

    def finish(self, trial: Any, runs: list[Run], failed: dict[str, str]) -> None:
        """Store the result of a group: its mean accuracy, or that one of its runs has failed."""
        # one attribute per run: MySQL allows 64 KB of text
        parts = {f"{RESULT}{run.spec.run_id}": json.dumps(_content(run)) for run in runs}
        if self._set(trial, **parts, failed=failed, finished=True):
            if runs and not failed:
                self._become(trial, self.states.COMPLETE, [sum(run.result.accuracy for run in runs) / len(runs)])
            else:
                self._become(trial, self.states.FAIL)

    def unfinished(self, groups: list[str]) -> list[str]:
        """Groups that are waiting, or that a machine is running."""
        finished = self._finished()
        return [group for group in groups if group not in finished]

    def collect(self, groups: list[str], output_dir: str | os.PathLike) -> dict[str, str]:
        """Write the result files that this machine lacks; returns `{run: why it failed}`.

        A damaged file stays as it is, and its run counts as failed.
        """
        failed: dict[str, str] = {}
        finished = self._finished()
        for attributes in (finished[group] for group in groups if group in finished):
            failed |= attributes["failed"]
            for name in filter(lambda name: name.startswith(RESULT), attributes):
                content = json.loads(attributes[name])
                spec = RunSpec.from_json(content["spec"])
                try:
                    found = find_result(output_dir, spec, unofficial=True)
                except ValueError as error:
                    failed[spec.run_id] = f"ValueError: {error}"
                    continue
                if found is None:
                    result = RunResult.from_json(content["result"])
                    write_result(output_dir, spec, result, Environment.from_json(content["environment"]))
        return failed

    def _claim(self, trial: Any) -> bool:
        """Write the worker's name on a trial. SQLite can hand it to two machines at once; the last name counts."""
        if not self._set(trial, worker=self.worker):
            return False
        time.sleep(CLAIM_SECONDS)
        return self._trials()[trial.number].user_attrs.get("worker") == self.worker

    def _set(self, trial: Any, **attributes: Any) -> bool:
        """Write attributes; False if another machine has finished the trial."""
        try:
            for name, value in attributes.items():
                self.storage.set_trial_user_attr(trial_id(trial), name, value)
        except self.finished:
            return False
        return True

    def _become(self, trial: Any, state: Any, values: list[float] | None = None) -> bool:
        """Change the trial's state; False if another machine has taken or finished it."""
        try:
            return self.storage.set_trial_state_values(trial_id(trial), state, values)
        except self.finished:
            return False

    def _finished(self) -> dict[str, dict[str, Any]]:
        """`{group: attributes of its trial}` of the finished groups."""
        trials = self._trials(self.states.COMPLETE, self.states.FAIL)
        return {x.user_attrs["group"]: x.user_attrs for x in trials if "finished" in x.user_attrs}

    def _first(self) -> dict[str | None, int]:
        """`{group: lowest number of its trials}`."""
        return {trial.user_attrs.get("group"): trial.number for trial in reversed(self._trials())}

    def _trials(self, *states: Any) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=states or None)


def _open_study(storage: str, study_name: str) -> tuple[Any, Any]:
    import optuna

    for attempt in range(ATTEMPTS):
        try:
            backend = optuna.storages.RDBStorage(storage) if "://" in storage else _journal(storage)
            study = optuna.create_study(
                storage=backend, study_name=study_name, direction="maximize", load_if_exists=True
            )
            return backend, study
        except Exception as error:  # any error: the library depends on the URL
            # two machines have created the tables of a new storage at once
            at_once = any(word in str(error).lower() for word in AT_ONCE)
            if not at_once or attempt == ATTEMPTS - 1:
                raise ValueError(f"--storage {storage!r} cannot be used: {' '.join(str(error).split())}") from error
            time.sleep(1.0)


def _journal(path: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    # the default lock is a symbolic link, which Windows keeps for administrators
    return JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path) if os.name == "nt" else None))


def _content(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name).to_json() for name in ("spec", "result", "environment")}


def group_name(specs: list[RunSpec], title: str) -> str:
    """A group's name in the storage, equal for equal runs."""
    return f"{title} {_digest(specs)[:16]}"


def default_study_name(specs: list[RunSpec]) -> str:
    """A study's name, equal for equal plans."""
    return f"peft-heads-{_digest(specs)[:12]}"


def _digest(specs: list[RunSpec]) -> str:
    return hashlib.sha256("\n".join(sorted(spec.run_id for spec in specs)).encode()).hexdigest()


def take_turns(
    queue: SharedQueue,
    groups: dict[str, list[RunSpec]],
    output_dir: str | os.PathLike,
    failed: dict[str, str],
    title: str,
) -> Iterator[str]:
    """The keys of this machine's groups, one after the other; then wait for the groups of other machines.

    While it waits it yields `WAIT` repeatedly: processes that hear nothing for long end each other.

    Args:
        queue: Queue of all machines.
        groups: `{key: runs}`, the same on all machines.
        output_dir: Folder in which the runs' results are found when the next group is asked for, and into which the
            results of other machines are written.
        failed: `{run: why}`; the caller adds its own runs, this function those of other machines.
        title: Title of this part of the sweep.
    """
    names = {group_name(specs, title): key for key, specs in groups.items()}
    queue.enqueue(list(names))
    waited = False
    while True:
        taken = queue.take(list(names))
        if taken is not None:
            trial, name = taken
            yield names[name]
            specs = groups[names[name]]
            found = [find_result(output_dir, spec, unofficial=True) for spec in specs if spec.run_id not in failed]
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
        yield WAIT
    failed |= queue.collect(list(names), output_dir)
