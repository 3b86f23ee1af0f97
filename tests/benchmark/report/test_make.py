import pytest
from benchmark_runs import heads, make_run

from peft_heads.benchmark.report import make_report, overlap_table
from peft_heads.benchmark.report.groups import suite_groups
from peft_heads.benchmark.report.overlap import expected_jaccard
from peft_heads.benchmark.report.rows import make_rows


GROUPS = {"cifar": "natural", "dtd": "natural", "eurosat": "specialized"}


def masks(*off):
    return {"q": [head not in off for head in range(12)]}


def few_runs():
    scores = {"q": [float(head) for head in range(12)]}
    for task, head in (("cifar", 0), ("dtd", 0), ("eurosat", 7)):
        yield make_run(task, 0.5, method=heads(0))
        yield make_run(task, 0.6, method=heads(1), masks=masks(head), scores=scores)
        yield make_run(task, 0.4, method=heads(1, "positive"), masks=masks(head), scores=scores)


def test_the_files_of_a_report():
    files = make_report(few_runs(), "vtab")
    assert set(files) == {
        "report.md",
        *(f"{name}.{kind}" for name in ("accuracy", "cost", "overlap") for kind in ("csv", "tex")),
        "accuracy_against_ne.png",
        "criterion_wins.png",
        "atlas_head-masked-lora-criterion-absolute-ne-1.png",
        "atlas_head-masked-lora-criterion-positive-ne-1.png",
    }
    for name, content in files.items():
        assert name == "report.md" or name.endswith((".csv", ".tex")) or content.startswith(b"\x89PNG")
        assert name == "report.md" or not name.endswith(".png") or f"]({name})" in files["report.md"]
    assert "mean of group means" in files["report.md"] and "HEAT, Table 4" in files["report.md"]
    assert "unofficial" not in files["report.md"]


def test_heads_of_validation_runs_show_only_where_there_are_no_test_runs():
    validated = [make_run(task, method=heads(1), split="val200", masks=masks(0)) for task in GROUPS]
    tested = [make_run(task, method=heads(1), masks=masks(0)) for task in GROUPS]
    alone, both = make_report(validated, "vtab"), make_report([*validated, *tested], "vtab")
    assert alone["overlap.csv"].count("same group") == both["overlap.csv"].count("same group") == 1


def test_few_shot_and_validation():
    runs = [make_run("food101", suite="fewshot", spec={"shots": shots, "list_seed": 0}) for shots in (1, 2)]
    runs.append(make_run("food101", suite="fewshot", split="val", spec={"shots": 1, "list_seed": 0}))
    files = make_report([*runs, *few_runs()], "fewshot")
    assert {"accuracy_by_shots.png", "validation.csv", "accuracy.tex"} <= set(files)
    assert "Published" not in files["report.md"] and "shots=2" in files["accuracy.csv"]


def test_a_suite_without_results():
    with pytest.raises(ValueError, match=r"no results of the suite 'fgvc' \(found: vtab\)"):
        make_report([make_run()], "fgvc")
    assert suite_groups("my-images", [make_run("cats", suite="my-images")]) == {"cats": "all tasks"}
    assert "cats" in make_report([make_run("cats", suite="my-images")], "my-images")["accuracy.csv"]


def test_fine_grained_tasks():
    report = make_report([make_run("nabirds", suite="fgvc")], "fgvc")["report.md"]
    assert "| RLRR (RLRR, Table 3) | 89.3 | 84.7 |" in report and "(HEAT" not in report
    assert "mean of group means |" not in report
    # no group but all tasks: none is named above the columns
    latex = make_report([make_run("nabirds", suite="fgvc")], "fgvc")["accuracy.tex"]
    assert r"\multicolumn{5}{c}{}" in latex and set(suite_groups("fgvc").values()) == {"all tasks"}


def test_unofficial_runs_are_said():
    report = make_report([make_run(), make_run("dtd", partial=True)], "vtab")["report.md"]
    assert "**1 of 2 runs are unofficial**" in report and "lora (unofficial)" in report


def test_overlap():
    table = overlap_table(make_rows(few_runs()), GROUPS, "title")
    rows = {(row.section, row.label): [row.cells[column.name].mean for column in table.columns] for row in table.rows}
    random = expected_jaccard(12, 1, 1)
    assert rows == {
        (f"head-masked-lora criterion={criterion} ne=1", kind): [pairs, observed, pytest.approx(random)]
        for criterion in ("absolute", "positive")
        for kind, pairs, observed in (("same group", 1, 1.0), ("different groups", 2, 0.0))
    }
    assert sum("p = " in note for note in table.notes) == 2
    assert overlap_table(make_rows([make_run()]), GROUPS, "title") is None
