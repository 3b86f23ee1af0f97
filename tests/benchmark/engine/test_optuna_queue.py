"""Machines that share a sweep: each has its own folder of results, and all have one storage."""

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from benchmark_runs import make_run

from peft_heads.benchmark.engine import execution
from peft_heads.benchmark.engine import optuna_queue as shared
from peft_heads.benchmark.engine.execution import Outcome, execute
from peft_heads.benchmark.engine.optuna_queue import SharedQueue, default_study_name
from peft_heads.benchmark.engine.sweep import Sweep, run_sweep
from peft_heads.benchmark.records.results import find_result, read_results, result_path, write_result
from peft_heads.benchmark.report import make_report


pytest.importorskip("optuna")

METHOD = {"name": "head-masked-lora", "r": 4, "adapter_bits": 1, "scale": [0.1, 1, 10], "ne": [0, 1]}


def sweep_of(bench, **changes):
    settings = {"tasks": bench.tasks, "seeds": (0, 1)} | changes
    return Sweep(method=METHOD, recipe=bench.recipe, backbone=bench.backbone, **settings)


def queue_of(bench, machine, **options):
    return SharedQueue(f"sqlite:///{bench.root}/sweep.db", "study", bench.root / machine, **options)


def names_of(specs, title):
    groups = {}
    for spec in specs:
        groups.setdefault(execution.trunk_key(spec), []).append(spec)
    return [shared.group_name(group, title) for group in groups.values()]


@pytest.fixture
def never_waits(monkeypatch):
    monkeypatch.setattr(shared, "POLL_SECONDS", None)  # waiting is an error then


@pytest.fixture
def made_up(monkeypatch):
    """Runs return a made-up accuracy at once; `made_up` lists `(output_dir, run_id)` in the order of the runs."""
    done = []

    def run(spec, places, *, begin_with=None, test_every=0, also=()):
        found = find_result(places.output_dir, spec, unofficial=True)
        if found is not None:
            return found, False
        time.sleep(0.02)  # the other machine's turn
        accuracy = 0.5 + 0.01 * len(str(spec.method["scale"])) + 0.1 * spec.method["ne"]
        made = make_run(spec.task, accuracy)
        done.append((str(places.output_dir), spec.run_id))
        path = write_result(places.output_dir, spec, made.result, made.environment)
        return execution.Run(spec, made.result, made.environment, path), True

    monkeypatch.setattr(execution, "run", run)
    monkeypatch.setattr(execution, "train_trunk", lambda spec, places: places.work / "trunk" / "checkpoint-1")
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(shared, "CLAIM_SECONDS", 0.05)
    return done


def results(bench, machine):
    return {run.spec.run_id: run.result.to_json() for run in read_results(bench.root / machine, unofficial=True)}


