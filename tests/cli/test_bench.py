import pytest
from benchmark_runs import heads, make_run

from peft_heads.benchmark.records.results import write_result
from peft_heads.cli import bench
from peft_heads.cli.bench_report import run


@pytest.fixture
def results(tmp_path):
    masked = make_run("dtd", 0.7, method=heads(1), masks={"q": [False, True]})  # it has a figure
    for made in (make_run("cifar", 0.725), masked, make_run("dtd", 0.5, environment={"dirty": True})):
        write_result(tmp_path / "results", made.spec, made.result, made.environment)
    return str(tmp_path / "results")


def test_prints_the_tables(results, capsys):
    assert bench.run(["report", results]) == 0
    printed = capsys.readouterr().out
    assert "| lora | 72.5 | –" in printed and "| Full (HEAT, Table 1) | 68.9 |" in printed
    assert ".png" not in printed and "unofficial" not in printed
    assert run([results, "--unofficial"]) == 0
    assert "lora (unofficial)" in capsys.readouterr().out


def test_writes_the_report_and_replaces_nothing_unasked(results, tmp_path, capsys):
    target = tmp_path / "report"
    assert run([results, "--output_dir", str(target)]) == 0
    tables = {f"{name}.{kind}" for name in ("accuracy", "cost") for kind in ("csv", "tex")}
    figure = "atlas_head-masked-lora-criterion-absolute-ne-1.png"
    assert {path.name for path in target.iterdir()} == {"report.md", figure, *tables}
    printed = capsys.readouterr().out
    assert "6 files in" in printed and ".png" not in printed
    (target / "report.md").write_text("mine")
    with pytest.raises(ValueError, match="report.md already and nothing was changed; --overwrite"):
        run([results, "--output_dir", str(target)])
    assert (target / "report.md").read_text() == "mine"
    run([results, "--output_dir", str(target), "--overwrite"])
    assert (target / "report.md").read_text().startswith("# Results on vtab")


def test_nothing_to_report(results, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no results; --unofficial"):
        run([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="no results of the suite 'fgvc'"):
        run([results, "--suite", "fgvc"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run([str(tmp_path / "nowhere")])


def test_help_and_unknown_commands(capsys):
    assert bench.run([]) == 2
    assert "report" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.run(["unknown"])
