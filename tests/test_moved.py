"""Modules that the README, the notebooks or the changelog named before they moved can be imported under their old path."""

import importlib
import sys

import pytest


MOVED = {
    "benchmark.evidence": "benchmark.offline.evidence",
    "benchmark.evidence_plots": "benchmark.offline.evidence_plots",
    "benchmark.evidence_tables": "benchmark.offline.evidence_tables",
    "benchmark.tables": "benchmark.report.tables",
    "export": "convert.lora",
    "heads.resolve": "heads.detect",
    "inspection": "convert.inspect",
    "plotting": "scoring.plotting",
    "search": "scoring.search",
}


@pytest.mark.parametrize("old", MOVED)
def test_the_old_path_is_the_new_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"peft_heads.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"peft_heads.{old} has moved to peft_heads.{MOVED[old]}") as caught:
        module = importlib.import_module(f"peft_heads.{old}")
    assert module is importlib.import_module(f"peft_heads.{MOVED[old]}")
    assert caught[0].filename != importlib.import_module("peft_heads._moved").__file__


def test_modules_that_are_rooms_now_answer_for_what_they_held():
    from peft_heads.benchmark.offline import OFFLINE_TASKS
    from peft_heads.benchmark.report import make_report, summarize
    from peft_heads.scoring import HeadScorer

    assert HeadScorer.__module__ == "peft_heads.scoring.scorer" and OFFLINE_TASKS
    assert make_report.__module__ == summarize.__module__ == "peft_heads.benchmark.report.make"
