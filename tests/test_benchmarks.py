"""The benchmark scripts run and print what they should; no test checks a time."""

import importlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from scipy.stats import binom
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from peft_heads import HeadMaskedLoraConfig
from peft_heads.heads import resolve_heads


ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NUMBER = r"-?\d+\.\d+"
# what each script must print in its short form
PRINTED = {
    "step_time": [
        f"memory beyond the model, head-masked / stock LoRA: {NUMBER}",
        f"memory in all, head-masked / floor: {NUMBER}",
        f"step, head-masked / stock LoRA: {NUMBER}",
        f"step, head-masked / floor: {NUMBER}",
    ],
    "step_time_1_bit": ["adapter_bits=1", f"step, head-masked / stock LoRA: {NUMBER}"],
    "step_time_scaled": ["scale=0.5", f"step, head-masked / stock LoRA: {NUMBER}"],
    "rlrr_cost": [
        f"step, RLRR / LoRA q, v: {NUMBER}.*; memory {NUMBER}",
        f"step, RLRR r=8 / floor: {NUMBER}",
        f"step, LoRA all layers / LoRA q, v: {NUMBER}",
        r"SSF .* trained, \d+\.\d MiB of memory",
    ],
    "scoring_cost": [f"step, with scoring / without: {NUMBER}", f"selection, beside the steps: {NUMBER} s"],
    "epoch_time": [
        r"differs by 0\.0e\+00",
        f"first epoch, plain / ours: {NUMBER}",
        f"later epochs, plain / ours: {NUMBER}",
        f"reading takes {NUMBER}% of a plain epoch",
    ],
    "epoch_time_500_pixels": [f"later epochs, plain / ours: {NUMBER}"],
    "pruned_inference": [
        f"unmerged / merged: {NUMBER}",
        f"merged / pruned: {NUMBER} .*; by arithmetic 1\\.121, of which {NUMBER}%",
    ],
    "pruned_to_half": [f"merged / pruned: {NUMBER} .*; by arithmetic 1\\.\\d+, of which {NUMBER}%"],
    "pruned_to_half_batch_1": [f"merged / pruned: {NUMBER} .*; by arithmetic 1\\.\\d+, of which {NUMBER}%"],
    "load_time": [
        f"import, peft_heads / peft: {NUMBER}",
        f"load, head-masked / stock LoRA: {NUMBER}",
        f"switch, the same, packed / stock LoRA: {NUMBER}",
    ],
    "adapter_size": ["stock LoRA, r=8: 1,18"],
    "sweep_cost": [
        r"saves 18 of 33 epochs .*could reach 2\.200",
        rf"\(c\).*\n +/ sweep: {NUMBER}",
        f"decoded anew / from the cache: {NUMBER}",
    ],
    "gpu_suite": [
        rf"cifar .* s +train +\d+ images/s, +{NUMBER}% of the peak .* accuracy",
        "2 of 19 tasks: .* min",
        "not judged",
    ],
}
TARGETS = {  # number of targets that it judges
    "step_time": 2,
    "step_time_1_bit": 1,
    "scoring_cost": 1,
    "epoch_time": 1,
    "epoch_time_500_pixels": 1,
    "pruned_inference": 2,
    "pruned_to_half": 1,
    "pruned_to_half_batch_1": 1,
}


