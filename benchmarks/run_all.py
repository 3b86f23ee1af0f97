"""All figures with one command: every benchmark, one after the other, with the settings of the README's figures.

This takes about 45 minutes on two CPU cores. Leave the machine alone meanwhile: while a script runs, the load by other
processes is measured, and the table says where it is too high.

The output folder gets what every script prints (`NAME.txt`, with the command), the machine (`machine.json`), and the table
of all targets (`targets.md`). Figures for a GPU need a machine that has one, and --device cuda. Elsewhere the table names
them as missing, with their commands; the suite of 19 tasks is cut into slices of a few minutes. The suite keeps its times
task by task in `gpu_suite.json`, so that the command continues where it, or a slice, was cut off. Delete the file for new
figures.

    python benchmarks/run_all.py [--output runs/benchmarks --device cpu --only step_time …]
    python benchmarks/run_all.py --quick        (a few steps of tiny models: whether every script runs)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import add_arguments, cpu_model, device_name

from peft_heads.adapter_folder.atomic import write_atomically
from peft_heads.benchmark.records.environment import installed_versions, source_state
from peft_heads.data.tasks import TASKS


HERE = Path(__file__).parent
MOST_BY_OTHERS = 0.05  # highest acceptable share of all cores that other processes take while a script runs
TINY = "--hidden 48 --layers 2 --heads 4 --batch 2"
# Each slice of gpu_suite fits into ten minutes, even if all of VTAB took twice its target of 15 minutes.
TASKS_PER_SLICE = 5
VTAB = [task.name for task in TASKS if task.suite == "vtab"]
SLICES = tuple(tuple(VTAB[i : i + TASKS_PER_SLICE]) for i in range(0, len(VTAB), TASKS_PER_SLICE))


@dataclass(frozen=True)
class Run:
    """A script with its options.

    Attributes:
        script: Name of the script, without its ending.
        cpu, cuda: Options of the README's figures on either device; `{output}` stands for the output folder. None where
            the script has no figures to take.
        quick: Options with which the script takes seconds, on a CPU.
        has_device: Whether the script takes `--device`.
        slices: Values of `--tasks`, which together make the whole run in several shorter ones.
    """

    script: str
    cpu: str | None
    cuda: str | None
    quick: str
    has_device: bool = True
    slices: tuple[tuple[str, ...], ...] = ()

    def command(self, device: str, output: Path, quick: bool = False) -> list[str] | None:
        options = self.quick if quick else getattr(self, torch.device(device).type)
        if options is None:
            return None
        chosen = ["--device", device] if self.has_device else []
        words = [word.format(output=output) for word in shlex.split(options)]
        return ["python", f"benchmarks/{self.script}.py", *chosen, *words]

    def commands(self, device: str, output: Path) -> list[list[str]]:
        """Return the commands to run on another machine, one for each slice."""
        command = self.command(device, output)
        if command is None:
            return []
        return [[*command, "--tasks", *tasks] for tasks in self.slices] or [command]


RUNS = {
    "step_time": Run(
        "step_time", "--batch 4 --steps 120", "--batch 64 --steps 100", f"{TINY} --steps 3 --ne 1 --memory_runs 1"
    ),
    "step_time_1_bit": Run(
        "step_time",
        "--batch 4 --rank 32 --adapter_bits 1 --steps 24",
        "--batch 64 --rank 32 --adapter_bits 1 --steps 100",
        f"{TINY} --rank 4 --adapter_bits 1 --steps 3 --ne 1 --memory_runs 0",
    ),
    "step_time_scaled": Run(
        "step_time",
        "--batch 4 --scale 0.5 --steps 24 --memory_runs 0",
        "--batch 64 --scale 0.5 --steps 50 --memory_runs 0",
        f"{TINY} --scale 0.5 --steps 3 --ne 1 --memory_runs 0",
    ),
    "scoring_cost": Run("scoring_cost", "--batch 4 --steps 20", "--batch 64 --steps 100", f"{TINY} --steps 3"),
    "rlrr_cost": Run("rlrr_cost", "--batch 4 --steps 11", "--batch 64 --steps 100", f"{TINY} --steps 3"),
    "epoch_time": Run("epoch_time", "", "--num_workers 8", "--images 20 --batch 10 --epochs 2 --rounds 1"),
    "epoch_time_500_pixels": Run(
        "epoch_time",
        "--image_size 500 --rounds 6",
        "--image_size 500 --num_workers 8",
        "--images 20 --batch 10 --epochs 2 --rounds 1 --image_size 300",
    ),
    "pruned_inference": Run(
        "pruned_inference", "--batch 8 --batches 25", "--batch 64 --batches 100", f"{TINY} --batches 3 --ne 1 2"
    ),
    "pruned_to_half": Run(
        "pruned_inference",
        "--batch 8 --batches 25 --ne 6 --neurons 0.5",
        "--batch 64 --batches 100 --ne 6 --neurons 0.5",
        f"{TINY} --batches 3 --ne 2 --neurons 0.5",
    ),
    "pruned_to_half_batch_1": Run(
        "pruned_inference",
        "--batch 1 --batches 60 --ne 6 --neurons 0.5",
        "--batch 1 --batches 300 --ne 6 --neurons 0.5",
        f"{TINY} --batch 1 --batches 3 --ne 2 --neurons 0.5",
    ),
    "load_time": Run("load_time", "--imports 7", None, f"{TINY} --ne 1 --imports 1 --loads 2"),
    "adapter_size": Run("adapter_size", "", None, "--r 4 --bits 32 1 --ne 0 3", has_device=False),
    "sweep_cost": Run(
        "sweep_cost",
        "--images 40 --test_images 800 --ne 1 3 --repeat 2",
        None,
        "--epochs 11 --images 10 --test_images 20 --repeat 1 --ne 1",
        has_device=False,
    ),
    "gpu_suite": Run("gpu_suite", None, "--results {output}/gpu_suite.json", "--quick", slices=SLICES),
}


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Return the busy seconds of all cores since the machine was started; None if the system is not Linux."""
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """Return the CPU seconds of child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def run(command: list[str], path: Path) -> tuple[int, float | None]:
    """Run a script, and write its output to a file; return its exit code and the load by other processes."""
    lines = [f"$ {shlex.join(command)}\n"]
    print(lines[0], end="", flush=True)
    began, busy, own = time.perf_counter(), busy_seconds(), children_seconds()
    script = [sys.executable, str(HERE / Path(command[1]).name), *command[2:]]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    seconds, others = time.perf_counter() - began, None
    if busy is not None:
        cores = (busy_seconds() - busy - (children_seconds() - own)) / seconds
        others = max(0.0, cores / os.cpu_count())
        lines.append(f"others kept {others:.1%} of the machine's cores busy\n")
    lines.append(f"took {seconds:.0f} s, exit code {process.returncode}\n")
    print("".join(lines[-2:]), end="", flush=True)
    write_atomically(path, "".join(lines))
    return process.returncode, others


def targets_of(path: Path) -> list[list[str]]:
    """Return `[what, limit, figure, met]` of every target that a script has printed."""
    rows = [line.split(" | ") for line in path.read_text("utf-8").splitlines() if line.startswith("target | ")]
    return [row[1:] for row in rows]


def table(
    rows: list[list[str]], missing: list[list[str]], failed: list[str], disturbed: dict[str, float], quick: bool
) -> str:
    """Write the table as Markdown; `disturbed` holds scripts, and the load by other processes meanwhile."""
    lines = ["A few steps of tiny models: these are no figures.", ""] if quick else []
    lines += ["| target | limit | figure | met |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if failed:
        lines += ["", f"Failed, no figures: {', '.join(failed)}."]
    if disturbed:
        shares = ", ".join(f"{name} ({share:.0%})" for name, share in disturbed.items())
        lines += ["", f"Others kept cores busy, figures in doubt: {shares}."]
    if missing:
        lines += ["", "Not taken here:", "", *[f"- `{shlex.join(command)}`" for command in missing]]
    return "\n".join(lines) + "\n"


def describe_machine(device: str) -> dict:
    commit, dirty = source_state()
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "commit": commit,
        "uncommitted_changes": dirty,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    other = {"cpu": "cuda", "cuda": "cpu"}.get(torch.device(args.device).type)
    if other is None:
        parser.error(f"--device {args.device}: there are settings for cpu and cuda only")

    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / "machine.json", json.dumps(describe_machine(args.device), indent=1))
    rows, failed, disturbed = [], [], {}
    missing = [command for name in args.only for command in RUNS[name].commands(other, args.output)]
    for name in args.only:
        command, path = RUNS[name].command(args.device, args.output, args.quick), args.output / f"{name}.txt"
        if command is None:
            continue
        print(f"\n== {name}")
        code, others = run(command, path)
        if code != 0:
            failed.append(name)
        else:
            rows += targets_of(path)
        if others is not None and others > MOST_BY_OTHERS:
            disturbed[name] = others
        write_atomically(args.output / "targets.md", table(rows, missing, failed, disturbed, args.quick))
    text = table(rows, missing, failed, disturbed, args.quick)
    write_atomically(args.output / "targets.md", text)
    print(f"\n{text}\nwritten to {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
