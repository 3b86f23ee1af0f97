"""A package with a criterion and a method (tests/fixtures/plugin): installed, and named by `--plugin`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peft_heads


PLUGIN = Path(__file__).parents[1] / "fixtures" / "plugin"
PACKAGE = [str(Path(peft_heads.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
LOAD = """
import sys
from peft import PeftModel
from peft_heads import load_image_classifier, loaded_plugins
from safetensors.torch import load_file
folder, again = sys.argv[1:]
assert loaded_plugins() == {"peft-heads-example": "0.3"}
model, _ = load_image_classifier(folder)
model.save_pretrained(again)
one, other = (load_file(f"{path}/adapter_model.safetensors") for path in (folder, again))
assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
print(model.peft_config["default"].peft_type, sum("gain_factor" in key for key in one), model.config.id2label)
model = PeftModel.from_pretrained(model.unload(), folder)  # the type is known from the import on
assert type(model.base_model).__name__ == "GainModel"
"""


def environment(*folders):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*map(str, folders), *PACKAGE])}


def run(*words, path=(), cwd=None, code=0):
    """Return what `python WORDS` prints."""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, env=environment(*path), cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip has installed the plugin."""
    root = tmp_path_factory.mktemp("installed")
    shutil.copytree(PLUGIN, root / "source")  # pip builds in the source folder
    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "--target", root / "site", root / "source")
    return root / "site"


@pytest.fixture
def not_installed(tmp_path):
    """A folder that holds the plugin's module, to be the current one."""
    shutil.copytree(PLUGIN / "peft_heads_example", tmp_path / "here" / "peft_heads_example")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def train(checkpoint, folders):
    words = ["-m", "peft_heads", "train", "--use_cpu", "--model_name_or_path", checkpoint, "--max_steps=4"]
    words += ["--train_dir", folders / "train", "--cache_dir", folders / "cache", "--per_device_train_batch_size=2"]
    return [*words, "--learning_rate=1e-2"]


@pytest.fixture(scope="module")
def bench(checkpoint, folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    for split, images in (("train", "train"), ("val", "validation"), ("test", "validation")):
        shutil.copytree(folders / images, root / "data" / "pictures" / split)
    words = ["--suite", "folder", "--data_root", root / "data", "--cache_dir", root / "cache", "--seed", "0"]
    words += ["--model_name_or_path", checkpoint, "--use_cpu", "--epochs", "3", "--batch_size", "8"]
    return [*words, "--warmup_epochs", "1", "--drop_path", "0"]


def results(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "unofficial").rglob("*.json"))] + [
        json.loads(path.read_text()) for path in sorted((folder / "official").rglob("*.json"))
    ]


def assert_selected_by(folder, criterion):
    """Check that the deactivated heads are those with the lowest scores."""
    report = json.loads((folder / "head_scores.json").read_text())
    assert report["criterion"] == criterion
    total = sum(torch.tensor(scores, dtype=torch.float64) for scores in report["scores"][criterion].values())
    assert set(map(tuple, report["deactivated_heads"].values())) == {(int(total.argmin()),)}


def test_it_is_small():
    files = [path for path in PLUGIN.rglob("*") if path.suffix in (".py", ".toml")]
    assert len(files) == 3 and sum(len(path.read_text("utf-8").splitlines()) for path in files) <= 120


@pytest.mark.slow
def test_an_installed_method(installed, train, bench, tmp_path):
    out, _ = run(*train, "--method", "gain", "--init_gain=1.5", "--output_dir", tmp_path / "out", path=[installed])
    assert "method              gain" in out
    out, _ = run(*train[:3], "--method", "gain", "--help", path=[installed])
    assert "--init_gain INIT_GAIN Factor at the beginning; 1 changes nothing (default 1)." in " ".join(out.split())

    out, _ = run("-m", "peft_heads", "inspect", tmp_path / "out", path=[installed])
    assert "method               GAIN" in out and "init_gain=1.5" in out and "gains multiply" in out
    assert "# Gains" in (tmp_path / "out" / "README.md").read_text("utf-8")
    out, _ = run("-c", LOAD, tmp_path / "out", tmp_path / "again", path=[installed])
    assert "GAIN 4 {0: " in out

    words = ["-m", "peft_heads", "bench", "run", *bench, "--method", "gain", "--init_gain", "1.5"]
    run(*words, "--output_dir", tmp_path / "results", path=[installed])
    (result,) = results(tmp_path / "results")
    assert result["spec"]["method"] == {"name": "gain", "init_gain": 1.5}
    assert result["environment"]["versions"]["peft-heads-example"] == "0.3"


@pytest.mark.slow
def test_an_installed_criterion(installed, train, bench, tmp_path):
    heads = ["--ne", "1", "--criterion", "per_weight"]
    run(*train, *heads, "--head_select_at=3", "--output_dir", tmp_path / "out", path=[installed])
    assert_selected_by(tmp_path / "out", "per_weight")
    words = [
        "-m",
        "peft_heads",
        "bench",
        "run",
        *bench,
        *heads,
        "--scale",
        "1",
        "--r",
        "2",
        "--head_warmup_epochs",
        "2",
    ]
    run(*words, "--output_dir", tmp_path / "results", path=[installed])
    (result,) = results(tmp_path / "results")
    assert result["spec"]["method"]["criterion"] == "per_weight"
    assert {sum(not on for on in mask) for mask in result["result"]["masks"].values()} == {1}

    # elsewhere, without the plugin
    out, error = run("-m", "peft_heads", "inspect", tmp_path / "out")
    assert "criterion=per_weight" in out and "of 3" in out
    assert "criterion 'per_weight', which is not registered here" in error


@pytest.mark.slow
def test_a_module_that_is_not_installed_on_two_processes(not_installed, train, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["--plugin", "peft_heads_example", "--criterion=per_weight", "--head_select_at=3"]
    out, _ = run(*launcher, *train, *words, "--output_dir", tmp_path / "out", cwd=not_installed)
    assert out.count("deactivated heads  ") == 1
    assert_selected_by(tmp_path / "out", "per_weight")
    _, error = run(*train[:3], *words[2:], cwd=not_installed, code=2)
    assert "invalid choice: 'per_weight'" in error


@pytest.mark.slow
def test_workers_of_a_sweep(not_installed, bench, tmp_path):
    pytest.importorskip("optuna")
    words = [sys.executable, "-m", "peft_heads", "bench", "sweep", *map(str, bench)]
    words += ["--plugin", "peft_heads_example", "--method", "gain", "--init_gain", "0.5", "1.5", "--tune", "init_gain"]
    words += ["--storage", f"sqlite:///{tmp_path}/sweep.db"]
    workers = [
        subprocess.Popen(
            [*words, "--output_dir", tmp_path / name],
            env=environment(),
            cwd=not_installed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for worker in workers:
        _, error = worker.communicate(timeout=300)
        assert worker.returncode == 0, error
    found = results(tmp_path / "one")
    assert {run["spec"]["method"]["init_gain"] for run in found} == {0.5, 1.5}
    assert {run["environment"]["versions"]["peft_heads_example"] for run in found} == {""}
