"""Plans of a sweep: the runs by which a setting is chosen.

A plan is written before they are run, since a choice among a part of the runs would be another choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ...adapter_folder.atomic import write_atomically
from .schema import check_fields, from_mapping


FOLDER = "plans"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One setting that is chosen.

    Args:
        what: Row of the report and task, in words.
        split: The validation images.
        runs: `{run id: candidate in words}` of all runs of all candidates.
    """

    what: str
    split: str
    runs: dict[str, str]

    def __post_init__(self) -> None:
        check_fields(self)

    def missing(self, finished: set[str]) -> list[str]:
        """Runs that are not finished."""
        return [run_id for run_id in self.runs if run_id not in finished]


def unfinished_choices(choices: Iterable[Choice], finished: set[str]) -> tuple[list[str], set[str]]:
    """What cannot be chosen yet, in words, and the finished runs of these choices, which must not decide them.

    Args:
        choices: Choices of one sweep or several.
        finished: Ids of the runs that have a result.
    """
    notes, partly = [], set()
    for choice in choices:
        missing = choice.missing(finished)
        if missing:
            candidates = ", ".join(dict.fromkeys(choice.runs[run_id] for run_id in missing))
            notes.append(
                f"{choice.what}: nothing is chosen, and nothing run on test: {len(missing)} of {len(choice.runs)} runs on "
                f"{choice.split} are not finished ({candidates})"
            )
            partly |= choice.runs.keys() & finished
    return list(dict.fromkeys(notes)), partly


def write_plan(root: str | os.PathLike, name: str, choices: Iterable[Choice]) -> Path:
    """Write what a sweep is going to choose. The same sweep writes the same plan when it is started again.

    Args:
        root: The folder given to `write_result`.
        name: Name of the plan, equal for equal sweeps.
        choices: All choices of the sweep.
    """
    text = json.dumps([asdict(choice) for choice in choices], indent=1)
    return write_atomically(Path(root) / FOLDER / f"{name}.json", text + "\n")


def read_plans(root: str | os.PathLike) -> list[Choice]:
    """The choices of the sweeps in a folder; none in a folder of an older version.

    Raises:
        ValueError: A file is damaged.
    """
    choices = []
    for path in sorted((Path(root) / FOLDER).glob("*.json")):
        try:
            choices += [from_mapping(Choice, data) for data in json.loads(path.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is no plan of a sweep ({error}); the sweep writes it when it is begun again"
            ) from error
    return choices
