"""The settings of the offline suite, and the evidence computed from its results."""

import numpy as np
import pytest
from benchmark_runs import make_run
from scipy import stats

from peft_heads.benchmark.engine.trunk import training_key, trunk_epochs
from peft_heads.benchmark.offline import evidence, evidence_plots, evidence_tables, settings
from peft_heads.benchmark.offline.evidence import Record


TASKS = [task.name for task in settings.OFFLINE_TASKS]
SEEDS = range(3)


def records_of(settings, accuracy, tasks=TASKS, seeds=SEEDS):
    """Make records; `accuracy(setting, task, seed)` returns (val, test)."""
    return [Record(s, t, k, *accuracy(s, t, k)) for s in settings for t in tasks for k in seeds]


def test_settings():
    everything = settings.offline_settings()
    assert len(settings.CORE) == 23 and len(settings.SIDE) == 15 and len(everything) == 38
    assert [settings.setting_name(method) for method in everything.values()] == list(everything)
    assert settings.setting_name({"name": "lora", "r": 9}) == "lora r=9"
    assert set(settings.offline_settings(core=True)) == set(settings.CORE)
    compared = {setting for *_, first, second in evidence_tables.comparisons() for setting in (*first, *second)}
    assert compared == set(everything)


def test_specs():
    specs = settings.offline_specs(settings.CORE.values(), seeds=(3, 4))
    assert len(specs) == 23 * 6 * 2 * 2
    assert [spec.seed for spec in specs] == sorted(spec.seed for spec in specs)
    for test, validation in zip(specs[::2], specs[1::2], strict=True):
        assert (test.eval_split, validation.eval_split) == ("test", "val")
        assert training_key(test) == training_key(validation)
    rates = {spec.method.name: spec.recipe["learning_rate"] for spec in specs}
    assert rates == {"linear": 1e-2, "full": 1e-3, "lora": 1e-2, "head-masked-lora": 1e-2}
    # results do not depend on where the package is installed
    assert {spec.backbone for spec in specs} == {"peft_heads/vit_strokes"}
    masked = [spec for spec in specs if spec.method.name == "head-masked-lora"]
    assert {trunk_epochs(spec) for spec in masked} == {2}


def test_records_of_runs():
    def pair(method, **more):
        settings = {name: value for name, value in method.items() if name != "name"}
        return [
            make_run("count", x, 2, suite="offline", split=split, method=(method["name"], settings), **more)
            for split, x in (("val", 0.5), ("test", 0.25))
        ]

    masks = {"a.q": [True, False, True], "a.v": [True, False, True]}
    scores = {"a.q": [1.0, 0.5, 2.0], "a.v": [1.0, 0.0, 0.125]}
    runs = pair(settings.CORE["absolute ne=1"], masks=masks, scores=scores) + pair(settings.LORA)
    runs += pair(settings.SIDE["absolute ne=1, per layer"], masks=masks | {"a.v": [False, True, True]}, scores=scores)
    runs += pair(settings.CORE["front ne=1"])[:1]  # not on test
    records = evidence.make_records(runs)
    assert records == [
        Record("absolute ne=1", "count", 2, 50.0, 25.0, (1,), (2.0, 0.5, 2.125)),
        Record("LoRA", "count", 2, 50.0, 25.0),
        Record("absolute ne=1, per layer", "count", 2, 50.0, 25.0, None, (2.0, 0.5, 2.125)),
    ]
    # no heads are reported for layers that choose separately, even if all chose the same
    alike = pair(settings.SIDE["absolute ne=1, per layer"], masks=masks)
    assert evidence.make_records(alike)[0].heads is None
    with pytest.raises(ValueError, match="LoRA count 2, val: two runs that differ in recipe or backbone"):
        evidence.make_records([*pair(settings.LORA), *pair(settings.LORA, spec={"epochs": 3})])


