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


def test_a_module_that_was_divided_answers_for_all_it_held(monkeypatch):
    from peft_heads.backbones import classifier, image_part, targets
    from peft_heads.heads import detect

    monkeypatch.delitem(sys.modules, "peft_heads.heads.resolve", raising=False)
    with pytest.warns(DeprecationWarning, match="peft_heads.heads.resolve has moved to peft_heads.heads.detect and"):
        old = importlib.import_module("peft_heads.heads.resolve")
    assert old.resolve_heads is detect.resolve_heads and old.default_targets is targets.default_targets
    assert old._text_towers is image_part._text_towers
    assert old.task_head_names is classifier.classifier_names and old.HEAD_NAMES is classifier.CLASSIFIER_NAMES
    assert not hasattr(old, "nothing")


def test_modules_that_are_rooms_now_answer_for_what_they_held():
    from peft_heads.benchmark.offline import OFFLINE_TASKS
    from peft_heads.benchmark.report import make_report, summarize
    from peft_heads.scoring import HeadScorer

    assert HeadScorer.__module__ == "peft_heads.scoring.scorer" and OFFLINE_TASKS
    assert make_report.__module__ == summarize.__module__ == "peft_heads.benchmark.report.make"
