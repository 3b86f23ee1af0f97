"""The runs of a sweep, the choice by validation images, and what is left when a sweep is killed or runs fail."""

import random
from dataclasses import replace

import filelock
import pytest
from benchmark_runs import make_run

from peft_heads.benchmark.engine import execution
from peft_heads.benchmark.engine import trunk as trunk_module
from peft_heads.benchmark.engine.execution import Outcome, execute
from peft_heads.benchmark.engine.sweep import Sweep, run_sweep
from peft_heads.benchmark.engine.training import Training
from peft_heads.benchmark.records.plans import read_plans, unfinished_choices
from peft_heads.benchmark.records.results import find_result, read_results, write_result
from peft_heads.benchmark.records.run_record import Run, RunResult
from peft_heads.benchmark.report import make_report


HEADS = {"name": "head-masked-lora", "r": 4, "adapter_bits": 1, "scale": [0.1, 10]}
GRID = HEADS | {"ne": [0, 1, 3], "criterion": ["absolute", "negative"]}


def sweep_of(bench, method=GRID, **changes):
    settings = {"tasks": bench.tasks[:1], "seeds": (0,)} | changes
    return Sweep(method=method, recipe=bench.recipe, backbone=bench.backbone, **settings)


def plain(run):
    return {name: value for name, value in run.result.to_json().items() if name != "seconds"}


def table(folder):
    """Return the report without times, which differ between any two sweeps."""
    report = make_report(read_results(folder, unofficial=True), "vtab")["report.md"]
    return report[: report.index("what it cost")]


def test_combinations(bench):
    sweep = sweep_of(bench)
    # with ne=0 the criterion makes no difference
    assert len(sweep.methods()) == 2 * (1 + 2 * 2)
    assert [len(candidates) for _, candidates in sweep.variants()] == [2] * 5
    assert all("scale" not in row for row, _ in sweep.variants())
    search = sweep.search()
    assert len(search) == 10 and {(s.train_split, s.eval_split, s.seed) for s in search} == {("train800", "val200", 0)}
    assert len({spec.run_id for spec in search}) == 10
    assert sweep_of(bench, {"name": "linear"}).search() == []
    few_shot = sweep_of(bench, tuned=("scale", "ne"), search_seeds=(4, 5))
    assert [len(candidates) for _, candidates in few_shot.variants()] == [2, 4, 4]
    assert {spec.seed for spec in few_shot.search()} == {4, 5}


def result(spec, accuracy):
    return Run(
        spec,
        RunResult(
            accuracy=accuracy,
            epoch_losses=[1.0],
            seconds=1.0,
            peak_memory_bytes=None,
            trained_parameters=1,
            adapter_bytes=1,
            head_bytes=1,
            masks={},
        ),
        None,
    )


def test_choice_by_validation(bench):
    """The best scale of each variant and task is chosen only by its mean over the search's seeds."""
    sweep = sweep_of(bench, tasks=bench.tasks, seeds=(7, 8), search_seeds=(0, 1))
    accuracies = {  # of cifar; 10 has the best single run, 0.1 the better mean
        (0.1, 0): 0.6,
        (0.1, 1): 0.6,
        (10, 0): 0.9,
        (10, 1): 0.2,
    }

    def results(spec):
        assert spec.eval_split == "val200"
        scale = spec.method["scale"]
        if spec.task == "eurosat":
            return result(spec, 0.5 if spec.method["ne"] != 3 else scale / 100)  # equal: the first
        return result(spec, accuracies[scale, spec.seed])

    final = sweep.final(results)
    assert len(final) == 2 * 5 * 2
    assert {(s.train_split, s.eval_split) for s in final} == {("train800val200", "test")}
    assert {spec.seed for spec in final} == {7, 8}
    for spec in final:
        expected = 10 if spec.task == "eurosat" and spec.method["ne"] == 3 else 0.1
        assert spec.method["scale"] == expected

    # while a candidate is unfinished, nothing is chosen: the row is not run on this task
    def lacking(spec):
        lost = spec.method.to_json() == HEADS | {"ne": 0, "scale": 0.1} and spec.task == "cifar" and spec.seed == 1
        return None if lost else results(spec)

    assert [spec for spec in final if (spec.task, spec.method["ne"]) != ("cifar", 0)] == sweep.final(lacking)
    assert sweep.final(lambda spec: None) == []
    choices = sweep.choices()
    assert len(choices) == 2 * 5 and all(len(choice.runs) == 4 for choice in choices)
    finished = {spec.run_id for spec in sweep.search() if lacking(spec)}
    notes, partly = unfinished_choices(choices, finished)
    assert notes == [
        "head-masked-lora adapter_bits=1 ne=0 r=4 on cifar: nothing is chosen, and nothing run on test: 1 of 4 runs on "
        "val200 are not finished (scale=0.1)"
    ]
    assert len(partly) == 3 and partly < finished
    assert unfinished_choices(choices, {spec.run_id for spec in sweep.search()}) == ([], set())


