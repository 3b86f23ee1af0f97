"""Tools that the benchmarks share: sides timed in turns, ratios with their spread, peak memory, and the targets.

Each target is printed as one line, which `run_all.py` collects: `target | what | limit | figure | met`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_heads._compat.transformers import silence_known_warnings
from peft_heads.metrics.timing import Ratio, interleaved, ranks_outside, ratio, synchronize, timed  # noqa: F401


silence_known_warnings()


@dataclass(frozen=True)
class Target:
    """A limit, "≤" or "≥", which is compared with the exact figure, not with the printed one."""

    what: str
    sign: str
    limit: float
    unit: str

    def is_met(self, figure: float) -> bool:
        """Whether the figure keeps the limit; a figure that equals it up to floating-point rounding does."""
        beyond = figure > self.limit if self.sign == "≤" else figure < self.limit
        return not beyond or math.isclose(figure, self.limit)

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:.2f} {self.unit}"


TARGETS = {
    "step": Target("training step, masks on, against stock LoRA", "≤", 1.00, "×"),
    "memory": Target("peak memory of training, masks on, against stock LoRA", "≤", 1.00, "×"),
    "1-bit step": Target("1-bit training step against stock LoRA of the same rank", "≤", 1.05, "×"),
    "scoring": Target("scoring and selection of heads, of the warm-up", "≤", 1.00, "%"),
    "epoch": Target("epoch of 1,000 images, plain script against ours", "≥", 3.00, "×"),
    "pruned": Target("pruned inference, of the arithmetic bound", "≥", 95.00, "%"),
    "smaller": Target("inference without half of the operations, of the arithmetic bound", "≥", 90.00, "%"),
    "suite": Target("all 19 tasks of VTAB-1K, ViT-B/16, 100 epochs each, on one GPU", "≤", 15.00, "min"),
}


def describe(name: str, times: list[float], unit: str = "ms", width: int = 24) -> str:
    """Write the median and the range of a side as one line."""
    low, median, high = (1e3 * x if unit == "ms" else x for x in (min(times), statistics.median(times), max(times)))
    return f"{name:{width}} median {median:9.2f} {unit} ({low:.2f} to {high:.2f})"


def judge(name: str, figure: float | Ratio, where: str) -> bool:
    """Print a target's line.

    For a ratio the whole interval is judged (with few rounds: the range), before anything is rounded. The answer is
    "yes" if the unfavourable end keeps the limit, "no" if not even the favourable end does, and "undecided" if the limit
    lies between them. A single figure keeps the limit or does not.

    Returns:
        Whether the answer is "yes".
    """
    target = TARGETS[name]
    if isinstance(figure, Ratio):
        shown, ends, span = figure.median, figure.interval, f" ({figure.span})"
    else:
        shown, ends, span = figure, (figure,), ""
    kept = [target.is_met(end) for end in ends]
    met = "yes" if all(kept) else "undecided" if any(kept) else "no"
    print(f"target | {target.what} ({where}) | {target} | {shown:.3f} {target.unit}{span} | {met}", flush=True)
    return met == "yes"


# Without these settings glibc keeps freed memory for later, by amounts that vary from run to run.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """Call a top-level function of a script in a fresh process, which returns freed memory to the system at once."""
    before = {name: os.environ.get(name) for name in GIVES_BACK}
    os.environ.update(GIVES_BACK)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def peak_memory(call: Callable[[], Any], device: torch.device | str) -> tuple[int, int]:
    """Return the bytes in use before a call, and at its peak. Call this in a process of its own.

    On an accelerator these are PyTorch's allocations. On a CPU they are the resident memory of the process as Linux
    counts it (VmRSS, VmHWM), which includes the libraries' scratch space. The process must return freed memory to the
    system (`in_own_process`); otherwise the allocator's habits are measured. `ru_maxrss` would not do, because a child
    inherits its parent's peak.

    Raises:
        RuntimeError: The peak may be an earlier one, or the system is not Linux.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return before, torch.cuda.max_memory_allocated(device)
    if not Path("/proc/self/status").exists():
        raise RuntimeError("the resident memory of a process is read from /proc/self/status, which Linux alone has")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the current resident memory
    except OSError:
        pass
    before, earlier = _status("VmRSS"), _status("VmHWM")
    call()
    peak = _status("VmHWM")
    if peak == earlier > before:
        raise RuntimeError(f"the peak of {peak:,} bytes is that of what went before; choose a larger batch")
    return before, peak


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def add_arguments(parser, **defaults: int) -> None:
    """Add options for integers with these defaults, and `--device`."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_trainer_device(parser, device: torch.device | str) -> None:
    """End a script whose Trainer would use another device than the one asked for.

    Trainer takes the first visible GPU, and splits every batch if there are more.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return
    visible = torch.cuda.device_count()
    if device.index not in (None, 0) or visible > 1:
        parser.error(
            f"--device {device}: Trainer chooses the device here, and takes all visible GPUs ({visible}), from the "
            f"first on; make one visible (CUDA_VISIBLE_DEVICES={device.index or 0}) and pass --device cuda"
        )


def device_name(device: torch.device | str) -> str:
    """Name a device in words, with what its speed depends on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