def test_records_on_disk(tmp_path):
    records = [
        Record("LoRA", "count", 0, 12.5, 99.95),
        Record("absolute ne=1, per layer", "count", 1, 12.5, 0.0, None, (0.1234, 2e-9)),
        Record("absolute ne=3", "count", 1, 12.5, 0.0, (0, 11), (1.0, 2.0)),
        Record("positive ne=1", "count", 1, 12.5, 0.0, ()),
    ]
    path = tmp_path / "runs.csv"
    path.write_text(evidence.write_records(reversed(records)), encoding="utf-8")
    assert evidence.read_records(path) == records
    for text in ("setting,task\nLoRA,count\n", "", path.read_text() + "LoRA,count,0,x,1,,\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"runs.csv is no table of runs"):
            evidence.read_records(path)


def noisy(tasks, seeds, by_task=0.0):
    """Make LoRA, and full fine-tuning that is a point better, plus `by_task` more for each task."""
    draw = np.random.default_rng(0)
    noise = {(t, k): draw.normal() for t in tasks for k in seeds}
    gain = {t: 1 + i * by_task for i, t in enumerate(tasks)}
    records = records_of(["LoRA"], lambda s, t, k: (0, 70 + 10 * noise[t, k]), tasks, seeds)
    records += records_of(
        ["full"], lambda s, t, k: (0, 70 + gain[t] + 10 * noise[t, k] + 0.1 * draw.normal()), tasks, seeds
    )
    return [evidence.accuracies(records, [name]) for name in ("full", "LoRA")]


def test_difference_of_one_task_is_a_paired_t_test():
    full, lora = noisy(["count"], range(8))
    found = evidence.difference(full, lora)
    test = stats.ttest_rel([full[key] for key in sorted(full)], [lora[key] for key in sorted(full)])
    expected = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.pairs == 8 and found.is_clear and (found.tasks_low, found.tasks_high) == (None, None)
    assert not evidence.difference(lora, lora).is_clear


def test_difference_over_tasks():
    full, lora = noisy(TASKS, range(5), by_task=0.5)
    found = evidence.difference(full, lora)
    assert found.pairs == 30 and found.mean == pytest.approx(1 + 0.5 * 2.5, abs=0.05)
    # other seeds: the tasks differ by much, but these are the tasks
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 24) * 0.1 / 30**0.5, rel=0.5)
    means = [np.mean([full[t, k] - lora[t, k] for k in range(5)]) for t in TASKS]
    expected = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.tasks_low, found.tasks_high) == pytest.approx((expected.low, expected.high))
    assert list(found.by_task.values()) == pytest.approx(
        [dict(zip(TASKS, means, strict=True))[t] for t in sorted(TASKS)]
    )
    for seed in (0, 1, 2):  # every task counts the same, whatever its number of seeds
        del full["count", seed]
    fewer = evidence.difference(full, lora)
    assert fewer.pairs == 27 and fewer.mean == pytest.approx(found.mean, abs=0.05)
    del full["count", 3]
    assert evidence.difference(full, lora) is None  # of one seed there is no variance
    assert evidence.difference({}, lora) is None


def test_accuracies_need_every_setting():
    records = [Record("a", "count", 0, 1, 2), Record("b", "count", 0, 3, 6), Record("a", "count", 1, 5, 8)]
    assert evidence.accuracies(records, ["a", "b"]) == {("count", 0): 4}
    assert evidence.accuracies(records, ["a"], "val") == {("count", 0): 1, ("count", 1): 5}


def test_best_of_is_chosen_on_validation_or_test():
    accuracy = {"a": (50, 60), "b": (52, 58), "c": (52, 70)}
    records = records_of("abc", lambda s, t, k: accuracy[s], tasks=["count"], seeds=[0])
    assert evidence.best_of(records, ["a", "b", "c"], "val") == {("count", 0): 58}  # the first of equals
    assert evidence.best_of(records, ["a", "b", "c"], "test") == {("count", 0): 70}


