"""Invariants 6 and 7 with several processes: two gloo processes on the CPU against one, with the same global batch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_heads import get_head_masks
from peft_heads.heads import CRITERIA, plan_groups, resolve_heads, select_heads


SCRIPT = Path(__file__).parent / "scripts" / "train_distributed.py"
TRAINER_FILES = {"head_scores.json", "head_scores.png", "labels.json", "README.md"}

pytestmark = pytest.mark.slow


def run(folder, processes, layout, **options):
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), layout, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    assert all(rank["world_size"] == processes for rank in ranks)
    # only the main process writes files
    assert not any(rank.pop("written") for rank in ranks[1:])
    written = ranks[0].pop("written")
    assert set(written) == (TRAINER_FILES if (folder / "head_scores.json").exists() else {"labels.json", "README.md"})
    assert all(rank == ranks[0] for rank in ranks)  # the ranks agree on masks, scores and weights
    assert ranks[0]["deactivated_rows"] == ranks[0]["their_states"] == 0
    saved = load_file(folder / "adapter_model.safetensors")
    ranks[0]["saved"] = {key: value.double().sum().item() for key, value in saved.items()}
    if "scores" not in ranks[0]:
        ranks[0]["scores"] = json.loads((folder / "head_scores.json").read_text())["scores"]
    return ranks[0]


def assert_close(actual, expected):
    for criterion, by_name in expected.items():
        for name, values in by_name.items():
            scale = max(map(abs, values))
            worst = max(abs(a - b) for a, b in zip(actual[criterion][name], values, strict=True))
            assert worst <= 1e-5 * scale, (criterion, name)


def assert_same(actual, expected):
    """Compare masks and scores, up to 1e-5 of a projection's largest score: signed scores may nearly cancel."""
    assert actual["masks"] == expected["masks"]
    assert sum(not on for mask in expected["masks"].values() for on in mask) == 2 * 4
    gathered = {name for name in CRITERIA if "images" in expected or not CRITERIA[name].needs_gates}
    assert set(actual["scores"]) == set(expected["scores"]) == gathered
    assert_close(actual["scores"], expected["scores"])
    for criterion in expected["scores"]:
        for granularity in ("global", "layer"):
            for joint in (True, False):
                masks = [masks_of(run["scores"][criterion], granularity, joint) for run in (actual, expected)]
                assert masks[0] == masks[1], (criterion, granularity, joint)
    for what in ("weights", "saved"):
        assert actual[what].keys() == expected[what].keys()
        for name, total in expected[what].items():
            assert actual[what][name] == pytest.approx(total, rel=1e-4, abs=1e-5)