def test_few_shot_lists(bench):
    from peft_heads.data.tasks import find_task

    sweep = Sweep(
        (find_task("food101", "fewshot"),),
        {"name": "lora", "r": 4, "scale": [1, 10]},
        replace(bench.recipe, name="fewshot"),
        bench.backbone,
        seeds=(0,),
        shots=(1, 4),
        list_seeds=(0, 1, 2),
    )
    search = sweep.search()
    assert len(search) == 2 * 3 * 2 and {(s.shots, s.list_seed) for s in search} == {
        (shots, seed) for shots in (1, 4) for seed in (0, 1, 2)
    }
    final = sweep.final(lambda spec: result(spec, spec.method["scale"] / 10 if spec.shots == 1 else 0.5))
    assert {(spec.shots, spec.method["scale"]) for spec in final} == {(1, 10), (4, 1)}
    assert {spec.train_split for spec in final} == {"train"}


@pytest.mark.slow
def test_shared_warmup_changes_nothing(bench):
    method = GRID | {"ne": [0, 1], "scale": [0.1, 10]}
    trained = {}
    for share in (True, False):
        sweep = sweep_of(bench, method)
        outcome = run_sweep(sweep, bench.places(f"share-{share}"), share_warmup=share)
        assert not outcome.failed and len(outcome.runs) == 6 + 3
        trained[share] = outcome.runs
    assert trained[True].keys() == trained[False].keys()
    for run_id, run in trained[True].items():
        assert plain(run) == plain(trained[False][run_id])
    assert table(bench.root / "share-True") == table(bench.root / "share-False")
    assert not list((bench.root / "share-True" / "work").iterdir())


@pytest.mark.slow
def test_shared_warmup_is_trained_once(bench, monkeypatch):
    trunks = []
    original = execution.train_trunk
    monkeypatch.setattr(execution, "train_trunk", lambda spec, places: trunks.append(spec) or original(spec, places))
    sweep = sweep_of(bench, GRID | {"ne": [0, 1], "criterion": "front"})
    outcome = Outcome()
    execute(sweep.search(), bench.places("out"), outcome)
    assert len(trunks) == 2 and {spec.method["scale"] for spec in trunks} == {0.1, 10}
    assert all(spec.method["ne"] == 1 for spec in trunks)
    execute(sweep.search(), bench.places("out"), outcome)
    assert len(trunks) == 2
    # a single run has nothing to share
    execute(sweep_of(bench, GRID | {"ne": 3, "criterion": "front", "scale": 5}).runs(
        [HEADS | {"ne": 3, "scale": 5}], (0,), final=False), bench.places("out"), outcome)  # fmt: skip
    assert len(trunks) == 2


@pytest.mark.slow
def test_runs_of_one_training_are_trained_once(bench, monkeypatch):
    trunks, trained = [], []
    original, trunk = Training.trainer, execution.train_trunk
    monkeypatch.setattr(Training, "trainer", lambda self, *args: trained.append(self.spec) or original(self, *args))
    monkeypatch.setattr(execution, "train_trunk", lambda spec, places: trunks.append(spec) or trunk(spec, places))
    tests = sweep_of(bench).runs([HEADS | {"scale": 1, "ne": ne} for ne in (1, 3)], (0,), final=True)
    specs = [twin for spec in tests for twin in (spec, replace(spec, eval_split="val200"))]
    bars = []
    execute(
        specs[:2], bench.places("out"), Outcome(), progress=lambda count, title: bars.append(Bar(count)) or bars[0]
    )
    # one variant: nothing is shared with others, and nothing trained twice
    assert (len(trunks), len(trained), bars[0].count, bars[0].updates) == (0, 1, 2, 2)
    execute(specs, bench.places("out"), outcome := Outcome())
    assert (len(trunks), len(trained)) == (0, 2) and len(outcome.runs) == 4
    # only the lost result is made again
    outcome.runs[specs[1].run_id].path.unlink()
    execute(specs, bench.places("out"), again := Outcome())
    assert len(trained) == 3 and {k: plain(run) for k, run in again.runs.items()} == {
        k: plain(run) for k, run in outcome.runs.items()
    }