@pytest.fixture
def script(monkeypatch):
    """Import a script, with its folder on the path as when it runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_script(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "run_all.py"), "--quick", "--device", "cpu", "--only", name]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = (tmp_path / f"{name}.txt").read_text("utf-8")
    for pattern in PRINTED[name]:
        assert re.search(pattern, printed), (pattern, printed)
    rows = [line for line in (tmp_path / "targets.md").read_text("utf-8").splitlines() if line.endswith(" |")]
    assert len(rows) == 1 + TARGETS.get(name, 0), rows
    assert (tmp_path / "machine.json").exists()


def test_every_script_is_run(script):
    """The one command runs every script, and so does the test above."""
    run_all = script("run_all")
    assert set(PRINTED) == set(run_all.RUNS)
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"run_all", "measure", "random_vit", "two_trees"}
    assert {run.script for run in run_all.RUNS.values()} == scripts
    output = Path("out")
    assert run_all.RUNS["gpu_suite"].command("cpu", output) is None
    assert run_all.RUNS["load_time"].command("cuda", output) is None
    assert run_all.RUNS["load_time"].commands("cuda", output) == []
    assert run_all.RUNS["epoch_time"].command("cuda", output) == [
        "python",
        "benchmarks/epoch_time.py",
        *("--device", "cuda", "--num_workers", "8"),
    ]


@pytest.mark.slow
def test_two_trees():
    """A tree is compared with itself; a tree without the package is refused."""
    script = [sys.executable, str(BENCHMARKS / "two_trees.py"), "--rounds", "2", "--steps", "1"]
    done = subprocess.run([*script, str(ROOT), str(ROOT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(rf"^(.*), second to first: {NUMBER} \(range of 2", done.stdout, re.MULTILINE)) == 5
    wrong = subprocess.run([*script, str(ROOT), str(BENCHMARKS)], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 1 and "holds no peft_heads" in wrong.stderr


@pytest.mark.slow
def test_a_script_that_fails(script, tmp_path):
    """A failure is reported, with the script's output."""
    path = tmp_path / "out.txt"
    command = ["python", "benchmarks/adapter_size.py", "--no_such_option"]
    code, others = script("run_all").run(command, path)
    assert code == 2 and (others is None or 0 <= others <= 1)
    printed = path.read_text("utf-8")
    assert printed.startswith("$ python benchmarks/adapter_size.py --no_such_option") and "exit code 2" in printed


def test_table(script):
    """Everything missing is named, with its command; a quick run has no figures."""
    run_all = script("run_all")
    rows = [["step", "≤ 1.00 ×", "0.99 ×", "yes"]]
    missing, disturbed = [["python", "x.py", "--device", "cuda"]], {"step_time": 0.123}
    text = run_all.table(rows, missing, ["epoch_time"], disturbed, quick=False)
    assert "| step | ≤ 1.00 × | 0.99 × | yes |\n" in text and "no figures: epoch_time." in text
    assert "- `python x.py --device cuda`\n" in text
    assert "figures in doubt: step_time (12%)." in text
    assert text.startswith("| target |")
    text = run_all.table(rows, [], [], {}, quick=False)
    assert "in doubt" not in text and "Not taken" not in text
    assert run_all.table(rows, [], [], {}, quick=True).startswith("A few steps of tiny models: these are no figures.")


