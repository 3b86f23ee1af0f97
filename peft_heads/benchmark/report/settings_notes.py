"""What a report says about settings: those that no row names, and where rows depart from the recipe."""

from __future__ import annotations

from ..records.effective import describe_settings, deviations, effective_method
from .rows import Row, row_labels


SHOWN = 6
OFFICIAL = (
    "Official means: a complete run of committed code (or of an installed package). Whether a run follows the recipe of "
    "its suite is said here, apart from that."
)


def settings_notes(rows: list[Row], suite: str) -> str:
    """A list in Markdown: what official means, deviations from the recipe, defaults in effect."""
    return "\n".join(f"- {note}" for note in [OFFICIAL, *deviation_notes(rows, suite), *default_notes(rows)])


def deviation_notes(rows: list[Row], suite: str) -> list[str]:
    """Where rows depart from the recipe of the suite; said once if all depart in the same way."""
    by_text: dict[str, list[str]] = {}
    for row, label in zip(rows, row_labels(rows), strict=True):
        runs = [run for seeds in row.runs.values() for run in seeds.values()]
        found = list(dict.fromkeys(text for run in runs for text in deviations(run.spec, run.environment)))
        text = "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        by_text.setdefault(text, []).append(label)
    departing = {text: labels for text, labels in by_text.items() if text}
    if not departing:
        return [f"All rows follow the recipe of {suite}."] if rows else []
    if len(by_text) == 1:
        return [f"**All rows depart from the recipe of {suite}**: {next(iter(departing))}"]
    return [
        f"**Departs from the recipe of {suite}**: {', '.join(labels)}: {text}" for text, labels in departing.items()
    ]


def default_notes(rows: list[Row]) -> list[str]:
    """For each method, the settings that were in effect in all its rows although no row names them."""
    methods: dict[str, list[dict]] = {}
    for row in rows:
        methods.setdefault(row.method["name"], []).append(row)
    notes = []
    for name, own in methods.items():
        try:
            effective = [effective_method(row.method, row.settings["recipe"]) for row in own]
        except (ValueError, KeyError):
            continue  # of a method, or a recipe, that this version does not know
        shared = {
            setting: value
            for setting, value in effective[0].items()
            if all(other.get(setting) == value for other in effective)
            and not any(setting in row.method for row in own)
        }
        if text := describe_settings(shared):
            notes.append(f"In effect by default, in all rows of {name}: {text}")
    return notes