@pytest.mark.slow
def test_the_rest_of_a_training_is_trained_together(bench, monkeypatch):
    trained = []
    original = Training.trainer
    monkeypatch.setattr(Training, "trainer", lambda self, *args: trained.append(self.spec) or original(self, *args))
    (test,) = sweep_of(bench).runs([HEADS | {"scale": 1, "ne": 1}], (0,), final=True)
    specs = [test, replace(test, eval_split="val200"), replace(test, eval_split="train800")]
    execute(specs[:1], bench.places("out"), Outcome())
    execute(specs, bench.places("out"), outcome := Outcome())
    assert trained == [specs[0], specs[1]] and len(outcome.runs) == 3
    # evaluated in between, each has a best epoch of its own
    execute(specs[:2], bench.places("between"), between := Outcome(), test_every=2)
    assert len(trained) == 4 and between.runs[test.run_id].result.best_on_test is not None


def test_a_failed_run_is_not_tried_again_in_passing(bench, monkeypatch):
    (test,) = sweep_of(bench).runs([HEADS | {"scale": 1, "ne": 1}], (0,), final=True)
    twin, original, failures = replace(test, eval_split="val200"), Training.accuracy, []

    def accuracy(self, trainer):
        if self.spec == test and not failures:
            failures.append(self)
            raise RuntimeError("out of memory")
        return original(self, trainer)

    monkeypatch.setattr(Training, "accuracy", accuracy)
    execute([test, twin], bench.places("out"), outcome := Outcome())
    assert list(outcome.runs) == [twin.run_id] and list(outcome.failed) == [test.run_id]
    assert [run.spec for run in read_results(bench.root / "out", unofficial=True)] == [twin]


class Bar:
    def __init__(self, count):
        self.count, self.updates = count, 0

    def update(self):
        self.updates += 1

    def close(self):
        pass


class Killed(BaseException):
    """A kill. It is not an error of a run, which a sweep would survive."""