def masks_of(scores, granularity, joint):
    layouts = {name: layout.parts[0] for name, layout in resolve_heads(tiny.make("vit")).items() if name in scores}
    groups = plan_groups(layouts, ne=2, granularity=granularity, joint=joint)
    scores = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}
    return {name: mask.tolist() for name, mask in select_heads(scores, groups).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Train in one process through Trainer."""
    return run(tmp_path_factory.mktemp("alone") / "run", 1, "ddp")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp(tmp_path, alone, accumulation):
    assert_same(run(tmp_path / "two", 2, "ddp", gradient_accumulation_steps=accumulation), alone)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_with_k_bits(tmp_path, accumulation):
    """Every process quantises the same weights and gets the same codes."""
    config = {"adapter_bits": 2, "classifier_bits": 4, "r": 4}
    expected = run(tmp_path / "one", 1, "ddp", config=config)
    assert_same(run(tmp_path / "two", 2, "ddp", gradient_accumulation_steps=accumulation, config=config), expected)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_prunes_in_several_cuts(tmp_path, accumulation):
    """Heads and neurons for a target speed, in two cuts, with a teacher: all processes select the units of one."""
    pruning = {
        "config": {"target_speed": 2.0},
        "scorer": {"select_at": 4, "cuts": 2, "last_cut": 8, "distill": 0.5},
    }
    expected = run(tmp_path / "one", 1, "ddp", **pruning)
    actual = run(tmp_path / "two", 2, "ddp", gradient_accumulation_steps=accumulation, **pruning)
    for what in ("masks", "neuron_masks", "remain", "cuts_made"):
        assert actual[what] == expected[what]
    off = {sum(not on for on in mask) for mask in actual["neuron_masks"].values()}
    assert off == {32 - actual["remain"]["num_neurons"]} and off != {0} and actual["cuts_made"] == 2
    for name, total in expected["saved"].items():
        assert actual["saved"][name] == pytest.approx(total, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("ddp", {}),
        ("ddp", {"gradient_accumulation_steps": 2}),
        ("loop", {"accumulation": 2}),
        ("fsdp2", {"accumulation": 2}),
    ],
)
def test_gates(tmp_path, layout, options):
    """The gates of heads and neurons are those of each image, whichever process has seen it."""
    config = {"criterion": "gate"}
    expected = run(tmp_path / "one", 1, "ddp" if layout == "ddp" else "loop", config=config)
    actual = run(tmp_path / "two", 2, layout, config=config, **options)
    assert_same(actual, expected)
    assert actual["images"] == expected["images"] == (32 if layout == "ddp" else 24)
    assert len(expected["neurons"]) == 3
    assert_close(actual["neurons"], expected["neurons"])


def test_gates_of_steps_that_some_process_takes_no_part_in(tmp_path):
    """A process without data brings no images; one whose loss overflows skips the step for all."""
    config = {"criterion": "gate"}
    short = run(tmp_path / "short", 2, "loop", config=config, short=True)
    assert short["steps"] == [3, 0] and short["images"] == 3 * 8 - 4
    overflow = run(tmp_path / "overflow", 2, "loop", config=config, overflow=True)
    assert overflow["steps"] == [2, 1] and overflow["images"] == 2 * 8


# The keys' shift is left out: it changes no softmax, so its gradient is rounding error, which Adam turns into steps.
RLRR = {"method": "rlrr", "config": {"exclude_modules": tiny.now(["k_proj"])}}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_with_rlrr(tmp_path, accumulation):
    expected = run(tmp_path / "one", 1, "ddp", **RLRR)
    assert_same(run(tmp_path / "two", 2, "ddp", gradient_accumulation_steps=accumulation, **RLRR), expected)


def test_fsdp2_with_rlrr(tmp_path):
    """The frozen weight is gathered for the block, forward and backward."""
    expected = run(tmp_path / "one", 1, "loop", **RLRR)
    assert_same(run(tmp_path / "two", 2, "fsdp2", accumulation=2, **RLRR), expected)
    weights, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_3_with_rlrr_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="ZeRO 3 .*use ZeRO 1 or 2"):
        run(tmp_path / "two", 2, "zero3", **RLRR)


def test_fsdp2_with_k_bits_is_refused(tmp_path):
    with pytest.raises(
        AssertionError, match=r"whole matrix .*sharded over the processes .FSDP2.; use DistributedData"
    ):
        run(tmp_path / "two", 2, "fsdp2", config={"adapter_bits": 1})


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(tmp_path, alone, stage):
    """DeepSpeed's engine steps before Trainer calls the callbacks, and keeps weights and optimizer state in parts."""
    assert_same(run(tmp_path / "two", 2, f"zero{stage}", gradient_accumulation_steps=2), alone)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_with_k_bits(tmp_path, stage):
    """DeepSpeed's optimizer writes to the weights without autograd's knowledge."""
    config = {"adapter_bits": 2, "r": 4}
    expected = run(tmp_path / "one", 1, "ddp", config=config)
    assert_same(run(tmp_path / "two", 2, f"zero{stage}", config=config), expected)


def test_bf16_autocast(tmp_path):
    """The ranks agree (in `run`); two halves of a batch are rounded differently from the whole."""
    run(tmp_path / "two", 2, "ddp", bf16=True)


def test_a_short_last_batch(tmp_path):
    """With 30 examples in batches of 8, one process has four of the last six and the other has two."""
    result = run(tmp_path / "two", 2, "ddp", examples=30, accelerator_config={"even_batches": False})
    assert sum(not on for mask in result["masks"].values() for on in mask) == 2 * 4


@pytest.fixture(scope="module")
def plain_loop(tmp_path_factory):
    """Return `run(**options)`, which trains in one process in a plain loop."""
    folder = tmp_path_factory.mktemp("loop")
    results = {}

    def run_once(**options):
        key = json.dumps(options)
        if key not in results:
            results[key] = (run(folder / str(len(results)), 1, "loop", **options), folder / str(len(results)))
        return results[key]

    return run_once


def test_loop(tmp_path, plain_loop):
    assert_same(run(tmp_path / "two", 2, "loop"), plain_loop()[0])


def test_a_process_without_data(tmp_path):
    """It takes part in the reduction with zeros, so that no process waits for it and all agree."""
    result = run(tmp_path / "two", 2, "loop", short=True)
    assert sum(not on for mask in result["masks"].values() for on in mask) == 2 * 4


def test_a_process_whose_gradient_overflows(tmp_path):
    """The step counts in no process."""
    assert run(tmp_path / "two", 2, "loop", overflow=True)["steps"] == [2, 1]


@pytest.mark.parametrize(
    ("layout", "accumulation", "config"),
    [
        ("fsdp2", 1, {}),
        ("fsdp2", 2, {"use_dora": True}),
        ("fsdp2", 1, {"criterion": "weight_norm", "mask_scope": "head"}),
        ("fsdp2-units", 2, {"lora_bias": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor")  # PEFT about lora_bias
def test_fsdp2(tmp_path, plain_loop, layout, accumulation, config):
    expected, one = plain_loop(config=config)
    two = tmp_path / "two"
    assert_same(run(two, 2, layout, accumulation=accumulation, config=config), expected)
    weights, expected_weights = (load_file(folder / "adapter_model.safetensors") for folder in (two, one))
    assert {key: value.shape for key, value in weights.items()} == {k: v.shape for k, v in expected_weights.items()}
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-5)
    model = PeftModel.from_pretrained(tiny.make("vit"), two)
    assert {name: mask.tolist() for name, mask in get_head_masks(model).items()} == expected["masks"]
