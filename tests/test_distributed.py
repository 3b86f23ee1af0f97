"""Invariants 6 and 7 over processes: two gloo processes on the CPU against one, with the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parent / "scripts" / "train_distributed.py"

pytestmark = pytest.mark.slow


def run(folder, processes, criterion):
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(SCRIPT), str(folder), str(8 // processes), criterion]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    assert all(result["world_size"] == processes for result in results)
    return results, json.loads((folder / "head_scores.json").read_text())


@pytest.mark.parametrize("criterion", ["absolute", "random"])
def test_two_processes_select_the_same_heads_as_one(tmp_path, criterion):
    (alone,), expected = run(tmp_path / "one", 1, criterion)
    together, actual = run(tmp_path / "two", 2, criterion)
    assert together[0] == together[1]  # the ranks agree on masks and weights
    assert together[0]["masks"] == alone["masks"] == expected["masks"] == actual["masks"]
    assert sum(not on for mask in alone["masks"].values() for on in mask) == 2 * 4
    for name, scores in expected["scores"].items():
        for module, values in scores.items():
            torch.testing.assert_close(
                torch.tensor(actual["scores"][name][module]), torch.tensor(values), rtol=1e-5, atol=1e-8
            )