@pytest.mark.slow
def test_killed_at_random(bench, monkeypatch):
    """A sweep that is killed at any point and started again ends with the same report."""
    method = HEADS | {"ne": [0, 1], "criterion": "absolute"}
    whole = run_sweep(sweep_of(bench, method), bench.places("whole"))
    from transformers import TrainerCallback

    from peft_heads.benchmark.engine.training import Training

    countdown, chance = [0], random.Random(0)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed

    original = Training.trainer

    def trainer(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        made.add_callback(Kill())
        return made

    monkeypatch.setattr(Training, "trainer", trainer)
    kills = 0
    while True:
        countdown[0] = chance.randint(3, 25)
        try:
            outcome = run_sweep(sweep_of(bench, method), bench.places("killed"))
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert outcome.runs.keys() == whole.runs.keys()
    assert all(plain(outcome.runs[run_id]) == plain(run) for run_id, run in whole.runs.items())
    assert table(bench.root / "killed") == table(bench.root / "whole")


@pytest.mark.slow
def test_failed_runs_do_not_stop_the_others(bench, monkeypatch, caplog):
    original = execution.run
    fails = [True]

    def run(spec, *args, **kwargs):
        if fails[0] and spec.method["scale"] == 10 and spec.method["ne"] == 1:
            raise RuntimeError("no\nmemory")
        return original(spec, *args, **kwargs)

    monkeypatch.setattr(execution, "run", run)
    sweep = sweep_of(bench, HEADS | {"ne": [0, 1]})
    outcome = run_sweep(sweep, bench.places("out"))
    assert list(outcome.failed.values()) == ["RuntimeError: no memory"] and len(outcome.runs) == 3 + 1
    assert len(outcome.not_chosen) == 1
    path = bench.root / "out" / "failed" / f"{next(iter(outcome.failed))}.txt"
    assert "RuntimeError" in path.read_text() and "no memory" in caplog.text
    fails[0] = False
    again = run_sweep(sweep, bench.places("out"))
    assert not again.failed and not path.exists() and len(again.runs) == 6


@pytest.mark.slow
def test_progress_counts_what_is_left(bench):
    made = []

    class Bar:
        def __init__(self, total, title):
            self.total, self.title, self.done = total, title, 0
            made.append(self)

        def update(self):
            self.done += 1

        def close(self):
            pass

    sweep = sweep_of(bench, HEADS | {"ne": 1})
    execute(sweep.search()[:1], bench.places("out"), Outcome())
    run_sweep(sweep, bench.places("out"), progress=Bar)
    assert [(bar.title, bar.total, bar.done) for bar in made] == [("search", 1, 1), ("report", 1, 1)]


def test_equally_good_settings_are_chosen_as_in_the_report(bench):
    sweep = sweep_of(bench, HEADS | {"scale": [10, 1], "ne": 1})
    (chosen,) = sweep.final(lambda spec: result(spec, 0.5))
    assert chosen.method["scale"] == 1


@pytest.mark.slow
def test_a_damaged_result_stops_nothing(bench):
    sweep = sweep_of(bench, HEADS | {"ne": 1})
    run_sweep(sweep, bench.places("out"))
    path = next(path for path in (bench.root / "out").rglob("*val200*.json"))
    path.write_text(path.read_text()[:100])
    outcome = run_sweep(sweep, bench.places("out"))
    assert len(outcome.failed) == 1 and str(path) in next(iter(outcome.failed.values())) and len(outcome.runs) == 1


def busy(spec, places):
    """Hold the lock that another process would hold while it trains this run."""
    places.work.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(places.work / f".{spec.run_id}.lock")


@pytest.mark.slow
def test_a_refused_run_changes_no_choice(bench):
    """A run that one sweep is training can be neither trained nor left out by another in the same folder."""
    sweep, places = sweep_of(bench, HEADS | {"ne": [0, 1]}), bench.places("out")
    refused = next(spec for spec in sweep.search() if spec.method["ne"] == 0)
    with busy(refused, places):
        outcome = run_sweep(sweep, places)
    assert list(outcome.failed) == [refused.run_id] and "by another process" in outcome.failed[refused.run_id]
    assert [run.spec.method["ne"] for run in outcome.runs.values() if is_test(run)] == [1]
    (note,) = outcome.not_chosen
    assert "ne=0 r=4 on cifar: nothing is chosen" in note
    assert f"- {note}" in make_report(outcome.runs.values(), "vtab", sweep.choices())["report.md"]
    again = run_sweep(sweep, places)
    assert not again.failed and not again.not_chosen and len(again.runs) == 6
    assert sorted(run.spec.method["ne"] for run in again.runs.values() if is_test(run)) == [0, 1]
    # the folder remembers what was to be compared: with the best candidate lost, the report chooses no other
    whole = make_report(read_results(bench.root / "out", unofficial=True), "vtab", sweep.choices())["report.md"]
    again.runs[refused.run_id].path.unlink()
    runs, plans = read_results(bench.root / "out", unofficial=True), read_plans(bench.root / "out")
    assert plans == sweep.choices()
    assert "as not all candidates are finished on val200: cifar" in make_report(runs, "vtab", plans)["report.md"]
    assert "not all candidates" not in whole


def is_test(run):
    return run.spec.eval_split == "test"


@pytest.mark.slow
def test_what_another_sweep_has_finished_meanwhile_counts(bench, monkeypatch):
    sweep, places = sweep_of(bench, HEADS | {"ne": 1}), bench.places("out")
    original, first = execution.run, sweep.search()[0]
    tries = []

    def run(spec, *args, **kwargs):
        if spec == first and not tries:
            tries.append(spec)
            original(spec, *args, **kwargs)  # the other one
            raise ValueError("is being trained by another process")
        return original(spec, *args, **kwargs)

    monkeypatch.setattr(execution, "run", run)
    outcome = run_sweep(sweep, places)
    assert not outcome.failed and not outcome.not_chosen and len(outcome.runs) == 3


@pytest.fixture
def made_up(monkeypatch):
    """Runs return a made-up result at once."""

    def run(spec, places, **kwargs):
        found = find_result(places.output_dir, spec, unofficial=True)
        if found is not None:
            return found, False
        made = make_run(spec.task, 0.5 + spec.method["scale"] / 100)
        path = write_result(places.output_dir, spec, made.result, made.environment)
        return Run(spec, made.result, made.environment, path), True

    def train_trunk(spec, places):
        folder = trunk_module.trunk_folder(spec, places)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "checkpoint-2"

    monkeypatch.setattr(execution, "run", run)
    monkeypatch.setattr(execution, "train_trunk", train_trunk)


def test_sweeps_of_other_values_in_one_folder(bench, made_up):
    """Each sweep chooses among its own candidates; a report on the folder chooses among all."""
    places = bench.places("out")
    first = run_sweep(sweep_of(bench, HEADS | {"ne": 1, "scale": [0.1, 10]}), places)
    second = run_sweep(sweep_of(bench, HEADS | {"ne": 1, "scale": [0.1, 1]}), places)
    alone = run_sweep(sweep_of(bench, HEADS | {"ne": 1, "scale": [0.1, 1]}), bench.places("alone"))
    assert second.runs.keys() == alone.runs.keys()
    both = make_report(read_results(bench.root / "out", unofficial=True), "vtab")["report.md"]
    assert (
        "chosen from 3 variants" in both
        and "chosen from 2 variants" in (make_report(first.runs.values(), "vtab")["report.md"])
    )


def trunk_names(folder):
    return sorted(path.name for path in folder.glob("*trunk-*")) if folder.exists() else []


def test_trunks_of_killed_sweeps_are_cleared(bench, made_up, monkeypatch):
    sweep, places = sweep_of(bench, HEADS | {"ne": [0, 1]}), bench.places("out")
    (places.work / "trunk-cifar-seed9-0123456789" / "checkpoint-2").mkdir(parents=True)
    original, seen = execution.train_trunk, []

    def killed(spec, places):
        original(spec, places)
        raise Killed

    monkeypatch.setattr(execution, "train_trunk", killed)
    with pytest.raises(Killed):
        run_sweep(sweep, places)
    # the one of another plan is gone; of this plan one was begun
    kept = [name for name in trunk_names(places.work) if not name.startswith(".")]
    assert len(kept) == 1 and kept != ["trunk-cifar-seed9-0123456789"]
    monkeypatch.setattr(
        execution, "train_trunk", lambda *args: seen.append(trunk_names(places.work)) or original(*args)
    )
    # a sweep of another plan does not need it; one of the same plan does
    other = sweep_of(bench, HEADS | {"ne": 1, "scale": 5})
    run_sweep(sweep, places)
    assert kept[0] in seen[0] and trunk_names(places.work) == []
    (places.work / kept[0]).mkdir()
    run_sweep(other, places)
    assert trunk_names(places.work) == []


def test_trunks_that_are_in_use_stay(bench):
    """Trunks stay if runs of another process start from them, or if a process is training them."""
    sweep, places = sweep_of(bench, HEADS | {"ne": [0, 1]}), bench.places("out")
    for spec in sweep.search():
        trunk_module.trunk_folder(spec, places).mkdir(parents=True, exist_ok=True)
    spec, *_ = specs = sweep.search()
    with trunk_module.held_trunk(spec, places), busy_trunk(specs[-1], places):
        trunk_module.clear_trunks(places)
        names = {trunk_module.trunk_folder(s, places).name for s in (spec, specs[-1])}
        assert len(names) == 2 and names == {path.name for path in places.work.glob("trunk-*")}
        with pytest.raises(ValueError, match="by another process"), trunk_module.held_trunk(spec, places):
            pass
    trunk_module.clear_trunks(places, needed=specs[-1:])
    assert [path.name for path in places.work.glob("trunk-*")] == [trunk_module.trunk_folder(specs[-1], places).name]
    trunk_module.clear_trunks(places)
    assert list(places.work.iterdir()) == []


def busy_trunk(spec, places):
    return filelock.FileLock(places.work / f".{trunk_module.trunk_folder(spec, places).name}.lock")
