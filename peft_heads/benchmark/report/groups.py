"""The tasks of a suite and their groups, as the tables need them."""

from __future__ import annotations

from collections.abc import Iterable

from ...data.suites import SUITES
from ..records.run_record import Run


ONE_GROUP = "all tasks"


def suite_groups(suite: str, runs: Iterable[Run] = ()) -> dict[str, str]:
    """`{task: group}` of a suite, in the papers' order; where its tasks are not known, of those that were run."""
    known = SUITES[suite].tasks if suite in SUITES else ()
    groups = {task.name: task.group for task in known}
    names = groups or [run.spec.task for run in runs if run.spec.suite == suite]
    return groups if len(set(groups.values())) > 1 else dict.fromkeys(names, ONE_GROUP)