@pytest.mark.parametrize(
    ("code", "others", "figures", "doubts"), [(0, 0.01, True, False), (0, 0.2, True, True), (1, None, False, False)]
)
def test_what_gets_into_the_table(script, tmp_path, monkeypatch, code, others, figures, doubts):
    """A failed script adds nothing, even if it printed a target; load by others adds a doubt."""
    run_all = script("run_all")

    def run(command, path):
        path.write_text("target | a step | ≤ 1.00 × | 0.990 × | yes\n", "utf-8")
        return code, others

    monkeypatch.setattr(run_all, "run", run)
    arguments = ["run_all.py", "--device", "cpu", "--only", "step_time", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run_all.main() == code
    text = (tmp_path / "targets.md").read_text("utf-8")
    assert ("| a step | ≤ 1.00 × | 0.990 × | yes |" in text) is figures
    assert ("no figures: step_time" in text) is (code != 0)
    assert ("figures in doubt: step_time (20%)" in text) is doubts
    assert "- `python benchmarks/step_time.py --device cuda" in text


def test_nothing_to_be_taken_here(script, tmp_path, monkeypatch):
    """The suite for a GPU is named in slices that cover it and write to one file."""
    run_all = script("run_all")
    monkeypatch.setattr(
        sys, "argv", ["run_all.py", "--device", "cpu", "--only", "gpu_suite", "--output", str(tmp_path)]
    )
    assert run_all.main() == 0
    text = (tmp_path / "targets.md").read_text("utf-8")
    begin = f"python benchmarks/gpu_suite.py --device cuda --results {tmp_path}/gpu_suite.json --tasks "
    slices = re.findall(f"^- `{re.escape(begin)}(.+)`$", text, re.MULTILINE)
    assert len(slices) == text.count("gpu_suite.py") == 4
    assert " ".join(slices).split() == list(script("gpu_suite").VTAB)


def test_the_suite_is_gone_on_with(script, tmp_path, monkeypatch):
    """The one command keeps the suite's times in the output folder, unless the run is quick."""
    run_all, output = script("run_all"), tmp_path / "a folder"
    commands = []
    monkeypatch.setattr(run_all, "run", lambda command, path: commands.append(command) or (1, None))
    monkeypatch.setattr(run_all, "device_name", str)
    for options in (["--device", "cuda"], ["--device", "cpu", "--quick"]):
        monkeypatch.setattr(sys, "argv", ["run_all.py", *options, "--only", "gpu_suite", "--output", str(output)])
        run_all.main()
    assert commands == [
        ["python", "benchmarks/gpu_suite.py", "--device", "cuda", "--results", f"{output}/gpu_suite.json"],
        ["python", "benchmarks/gpu_suite.py", "--device", "cpu", "--quick"],
    ]


@pytest.mark.slow
def test_a_suite_that_was_cut_off(script, tmp_path, monkeypatch, capsys):
    """Its times are in the file; the next run measures the rest, and marks what was there."""
    gpu_suite, results = script("gpu_suite"), tmp_path / "new" / "gpu_suite.json"
    arguments = ["gpu_suite.py", "--device", "cpu", "--quick", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", arguments)
    measure, asked = gpu_suite.Suite.run, []

    def run(self, name):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(self, name)

    monkeypatch.setattr(gpu_suite.Suite, "run", run)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.main()
    assert list(json.loads(results.read_text("utf-8"))["tasks"]) == ["cifar"]
    gpu_suite.main()
    assert asked == ["cifar", "svhn", "svhn"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(f"(from {results})") for line in lines if line.startswith(("cifar", "svhn"))] == [
        *(False, True, False)
    ]


def test_what_others_take(script, tmp_path):
    """Busy seconds exclude idling and waiting for disks; those of ended children are counted separately."""
    run_all, stat = script("run_all"), tmp_path / "stat"
    stat.write_text("cpu  1000 200 30 5000 600 4 5 60 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert run_all.busy_seconds(stat) == 1299 / os.sysconf("SC_CLK_TCK")
    assert run_all.busy_seconds(tmp_path / "nothing") is None
    own, began = run_all.children_seconds(), time.process_time()
    while time.process_time() - began < 0.1:
        pass
    assert run_all.children_seconds() == own
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert run_all.children_seconds() > own


def test_memory_for_the_backward_pass(script):
    """RLRR's benchmark counts what a layer keeps, once, and no weights."""
    rlrr_cost = script("rlrr_cost")

    class Model(torch.nn.Linear):
        def forward(self, pixel_values, labels):
            x = super().forward(pixel_values).sigmoid()  # keeps its output, 32 floats; the layer its input, 24
            return SimpleNamespace(loss=(x * x).sum())

    model = Model(3, 4)
    batch = {"pixel_values": torch.ones(8, 3), "labels": torch.zeros(8)}
    optimizer = torch.optim.SGD(model.parameters())
    assert rlrr_cost.memory(model, optimizer, batch, torch.float32) == 4 * (32 + 24)
    model.requires_grad_(False)
    batch["pixel_values"].requires_grad_(True)  # its gradient needs the weight alone
    assert rlrr_cost.memory(model, optimizer, batch, torch.float32) == 4 * 32


def test_ratio(script):
    measure = script("measure")
    ones = [1.0] * 20
    ratio = measure.ratio([float(x) for x in range(1, 21)], ones)
    assert (ratio.median, ratio.of_medians, ratio.middle_half) == (10.5, 10.5, (6, 15))
    assert ratio.interval == (6, 15)  # ranks of the exact binomial interval of 95 %, for 20 values
    assert ratio.span == "95 % of the median: 6.000 to 15.000"
    few = measure.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert few.interval == (2, 3) and few.span == "range of 3: 2.000 to 3.000"
    for count in range(6, 80):  # the narrowest that is at least so certain
        outside = measure.ranks_outside(count)
        assert 1 - 2 * binom.cdf(outside, count, 0.5) >= 0.95 > 1 - 2 * binom.cdf(outside + 1, count, 0.5)
    paired = measure.ratio([1.0, 20.0, 30.0], [1.0, 2.0, 30.0])  # in two of three rounds both took the same
    assert (paired.median, paired.of_medians) == (1, 10)
    assert ratio.map(lambda x: 10 * x).interval == (60, 150)


def test_ratio_to_nothing(script, capsys):
    """A side that needs no memory does not break a benchmark."""
    measure = script("measure")
    ratio = measure.ratio([0.0, 3.0, 0.0, 4.0], [0.0, 0.0, 2.0, 2.0])
    assert (ratio.interval, ratio.median) == ((0, math.inf), 1.5)
    nothing = measure.ratio([0, 0, 0], [0, 0, 0])
    assert (nothing.median, nothing.of_medians) == (1, 1) and measure.judge("memory", nothing, "here")
    much = measure.ratio([5, 5, 5], [0, 0, 0])
    assert much.of_medians == math.inf and not measure.judge("memory", much, "here")
    assert capsys.readouterr().out.endswith("| inf × (range of 3: inf to inf) | no\n")


@pytest.mark.parametrize(
    ("name", "values", "met"),
    [
        ("step", [0.98, 0.99, 1.0], "yes"),
        ("step", [0.98, 0.99, 1 + 1e-12], "yes"),  # the limit up to floating-point rounding
        ("step", [0.98, 0.99, 1.004], "undecided"),  # the end is not rounded
        ("step", [0.999, 1.02, 1.03], "undecided"),
        ("step", [1.0, 1.02, 1.03], "undecided"),
        ("step", [1.004, 1.004, 1.004], "no"),
        ("epoch", [3.0, 3.1, 3.2], "yes"),
        ("epoch", [2.998, 3.1, 3.2], "undecided"),
        ("epoch", [2.9, 2.94, 3.01], "undecided"),
        ("epoch", [2.9, 2.94, 2.999], "no"),
    ],
)
def test_judge(script, capsys, name, values, met):
    """The answer is yes if the whole range keeps the limit, and no if the whole range misses it."""
    measure = script("measure")
    assert measure.judge(name, measure.ratio(values, [1.0] * len(values)), "here") is (met == "yes")
    line = capsys.readouterr().out
    what, _, figure, found = line.strip().removeprefix("target | ").split(" | ")
    assert (
        found == met and "(here)" in what and figure.startswith(f"{values[1]:.3f} × (range of 3: {values[0]:.3f} to")
    )


def test_judge_by_the_interval(script, capsys):
    """With many rounds outliers are left out, and the interval of the median decides, not the median."""
    measure = script("measure")
    for values, met in (([0.9] * 18 + [1.2] * 2, "yes"), ([0.9] * 11 + [1.2] * 9, "undecided")):
        ratio = measure.ratio(values, [1.0] * 20)
        assert ratio.median == 0.9 and measure.judge("step", ratio, "here") is (met == "yes")
        assert capsys.readouterr().out.endswith(f"(95 % of the median: {ratio.span.split(': ')[1]}) | {met}\n")


@pytest.mark.parametrize(("figure", "met"), [(14.0, "yes"), (15.0, "yes"), (15.004, "no")])
def test_judge_of_a_single_figure(script, capsys, figure, met):
    assert script("measure").judge("suite", figure, "here") is (met == "yes")
    assert capsys.readouterr().out.endswith(f" | ≤ 15.00 min | {figure:.3f} min | {met}\n")


@pytest.mark.parametrize(("rounds", "warm_up"), [(2, 0), (2, 1), (4, 0), (6, 2)])
def test_each_of_two_sides_is_first_as_often(script, rounds, warm_up):
    calls = []
    sides = {"sweep": lambda: calls.append("sweep"), "separate": lambda: calls.append("separate")}
    script("measure").interleaved(sides, rounds, warm_up=warm_up)
    assert calls[2 * warm_up :: 2].count("sweep") == rounds / 2


def test_what_a_sweep_saves(script):
    """A sweep saves nine of ten epochs before the selection, for all but one of the runs that begin alike."""
    sweep_cost = script("sweep_cost")
    recipe = replace(sweep_cost.RECIPES["vtab"], epochs=30)
    method = sweep_cost.METHOD | {"ne": [1, 3]}
    task = sweep_cost.find_task("svhn", "vtab")
    sweep = sweep_cost.Sweep((task,), method, recipe, str(sweep_cost.DEMO_MODEL_PATH), seeds=(0, 1))
    specs = sweep.runs(sweep.methods(), (0, 1), final=True)
    assert len(specs) == 2 * 3 * 2  # numbers of heads, criteria, seeds, each of which has a warm-up of its own
    assert sweep_cost.epochs_saved(specs, 30) == (2 * 5 * 9, 12 * 30)


def test_only_separate_runs(script, monkeypatch, capsys):
    """With --only_separate nothing else is timed."""
    sweep_cost, timed = script("sweep_cost"), []

    def interleaved(sides, rounds, **options):
        timed.append((list(sides), rounds))
        return {name: [1.0] * rounds for name in sides}

    monkeypatch.setattr(sweep_cost, "interleaved", interleaved)
    monkeypatch.setattr(sweep_cost, "execute", lambda specs, places, outcome, **options: fill(specs, places, outcome))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sweep_cost.logging, "disable", lambda level: None)

    def fill(specs, places, outcome):
        outcome.runs.update({spec.run_id: None for spec in specs})

    monkeypatch.setattr(sys, "argv", "sweep_cost.py --only_separate --repeat 4 --images 10 --test_images 10".split())
    sweep_cost.main()
    ((sides, rounds),) = timed
    assert rounds == 4 and len(sides) == 2 and sides[0].startswith("sweep") and sides[1].startswith("(a)")
    assert "sharing saves 72 of 900 epochs of steps (8.0%): / sweep could reach 1.087" in capsys.readouterr().out


@pytest.mark.parametrize(("scale", "rank", "expected"), [(None, 8, 1), (None, 4, 2), (0.5, 4, 0.5), (3.0, 4, 3)])
def test_scale_of_both_sides(script, scale, rank, expected):
    step_time = script("step_time")
    args = SimpleNamespace(hidden=48, layers=1, heads=4, device="cpu", rank=rank, scale=scale, ne=1)
    vars(args).update(mask_scope="adapter", adapter_bits=32)
    for side in (step_time.STOCK, step_time.OURS):
        layers = [m for m in step_time.make(side, args).modules() if isinstance(m, LoraLayer)]
        assert len(layers) == 2 and {layer.scaling["default"] for layer in layers} == {expected}


@pytest.mark.parametrize("name", ["epoch_time", "scoring_cost"])
@pytest.mark.parametrize(
    ("device", "visible", "way_out"),
    [
        ("cuda:1", 2, "CUDA_VISIBLE_DEVICES=1"),
        ("cuda:1", 1, "CUDA_VISIBLE_DEVICES=1"),
        ("cuda", 2, "CUDA_VISIBLE_DEVICES=0"),
        ("cuda:0", 2, "CUDA_VISIBLE_DEVICES=0"),
    ],
)
def test_devices_that_trainer_would_not_use(script, monkeypatch, capsys, name, device, visible, way_out):
    """Such devices are refused at once, with the way out."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", device])
    with pytest.raises(SystemExit):
        script(name).main()
    message = capsys.readouterr().err
    assert f"--device {device}:" in message and f"({visible})" in message and way_out in message


def test_devices_that_trainer_uses(script, monkeypatch):
    check = script("measure").check_trainer_device
    for device, visible in (("cuda", 1), ("cuda:0", 1), ("cpu", 0), ("cpu", 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        check(None, device)  # which would fail to complain


def test_what_worker_processes_get(script, tmp_path):
    """The data of both sides of epoch_time can be pickled and yields the same images: not all workers are forked."""
    epoch_time = script("epoch_time")
    epoch_time.write_images(tmp_path, 10, 32)
    args = SimpleNamespace(root=tmp_path, checkpoint=epoch_time.DEMO_MODEL_PATH)
    sides = [
        (epoch_time.plain_data(args), epoch_time.collate_plain),
        (epoch_time.our_data(args, tmp_path / "cache"), epoch_time.collate),
    ]
    batches = []
    for data, collator in sides:
        images, collator_there = pickle.loads(pickle.dumps((epoch_time.TimedImages(data), collator)))
        here, there = collator(data.__getitems__([0, 9])), collator_there(images.__getitems__([0, 9]))
        assert torch.equal(here["pixel_values"], there["pixel_values"])
        batches.append(there)
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_step_end", "on_train_end"])
def test_the_clock_of_scoring(script, monkeypatch, event):
    """The clock counts the callback's work on an accelerator, but not what is left of the step."""
    measure, scoring_cost = script("measure"), script("scoring_cost")
    now, pending, begun = [0.0], [100.0], []  # seconds, and what the step has left to the accelerator

    def synchronize(device):
        assert device == torch.device("cuda:0")
        now[0] += pending.pop()
        pending.append(0.0)

    def call(self, *args, **kwargs):
        begun.append((args, kwargs))
        pending[0] += 1

    monkeypatch.setattr(measure.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("peft_heads.metrics.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(scoring_cost.TaylorHeadScorer, event, call)
    scorer, args = scoring_cost.TimedScorer(), SimpleNamespace(device=torch.device("cuda:0"))
    getattr(scorer, event)(args, "state", "control", model=1)
    assert begun == [((args, "state", "control"), {"model": 1})] and scorer.seconds == 1


def test_interleaved(script):
    """Warm-up does not count; every round has every side, in varying order; a side may time itself."""
    measure, calls = script("measure"), []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "c": lambda: calls.append("c") or 7.0}
    times = measure.interleaved(sides, rounds=6, warm_up=2)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 8 and {tuple(sorted(order)) for order in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) > 1
    assert [order[::-1] for order in rounds[::2]] == rounds[1::2]  # none is before another more often than after it
    assert [len(seconds) for seconds in times.values()] == [6, 6, 6]
    assert times["c"] == [7.0] * 6 and max(times["a"]) < 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_peak_memory(script):
    """The peak includes memory that is freed again, but not an earlier peak.

    In a process of its own: in this one an earlier test may have freed as much, which the allocator keeps and uses again.
    """
    code = """
import torch
from measure import peak_memory

torch.ones(128 * 2**20).sum()
kept = torch.ones(64 * 2**20, dtype=torch.uint8)
before, peak = peak_memory(lambda: torch.ones(64 * 2**20).sum(), "cpu")
assert 255 < (peak - before) / 2**20 < 300, (before, peak)
assert before > kept.nbytes
"""
    environment = (
        os.environ | script("measure").GIVES_BACK | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(BENCHMARKS)])}
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_peak_memory_of_an_accelerator(script, monkeypatch):
    """Every query names the given device, in an order that covers the whole call."""
    measure, calls = script("measure"), []
    answers = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 3, "max_memory_allocated": 8}
    for name, answer in answers.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda *args, name=name, answer=answer: calls.append((name, *args)) or answer
        )
    assert measure.peak_memory(lambda: calls.append("the call"), "cuda:1") == (3, 8)
    device = torch.device("cuda:1")
    assert calls == [
        *[(name, device) for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated")],
        "the call",
        *[(name, device) for name in ("synchronize", "max_memory_allocated")],
    ]


def test_a_process_of_its_own_gives_memory_back(script, monkeypatch):
    """Otherwise a peak would be that of memory kept by glibc; this process stays as it was."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert script("measure").in_own_process(os.getenv, "MALLOC_TRIM_THRESHOLD_") == "65536"
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ


@pytest.mark.parametrize(("rank", "labels"), [(4, 7), (2, 100)])
def test_operations_of_a_training_step(script, rank, labels):
    """The formulas agree with PyTorch's counts, with attention in plain matrix products."""
    gpu_suite = script("gpu_suite")
    config = ViTConfig(**gpu_suite.QUICK_VIT, num_labels=labels, attn_implementation="eager")
    model = get_peft_model(ViTForImageClassification(config), HeadMaskedLoraConfig(r=rank, ne=1)).train()
    with FlopCounterMode(display=False) as forward:
        loss = model(pixel_values=torch.randn(1, 3, 32, 32), labels=torch.tensor([1])).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert gpu_suite.forward_flops(config, rank, labels) == forward.get_total_flops()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert gpu_suite.training_flops(config, rank, labels) == total


def test_floor(script):
    """The floor has the frozen model's outputs, and gradients of activations but not of weights."""
    vit = ViTForImageClassification(ViTConfig(**script("gpu_suite").QUICK_VIT, num_labels=3))
    images = torch.randn(2, 3, 32, 32)
    expected = vit.eval()(images).logits
    model = script("step_time").floor(vit)
    assert torch.equal(model.eval()(images).logits, expected)

    needs = {}
    for name in adapted_projections(model):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda module, inputs, output, name=name: needs.update(
                {name: (inputs[0].requires_grad, output.requires_grad)}
            )
        )
    model(images, labels=torch.tensor([0, 1])).loss.backward()
    assert list(needs.values()) == [(False, True)] * 2 + [(True, True)] * 2
    trained = {name for name, param in model.named_parameters() if param.grad is not None}
    assert trained == {"classifier.weight", "classifier.bias"}


def adapted_projections(model):
    roles = {name: layout.parts[0].role for name, layout in resolve_heads(model).items()}
    return [name for name, role in roles.items() if role in ("query", "value")]
