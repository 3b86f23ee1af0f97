"""Modules that the README, the notebooks or the changelog named before they moved can be imported under their old path."""

import importlib
import sys
from pathlib import Path

import pytest

import peft_heads


MOVED = {
    "benchmark.evidence": "benchmark.offline.evidence",
    "benchmark.evidence_plots": "benchmark.offline.evidence_plots",
    "benchmark.evidence_tables": "benchmark.offline.evidence_tables",
    "benchmark.tables": "benchmark.report.tables",
    "inspection": "convert.inspect",
    "plotting": "scoring.plotting",
    "search": "scoring.search",
}


def assert_names_the_importer(caught):
    """Whether the warning points out of the package, where Python shows it to whoever imports the old path."""
    assert not Path(caught[0].filename).is_relative_to(Path(peft_heads.__file__).parent)


@pytest.mark.parametrize("old", MOVED)
def test_the_old_path_is_the_new_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"peft_heads.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"peft_heads.{old} has moved to peft_heads.{MOVED[old]}") as caught:
        module = importlib.import_module(f"peft_heads.{old}")
    assert module is importlib.import_module(f"peft_heads.{MOVED[old]}")
    assert_names_the_importer(caught)


DIVIDED = {
    "export": {"convert.lora": "export_lora", "convert.merged": "export_merged", "convert.packed": "export_packed"},
}


@pytest.mark.parametrize("old", DIVIDED)
def test_the_old_path_of_a_module_that_was_divided_has_everything(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"peft_heads.{old}", raising=False)
    homes = " and ".join(f"peft_heads.{new}" for new in DIVIDED[old])
    with pytest.warns(DeprecationWarning, match=f"peft_heads.{old} has moved to {homes}") as caught:
        module = importlib.import_module(f"peft_heads.{old}")
    for new, name in DIVIDED[old].items():
        assert getattr(module, name) is getattr(importlib.import_module(f"peft_heads.{new}"), name)
        assert getattr(module, name).__module__ == f"peft_heads.{new}"  # at home there, not passed on
    assert module.__name__ == f"peft_heads.{old}" and module.__file__.endswith(f"{old}.py")
    assert_names_the_importer(caught)


def test_contents_that_were_renamed_have_their_old_names(monkeypatch):
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