def test_early_scores():
    late, early = "absolute ne=1, scored after 10 epochs", "absolute ne=1"
    records = [
        Record(late, "count", 0, 0, 0, (0,), (1.0, 2.0, 3.0, 4.0)),
        Record(early, "count", 0, 0, 0, (0,), (10.0, 20.0, 40.0, 30.0)),
        Record(late, "count", 1, 0, 0, (3,), (4.0, 3.0, 2.0, 1.0)),
        Record(early, "count", 1, 0, 0, (0,), (0.0, 0.0, 0.0, 0.0)),  # says nothing about an order
        Record(early, "count", 2, 0, 0, (0,), (1.0, 2.0, 3.0, 4.0)),
    ]
    assert evidence.rank_correlations(records, early, late) == {("count", 0): pytest.approx(0.8)}
    assert evidence.agreement(records, early, late) == {("count", 0): 1.0, ("count", 1): 0.0}


def test_tables():
    better = {"absolute ne=1": 1.0, "LoRA": 0.5, "full": 5.0}
    draw = np.random.default_rng(0)
    records = records_of(
        settings.offline_settings(), lambda s, t, k: (50.0, 70 + better.get(s, 0) + 0.01 * draw.normal())
    )
    heads = {"count": (0,), "location": (0,), "orientation": (0,), "distance": (0,), "digits": (7,), "textures": (7,)}
    records = [
        Record(r.setting, r.task, r.seed, r.val, r.test, heads[r.task], tuple(range(12)))
        if "absolute" in r.setting
        else r
        for r in records
    ]
    tables = evidence_tables.evidence_tables(records)
    assert set(tables) == {"settings", "comparisons", "choice", "early", "heads"}
    rows = {(row.section, row.label): row.cells for row in tables["comparisons"].rows}
    gain = rows["Does masking the least responsive heads cost less? ne=1", "absolute − random *"]
    assert gain["difference"].mean == pytest.approx(1, abs=0.02) and gain["from"].mean > 0.9
    assert gain["pairs"].mean == 18 and gain["count"].mean == pytest.approx(1, abs=0.05)
    assert rows["Do the criteria differ? ne=1", "negative − absolute *"]["to"].mean < -0.9
    choice = {(row.section, row.label): row.cells["difference"].mean for row in tables["choice"].rows}
    assert choice["best of six, chosen on test", "Taylor − random"] == pytest.approx(1, abs=0.05)
    assert choice["best of six, chosen on val", "Taylor − mean of its six"] == pytest.approx(5 / 6, abs=0.05)
    early = tables["early"].rows[0].cells
    assert early["same head"].mean == early["same from"].mean == 1 and early["rank correlation"].mean == 1
    overlap = {(row.label, row.section): row.cells["overlap"].mean for row in tables["heads"].rows}
    assert overlap["same group", "absolute ne=1"] == 1 and overlap["different groups", "absolute ne=1"] == 0
    assert "by chance" not in tables["comparisons"].notes[1] and "of 52" in tables["comparisons"].notes[1]
    means = {row.label: row.cells["mean"].mean for row in tables["settings"].rows}
    assert means["full"] == pytest.approx(75, abs=0.05)
    figure = evidence_plots.plot_differences(tables["comparisons"], ["Do the criteria differ?"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Do the criteria differ? ne=1",
        "Do the criteria differ? ne=3",
    ]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == 4 and labels[0].startswith("positive − absolute")
    bar = figure.axes[0].containers[0].lines[0].get_xdata()[0]
    assert bar == rows["Do the criteria differ? ne=1", labels[0]]["difference"].mean
    assert len(evidence_plots.plot_differences(tables["choice"]).axes) == 2
    with pytest.raises(ValueError, match="there are no rows of Why; sections: Does masking"):
        evidence_plots.plot_differences(tables["comparisons"], ["Why"])
    # a mean over only some of the tasks is not reported
    part = evidence_tables.setting_table([r for r in records if r.task != "count"])
    assert {row.cells["mean"].mean for row in part.rows} == {None}
    assert evidence_tables.evidence_tables([]) == {}
    alone = evidence_tables.evidence_tables([r for r in records if r.seed == 0 and r.task == "count"])
    assert set(alone) == {"settings", "early"}
    assert alone["early"].rows[0].texts(alone["early"].columns) == ["1.00", "–", "–", "1.00", "–", "–", "1"]