@pytest.mark.parametrize("storage", ["sqlite:///{}/sweep.db", "{}/sweep.log"])
@pytest.mark.slow
def test_two_machines(bench, made_up, storage):
    """One of them runs each group, once, and both have all results."""
    url = storage.format(bench.root)
    outcomes, queues = {}, {name: SharedQueue(url, "study", bench.root / name) for name in ("a", "b")}

    def machine(name):
        outcomes[name] = run_sweep(sweep_of(bench), bench.places(name), queue=queues[name])

    threads = [threading.Thread(target=machine, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.keys() == {"a", "b"}
    ran = [run_id for _, run_id in made_up]
    assert len(ran) == len(set(ran)) == 2 * 6 + 2 * 2 * 2
    assert {folder for folder, _ in made_up} == {str(bench.root / "a"), str(bench.root / "b")}
    assert results(bench, "a") == results(bench, "b") and len(results(bench, "a")) == 20
    alone = run_sweep(sweep_of(bench), bench.places("alone"))
    assert outcomes["a"].runs.keys() == outcomes["b"].runs.keys() == alone.runs.keys()
    assert results(bench, "alone") == results(bench, "a")
    reports = [make_report(outcome.runs.values(), "vtab") for outcome in (outcomes["a"], outcomes["b"], alone)]
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.slow
def test_a_second_machine_finds_all_done(bench, made_up):
    run_sweep(sweep_of(bench), bench.places("a"), queue=queue_of(bench, "a"))
    made_up.clear()
    outcome = run_sweep(sweep_of(bench), bench.places("b"), queue=queue_of(bench, "b"))
    assert made_up == [] and len(outcome.runs) == 20 and results(bench, "b") == results(bench, "a")


def test_a_killed_machine_goes_on(bench, made_up, monkeypatch):
    specs = sweep_of(bench).search()
    run = execution.run

    class Killed(BaseException):
        pass

    def kill(spec, *args, **kwargs):
        if len(made_up) == 3:
            raise Killed
        return run(spec, *args, **kwargs)

    monkeypatch.setattr(execution, "run", kill)
    with pytest.raises(Killed):
        execute(specs, bench.places("a"), Outcome(), title="search", queue=queue_of(bench, "a"))
    monkeypatch.setattr(execution, "run", run)
    # another machine leaves the begun group alone, and waits for it
    other, waited = queue_of(bench, "b"), []

    def back_again(seconds):
        waited.append(len(made_up))
        execute(specs, bench.places("a"), Outcome(), title="search", queue=queue_of(bench, "a"))

    waits = {0.05: lambda seconds: None, 0.07: back_again}  # after a claim, for others
    monkeypatch.setattr(shared, "POLL_SECONDS", 0.07)
    monkeypatch.setattr(shared, "time", SimpleNamespace(sleep=lambda seconds: waits[seconds](seconds)))
    outcome = Outcome()
    execute(specs, bench.places("b"), outcome, title="search", queue=other)
    assert waited == [3 + 8]  # of 12 runs in six groups, two groups of which the killed machine had begun
    assert len(outcome.runs) == 12 and results(bench, "a") == results(bench, "b")
    # the run it had finished before is not run again
    assert len([run_id for _, run_id in made_up]) == 12


def test_take_over(bench, made_up, monkeypatch):
    specs = sweep_of(bench).search()
    gone = queue_of(bench, "gone")
    names = names_of(specs, "search")
    gone.enqueue(names)
    assert gone.take(names)[1] == names[0]
    monkeypatch.setattr(shared, "POLL_SECONDS", None)  # to wait for a machine that is gone would be an error
    outcome = Outcome()
    execute(specs, bench.places("b"), outcome, title="search", queue=queue_of(bench, "b", take_over=True))
    assert len(outcome.runs) == 12


@pytest.mark.slow
def test_a_failed_run_keeps_nobody_waiting(bench, made_up, monkeypatch):
    run = execution.run

    def fail(spec, *args, **kwargs):
        if spec.method["scale"] == 10 and spec.task == "cifar":
            raise RuntimeError("no memory")
        return run(spec, *args, **kwargs)

    monkeypatch.setattr(execution, "run", fail)
    for machine in ("a", "b"):
        outcome = run_sweep(sweep_of(bench), bench.places(machine), queue=queue_of(bench, machine))
        assert list(outcome.failed.values()) == ["RuntimeError: no memory"] * 2
        assert len(outcome.runs) == 10 + 4 and len(outcome.not_chosen) == 2


def test_a_group_put_up_twice_is_run_once(bench, made_up):
    """Two machines that begin at the same time may enqueue a group twice."""
    queue = queue_of(bench, "a")
    for _ in range(2):
        queue.study.enqueue_trial({}, user_attrs={"group": "g"})
    trial, _ = queue.take(["g"])
    assert queue_of(bench, "b").take(["g"]) is None
    queue.finish(trial, [], {"x": "failed"})
    assert queue.unfinished(["g"]) == [] and queue.take(["g"]) is None


def test_a_failed_run_fails_its_group(bench, made_up):
    queue = queue_of(bench, "a")
    queue.enqueue(["g", "h"])
    for failed in ({"x": "no memory"}, {}):
        trial, _ = queue.take(["g", "h"])
        queue.finish(trial, [make_run(accuracy=0.25), make_run(accuracy=0.75, seed=1)], failed)
    states = queue.states
    assert [(x.state, x.value) for x in queue.study.trials] == [(states.FAIL, None), (states.COMPLETE, 0.5)]
    assert queue.collect(["g", "h"], bench.root / "a") == {"x": "no memory"} and len(results(bench, "a")) == 2


def test_plans_in_one_study_leave_each_other_alone(bench, made_up):
    one, other = queue_of(bench, "a"), queue_of(bench, "b")
    one.enqueue(["a1", "a2"])
    other.enqueue(["b"])
    other.finish(other.take(["b"])[0], [make_run()], {})
    assert other.take(["b"]) is None
    for group in ("a1", "a2"):
        trial, taken = one.take(["a1", "a2"])
        assert taken == group
        one.finish(trial, [make_run()], {})
    assert len(one.study.trials) == 3


@pytest.mark.slow
def test_a_plan_with_more_runs_of_a_group(bench, made_up, never_waits):
    """The runs of another plan in a group are not taken for the whole group."""
    run_sweep(sweep_of(bench, tuned=("scale", "ne")), bench.places("a"), queue=queue_of(bench, "a"))
    outcome = run_sweep(sweep_of(bench), bench.places("b"), queue=queue_of(bench, "b"))
    alone = run_sweep(sweep_of(bench), bench.places("alone"))
    assert outcome.runs.keys() == alone.runs.keys() and len(alone.runs) == 20


def test_killed_between_the_name_and_the_state(bench, made_up, monkeypatch):
    """A running trial always has a worker, who claims it again."""
    queue = queue_of(bench, "a")
    queue.enqueue(["g"])
    monkeypatch.setattr(queue, "_claim", lambda trial: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        queue.take(["g"])
    assert queue.study.trials[0].state == queue.states.RUNNING
    assert queue_of(bench, "b").take(["g"]) is None
    assert queue_of(bench, "a").take(["g"])[1] == "g"


def test_take_over_leaves_the_living_alone(bench, made_up):
    """Groups that are begun after the take-over stay with the worker who began them."""
    groups = ["g1", "g2", "g3"]
    gone, living = queue_of(bench, "gone"), queue_of(bench, "living")
    gone.enqueue(groups)
    gone.take(groups)
    queue = queue_of(bench, "c", take_over=True)
    trial, group = queue.take(groups)
    assert group == "g1"
    queue.finish(trial, [make_run()], {})
    assert living.take(groups)[1] == "g2"
    assert queue.take(groups)[1] == "g3"


def test_a_damaged_result_keeps_nobody_waiting(bench, made_up, never_waits):
    spec = sweep_of(bench).search()[0]
    path = result_path(bench.root / "a", spec)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    for machine in ("a", "b"):
        outcome = Outcome()
        specs = sweep_of(bench).search()
        execute(specs, bench.places(machine), outcome, title="search", queue=queue_of(bench, machine))
        assert list(outcome.failed) == [spec.run_id] and len(outcome.runs) == 11
    assert path.read_text() == "{"


def test_a_damaged_result_of_a_run_of_others_stays(bench, made_up):
    queue, run = queue_of(bench, "a"), make_run()
    queue.enqueue(["g"])
    queue.finish(queue.take(["g"])[0], [run], {})
    path = result_path(bench.root / "b", run.spec)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert str(path) in queue.collect(["g"], bench.root / "b")[run.spec.run_id]
    assert path.read_text() == "{"


def test_a_failure_elsewhere_of_what_is_here(bench, made_up):
    specs = sweep_of(bench).search()
    execute(specs, bench.places("b"), Outcome())
    queue = queue_of(bench, "a")
    names = names_of(specs, "search")
    queue.enqueue(names)
    for _ in names:
        queue.finish(queue.take(names)[0], [], {spec.run_id: "no memory" for spec in specs})
    outcome = Outcome()
    execute(specs, bench.places("b"), outcome, title="search", queue=queue_of(bench, "b"))
    assert len(outcome.runs) == 12 and outcome.failed == {}


def test_many_results_are_short_texts(bench, made_up):
    """MySQL limits a text to 64 KB."""
    queue = queue_of(bench, "a")
    queue.enqueue(["g"])
    layers = [f"layer.{index}" for index in range(48)]
    extras = {"masks": {x: [True] * 12 for x in layers}, "scores": {x: [0.1234567890123456] * 12 for x in layers}}
    runs = [make_run(seed=seed, **extras) for seed in range(20)]
    queue.finish(queue.take(["g"])[0], runs, {})
    assert max(len(json.dumps(value)) for value in queue.study.trials[0].user_attrs.values()) < 2**16
    queue.collect(["g"], bench.root / "b")
    assert results(bench, "b") == {run.spec.run_id: run.result.to_json() for run in runs}


def test_gives_a_sign_while_it_waits(bench, made_up, monkeypatch):
    """The processes of a machine hear from its main one while they wait for it."""
    sleeps = iter(range(8))
    monkeypatch.setattr(shared, "time", SimpleNamespace(sleep=lambda seconds: next(sleeps)))
    spec = make_run().spec
    other, failed = queue_of(bench, "b"), {}
    other.enqueue([shared.group_name([spec], "t")])
    trial, _ = other.take([shared.group_name([spec], "t")])
    turns = shared.take_turns(queue_of(bench, "a"), {"key": [spec]}, bench.root / "a", failed, "t")
    assert [next(turns), next(turns)] == [shared.WAIT] * 2
    other.finish(trial, [], {spec.run_id: "no memory"})
    assert list(turns) in ([], [shared.WAIT]) and failed == {spec.run_id: "no memory"}


@pytest.mark.slow
def test_optuna_is_not_imported_without_storage():
    code = "import sys, peft_heads.cli.bench_run, peft_heads.benchmark.engine.sweep; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names(bench):
    one, other = sweep_of(bench), sweep_of(bench, seeds=(0, 2))
    plans = [sweep.runs(sweep.methods(), sweep.seeds, final=True) for sweep in (one, one, other)]
    assert default_study_name(plans[0]) == default_study_name(plans[1][::-1]) != default_study_name(plans[2])


def test_no_such_storage(bench):
    for storage in ("nonsense://x", f"{bench.root}/no_folder/sweep.log"):
        with pytest.raises(ValueError, match=f"--storage '{storage}' cannot be used: "):
            SharedQueue(storage, "study", bench.root)


def test_without_optuna(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install 'peft-heads\[optuna\]'"):
        SharedQueue("sqlite://", "study", bench.root)


@pytest.mark.slow
def test_two_real_machines(bench):
    words = "--epochs 2 --batch_size 16 --warmup_epochs 1 --head_warmup_epochs 1 --any_size --use_cpu --seed 0"
    words += f" --task cifar eurosat --ne 0 1 --scale 1 10 --criterion absolute --data_root {bench.root}/data"
    words += f" --model_name_or_path {bench.backbone} --storage sqlite:///{bench.root}/real.db"
    command = [sys.executable, "-m", "peft_heads", "bench", "sweep", *words.split()]
    running = [
        subprocess.Popen(
            [*command, "--output_dir", str(bench.root / name), "--cache_dir", str(bench.root / "cache")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in ("a", "b")
    ]
    outputs = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert results(bench, "a") == results(bench, "b") and len(results(bench, "a")) == 8 + 4
    assert json.dumps(outputs[0][0].splitlines()[:4]) == json.dumps(outputs[1][0].splitlines()[:4])
