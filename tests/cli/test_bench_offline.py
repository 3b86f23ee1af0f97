"""`peft-heads bench offline`, our own evidence, in its quick form."""

import pytest
from benchmark_runs import make_run

from peft_heads.benchmark.offline.evidence import read_records
from peft_heads.benchmark.records.results import read_results, write_result
from peft_heads.cli.main import main


def test_dry_run(tmp_path, capsys):
    assert main(["bench", "offline", "--output_dir", str(tmp_path), "--dry_run"]) == 0
    assert capsys.readouterr().out.startswith("1,140 trainings of 12 epochs")
    assert main(["bench", "offline", "--output_dir", str(tmp_path), "--dry_run", "--core", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith("138 trainings of 12 epochs")
    assert not list(tmp_path.iterdir())


def test_unknown_task(tmp_path, capsys):
    assert main(["bench", "offline", "--output_dir", str(tmp_path), "--task", "cats"]) == 2
    assert "unknown task 'cats' in the suite 'offline'" in capsys.readouterr().err


@pytest.mark.slow
def test_quick(tmp_path, capsys):
    """The suite is run in parts; the report covers all of them."""
    words = ["bench", "offline", "--quick", "--output_dir", str(tmp_path)]
    other = make_run("digits", 0.5, suite="offline", method=("lora", {"r": 8, "scale": 1}), spec={"epochs": 12})
    write_result(tmp_path, other.spec, other.result, other.environment)  # of another length: not compared with
    assert main([*words, "--seed", "0"]) == 0
    assert main(words) == 0
    printed = capsys.readouterr().out
    for text in ("Differences of settings", "most responsive first", "absolute − LoRA", "evidence.md"):
        assert text in printed
    runs = read_results(tmp_path, unofficial=True)
    assert len(runs) == 4 * 2 * 2 + 1  # settings, seeds, splits; and the other
    records = read_records(tmp_path / "report" / "runs.csv")
    assert len(records) == 8 and all(r.test > 15 and r.val > 15 for r in records)
    heads = {r.setting: [x.heads for x in records if x.setting == r.setting] for r in records}
    assert all(len(found) == 1 for found in heads["absolute ne=1"])
    assert heads["absolute ne=1"] != heads["most_responsive ne=1"] and set(heads["LoRA"]) == {None}
    report = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "# Results on offline" in report and "structured" in report
    assert not list((tmp_path / "work").glob("*"))
