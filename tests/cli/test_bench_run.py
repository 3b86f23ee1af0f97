"""A newcomer's whole path: check the tree, sweep, report; with the same results on two processes as on one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import trees
from PIL import Image

from peft_heads.benchmark.records.results import read_results
from peft_heads.cli.bench_arguments import build_parser, read_method, read_recipe
from peft_heads.cli.main import main


SIZES = {"train800": 37, "val200": 16, "train800val200": 53, "test": 19}
SHORT = "--epochs 3 --batch_size 16 --warmup_epochs 1 --learning_rate 1e-2 --any_size --use_cpu"
HEADS = "--head_warmup_epochs 2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    for name in ("cifar", "eurosat"):
        trees.write_vtab(root / "vtab", trees.small(name, "vtab", sizes=SIZES))
    trees.write_few_shot(root / "fewshot", trees.small("food101", "fewshot"), shots=(1, 2))
    flowers = trees.small("OxfordFlower", "fgvc", num_classes=102, sizes={"train": 102, "val": 102, "test": 102})
    trees.write_fgvc(root / "fgvc", flowers)
    for name in ("vit", "swin"):
        tiny.make(name).save_pretrained(root / name)
    return root


def words(root, out, data="vtab", model="vit", more=""):
    places = (
        f"--data_root {root}/{data} --output_dir {out} --cache_dir {root}/cache --model_name_or_path {root}/{model}"
    )
    return f"{places} {SHORT} {more}".split()


def accuracies(folder):
    return {run.spec.run_id: run.result.accuracy for run in read_results(folder, unofficial=True)}


@pytest.mark.slow
def test_check_sweep_report(root, tmp_path, capsys):
    assert main(["data", "check", str(root / "vtab"), "--task", "cifar"]) == 1  # a small tree is not VTAB-1K
    assert "train800" in capsys.readouterr().out
    sweep = [*words(root, tmp_path / "out", more=f"{HEADS} --task cifar eurosat --ne 0 1 --scale 0.1 10 --seed 0 1")]
    sweep += ["--criterion", "absolute"]
    assert main(["bench", "sweep", *sweep, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("8 runs to choose by, 8 to report\n") and "published: 76.40 %  lora" in printed
    assert main(["bench", "sweep", *sweep]) == 0
    printed = capsys.readouterr()
    assert "scale per task chosen on val200" in printed.out and "cifar" in printed.out
    assert "16/16" not in printed.err and "8/8" in printed.err
    assert len(accuracies(tmp_path / "out")) == 16
    report = tmp_path / "out" / "report"
    assert {"report.md", "accuracy.csv", "accuracy.tex", "accuracy_against_ne.png"} <= {
        p.name for p in report.iterdir()
    }
    # nothing is run again, and the report command finds the same results
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    assert main(["bench", "sweep", *sweep]) == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    capsys.readouterr()
    assert main(["bench", "report", str(tmp_path / "out"), "--unofficial"]) == 0
    assert capsys.readouterr().out.strip() in (report / "report.md").read_text()


def test_run(root, tmp_path, capsys):
    arguments = words(root, tmp_path / "out", more="--task cifar --method lora --scale 1 --r 4 --seed 5")
    assert main(["bench", "run", *arguments]) == 0
    (run,) = read_results(tmp_path / "out", unofficial=True)
    assert run.spec.seed == 5 and run.spec.method.to_json() == {"name": "lora", "r": 4, "scale": 1}
    assert f"{100 * run.result.accuracy:6.2f} %" in capsys.readouterr().out
    assert main(["bench", "run", *arguments, "--validation"]) == 0
    assert {run.spec.eval_split for run in read_results(tmp_path / "out", unofficial=True)} == {"test", "val200"}


def test_few_shot(root, tmp_path, capsys):
    pytest.importorskip("kornia")
    few = words(root, tmp_path / "out", "fewshot", more="--suite fewshot --task food101 --method lora --scale 1 --r 4")
    assert main(["bench", "sweep", *few, "--shots", "1", "2", "--seed", "0"]) == 0
    runs = read_results(tmp_path / "out", unofficial=True)
    assert {(run.spec.shots, run.spec.list_seed) for run in runs} == {(s, i) for s in (1, 2) for i in (0, 1, 2)}
    assert (tmp_path / "out" / "report" / "accuracy_by_shots.png").exists()


def test_few_shot_without_augmentation(root, tmp_path, monkeypatch):
    """Without kornia the command runs until it needs it, and says what is missing."""
    import importlib.util

    import peft_heads.data.augmentation as augmentation

    monkeypatch.setattr(augmentation, "find_spec", lambda name: importlib.util.find_spec(name + "_gone"))
    few = words(root, tmp_path / "out", "fewshot", more="--suite fewshot --task food101 --method lora --scale 1 --r 4")
    assert main(["bench", "run", *few, "--shots", "1"]) == 2


# scikit-learn, of as many classes as images
@pytest.mark.filterwarnings("ignore:The number of unique classes is greater than 50%:UserWarning")
@pytest.mark.parametrize("model", ["vit", "swin"])
def test_fgvc(root, tmp_path, model):
    heads = "--ratio 0.5" if model == "swin" else "--ne 1"
    more = f"{HEADS} --suite fgvc --task OxfordFlower {heads} --scale 1 --criterion absolute --r 4"
    assert main(["bench", "run", *words(root, tmp_path / "out", "fgvc", model, more)]) == 0
    (run,) = read_results(tmp_path / "out", unofficial=True)
    assert run.spec.recipe["drop_path_by"] == ("config" if model == "swin" else "hooks")
    assert run.spec.preprocessing["augmentation"]["random_crop"] and run.spec.preprocessing["eval"]["size"] == 16
    counts = {mask.count(False) for mask in run.result.masks.values()}
    assert counts == ({1, 2} if model == "swin" else {1})  # stages of 2 and 4 heads


@pytest.mark.slow
def test_two_processes(root, tmp_path):
    """Heads and accuracy are those of one process, although each process draws its own dropout and drop path."""
    more = f"{HEADS} --task cifar --ne 0 1 --scale 1 10 --criterion absolute --seed 0 --drop_path 0 --bottleneck_dropout 0"
    assert main(["bench", "sweep", *words(root, tmp_path / "one", more=more)]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "-m", "peft_heads", "bench", "sweep", *words(root, tmp_path / "two", more=more)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("accuracy on test") == 1
    one, two = ({r.spec.run_id: r for r in read_results(tmp_path / name, unofficial=True)} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 6
    for run_id, run in one.items():
        assert two[run_id].environment.num_processes == 2
        assert two[run_id].result.masks == run.result.masks
        assert two[run_id].result.accuracy == pytest.approx(run.result.accuracy)
        assert two[run_id].result.epoch_losses == pytest.approx(run.result.epoch_losses, rel=1e-3)


# Arguments


def parse(*arguments, lists=True):
    return build_parser("sweep", "", lists).parse_args(["--data_root", "d", "--output_dir", "o", *arguments])


def test_defaults_are_the_papers():
    method = read_method(parse())
    assert method == {
        "name": "head-masked-lora",
        "r": 32,
        "adapter_bits": 1,
        "bottleneck_dropout": 0.1,
        "scale": [0.01, 0.1, 1, 10, 100],
        "ne": [0, 1, 3, 6],
        "criterion": ["absolute", "positive", "negative"],
    }
    recipe = read_recipe(parse())
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (100, 64, 1e-3, 1e-4)
    assert (recipe.drop_path, recipe.warmup_epochs, recipe.head_warmup_epochs) == (0.1, 10, 10)
    assert recipe.eval_images["normalization"] == "none" and recipe.eval_images["resize"] == "squash"
    assert recipe.expected["lora"] == 76.4
    assert read_recipe(parse("--suite", "fewshot")).learning_rate == 5e-3


def test_given_arguments():
    method = read_method(parse("--ratio", "0.25", "0.5", "--lora_alpha", "8", "--joint", "false", "true"))
    assert "ne" not in method and "scale" not in method
    assert method["ratio"] == [0.25, 0.5] and method["lora_alpha"] == 8 and method["joint"] == [False, True]
    recipe = read_recipe(
        parse("--epochs", "70", "--drop_last", "false", "--normalization", "half", "--drop_path", "0")
    )
    assert (recipe.epochs, recipe.drop_last, recipe.drop_path) == (70, False, 0)
    assert recipe.train_images["normalization"] == recipe.eval_images["normalization"] == "half"
    recipe = read_recipe(parse("--image_range", "-1000", "400.5"))
    assert recipe.train_images["image_range"] == recipe.eval_images["image_range"] == [-1000, 400.5]
    assert "image_range" not in read_recipe(parse()).train_images
    assert read_method(parse("--method", "linear")) == {"name": "linear"}
    assert read_method(parse("--method", "rlrr")) == {"name": "rlrr", "r": 1}
    rlrr = read_method(parse("--method", "rlrr", "--init", "zero", "kaiming", "--residual", "false", "--ne", "0", "1"))
    assert (rlrr["init"], rlrr["residual"], rlrr["ne"]) == (["zero", "kaiming"], False, [0, 1])
    peft = json.dumps({"peft_type": "LOHA"})
    assert read_method(parse("--method", "peft", "--peft_config", peft, lists=False))["peft_config"] == peft


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--ne 1", "one setting is run: give --scale, --criterion (bench sweep tries several values)"),
        ("--ne 1 --scale 1 --criterion absolute --task cofar", "unknown task 'cofar' in the suite 'vtab'"),
        ("--method linear --ne 1", "--ne does not apply to --method linear"),
        ("--method rlrr --lora_alpha 4", "--lora_alpha does not apply to --method rlrr"),
        ("--method linear --normalization imagenets", "normalization='imagenets' is not one of"),
        (
            "--method linear --image_range 5 5",
            "image_range=[5, 5] must be two finite numbers, LOW HIGH, with LOW below",
        ),
        ("--method linear --batch_size 0", "batch_size must be positive; got 0"),
        ("--method linear --warmup_epochs 3", "must be below epochs; got 3 of 3"),
        ("--method linear --drop_path 1", "drop_path must be in [0, 1); got 1"),
    ],
)
def test_bad_arguments(root, tmp_path, capsys, more, message):
    assert main(["bench", "run", *words(root, tmp_path / "out", more=more)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tree_of_another_size(root, tmp_path, capsys):
    arguments = words(root, tmp_path / "out", more="--task cifar --method linear")
    arguments.remove("--any_size")
    assert main(["bench", "run", *arguments]) == 1
    error = capsys.readouterr().err
    assert "1 runs failed" in error and "1,000" in error


def test_images_of_more_than_8_bits(tmp_path, root, capsys):
    """The values of black and white are part of the run."""
    noise = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, name in enumerate(["low", "high"]):
            folder = tmp_path / "data" / "scans" / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                values = noise.integers(0, 300, (16, 16)) + 700 * label - 500
                Image.fromarray(values.astype(np.int32)).save(folder / f"{index}.tif")
    arguments = words(root, tmp_path / "out", more="--suite folder --method linear --seed 0")
    arguments[1] = str(tmp_path / "data")
    assert main(["bench", "run", *arguments]) == 1
    error = capsys.readouterr().err
    assert "train/high/0.tif cannot be read: its values are 32-bit" in error and "--image_range LOW HIGH" in error
    longer = ["--epochs", "40", "--learning_rate", "0.1"]  # to 100 % whatever the weights begin with
    assert main(["bench", "run", *arguments, *longer, "--image_range", "-500", "500"]) == 0
    assert "image_range=-500 to 500" in capsys.readouterr().out
    (run,) = read_results(tmp_path / "out", unofficial=True)
    assert (
        run.spec.preprocessing["train"]["image_range"] == run.spec.preprocessing["eval"]["image_range"] == [-500, 500]
    )
    assert run.result.accuracy == 1
    fingerprints = run.environment.data_fingerprint
    assert {len(part["content_sha256"]) for part in fingerprints.values()} == {64}


def test_images_of_your_own(tmp_path, root, capsys):
    for split in ("train", "val", "test"):
        for label, name in enumerate(["ant", "bee"]):
            folder = tmp_path / "data" / "insects" / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                trees.picture(label, 2, index).save(folder / f"{index}.jpg")
    arguments = words(root, tmp_path / "out", more="--suite folder --method lora --r 4 --scale 1 10 --seed 0")
    arguments[1] = str(tmp_path / "data")
    assert main(["bench", "sweep", *arguments]) == 0
    assert "insects" in capsys.readouterr().out
    runs = read_results(tmp_path / "out", unofficial=True)
    assert [(run.spec.train_split, run.spec.eval_split) for run in runs].count(("train", "test")) == 1
