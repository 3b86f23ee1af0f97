"""Benchmark trees on disk, in the forms in which they were published; they are checked before anything is decoded."""

from ..splits import SHOWN_FAULTS, Split, TaskReport, summary
from .check import check_tree
from .load import load_split


__all__ = ["SHOWN_FAULTS", "Split", "TaskReport", "check_tree", "load_split", "summary"]
