"""Runs killed with SIGKILL and resumed end with the masks, scores and weights of the undisturbed run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent / "scripts" / "kill_and_resume.py"
FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "labels.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)

pytestmark = pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs fork and waitid")


def kill_and_resume(runs):
    done = subprocess.run([sys.executable, str(SCRIPT), f"--runs={runs}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return {name: int(count) for name, count in re.findall(r"^  (.+?) {2,}(\d+)$", done.stdout, re.MULTILINE)}


@pytest.mark.slow
def test_killed_in_every_phase_and_in_every_file_of_a_checkpoint():
    counts = kill_and_resume(runs=2)
    assert all(counts[f"kills {when} the window"] for when in ("before", "in", "after"))
    assert all(counts[f"kills in {name}"] for name in FILES) and counts["kills while an old one was deleted"]
    assert counts["checkpoints skipped as incomplete"] >= len(FILES)
    assert [counts[f"runs with other {what}"] for what in ("masks", "weights", "head scores")] == [0, 0, 0]


@pytest.mark.slow
def test_killed_at_random_moments():
    counts = kill_and_resume(runs=15)
    assert counts["kills"] > 40 and counts["kills at a random time"] > 10
