from dataclasses import replace

import numpy as np
import pytest
import trees
from PIL import Image

from peft_heads.cli.main import main
from peft_heads.data.cache import CachedImages
from peft_heads.data.preprocessing import Preprocessing
from peft_heads.data.suites import SUITES
from peft_heads.data.trees import load_split


CIFAR = trees.small("cifar", "vtab")


@pytest.fixture
def root(tmp_path):
    trees.write_vtab(tmp_path / "root", CIFAR)
    return tmp_path / "root"


def run(capsys, *argv):
    code = main(["data", *map(str, argv)])
    return code, capsys.readouterr().out.splitlines()


def test_check_of_a_tree_with_faults(root, capsys):
    code, lines = run(capsys, "check", root)
    assert code == 1 and lines[-1] == "0 of 19 tasks in order"
    assert lines[:6] == [
        "cifar                  4 faults; text lists, JPEG",
        "    train800 8, val200 4, train800val200 12, test 6",
        "    train800.txt lists 8 images, 800 expected",
        "    val200.txt lists 4 images, 200 expected",
        "    train800val200.txt lists 12 images, 1,000 expected",
        "    test.txt lists 6 images, 10,000 expected",
    ]
    assert f"    no folder dtd (or dtd47) in {root}" in lines
    code, lines = run(capsys, "check", root, "--task", "dtd", "kitti", "DTD")
    assert code == 1 and lines[-1] == "0 of 2 tasks in order"


def test_check_of_a_tree_in_order(tmp_path, capsys, monkeypatch):
    pets = trees.small("oxford-pets", "fewshot")
    monkeypatch.setitem(SUITES, "fewshot", replace(SUITES["fewshot"], tasks=(pets,)))
    trees.write_few_shot(tmp_path, pets, repeat=2)
    code, lines = run(capsys, "check", tmp_path, "--suite", "fewshot")
    assert (code, lines[0], lines[-1]) == (
        0,
        "oxford-pets            in order; few-shot lists, JPEG",
        "1 of 1 tasks in order",
    )
    assert lines[1].startswith("    train (1 shots, seed 0) 3, train (1 shots, seed 1) 3, ")
    assert "    note: train (1 shots, seed 0): 3 lines repeat others and are left out" in lines
    assert max(map(len, lines)) <= 100


def test_many_faults_are_counted(root, capsys):
    for path in root.glob("cifar/images/train800val200/*"):
        path.unlink()
    _, lines = run(capsys, "check", root, "--task", "cifar")
    assert lines[-2] == "    and 6 more" and len(lines) == 14


def test_check_of_images_of_more_than_8_bits(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SUITES, "vtab", replace(SUITES["vtab"], tasks=(CIFAR,)))
    trees.write_vtab(tmp_path, CIFAR)
    path = tmp_path / "cifar" / "images" / "test" / "000001.jpg"
    Image.fromarray(np.arange(64, dtype=np.float32).reshape(8, 8)).save(path, format="TIFF")
    code, lines = run(capsys, "check", tmp_path)
    assert code == 1 and lines[-1] == "0 of 1 tasks in order"
    assert lines[-2].startswith("    test.txt:2: 'images/test/000001.jpg' cannot be read: its values are 32-bit float")
    assert "--image_range LOW HIGH" in lines[-2]
    code, lines = run(capsys, "check", tmp_path, "--image_range", "-1", "63.5")
    assert code == 0 and lines[-1] == "1 of 1 tasks in order"
    assert main(["data", "check", str(tmp_path), "--image_range", "5", "1"]) == 2
    assert "image_range=[5.0, 1.0] must be two finite numbers" in capsys.readouterr().err


def test_check_of_one_s_own_images(tmp_path, capsys):
    for split in ("train", "val", "test"):
        for label, name in enumerate(["ant", "bee"]):
            (tmp_path / "insects" / split / name).mkdir(parents=True)
            trees.picture(label, 2).save(tmp_path / "insects" / split / name / "0.png")
    code, lines = run(capsys, "check", tmp_path, "--suite", "folder")
    assert (code, lines) == (
        0,
        [
            "insects                in order; image folder, PNG",
            "    train 2, val 2, test 2",
            "1 of 1 tasks in order",
        ],
    )
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tmp_path / "insects" / "test" / "ant" / "scan.tif")
    code, lines = run(capsys, "check", tmp_path, "--suite", "folder", "--task", "insects")
    assert code == 1 and "    test/ant/scan.tif cannot be read: its values are 32-bit" in "\n".join(lines)


def test_wrong_arguments(tmp_path, capsys):
    for argv, message in (
        (["check", tmp_path / "nowhere"], f"{tmp_path / 'nowhere'} is not a folder"),
        (["check", tmp_path, "--task", "svhm"], "unknown task 'svhm' in the suite 'vtab': did you mean svhn?"),
    ):
        assert main(["data", *map(str, argv)]) == 2
        assert capsys.readouterr().err == f"peft-heads data: error: {message}\n"


@pytest.mark.parametrize("by_environment", [True, False])
def test_info_and_clean(root, tmp_path, capsys, monkeypatch, by_environment):
    cache = tmp_path / "cache"
    if by_environment:
        monkeypatch.setenv("PEFT_HEADS_CACHE", str(cache))
    where = [] if by_environment else ["--cache_dir", cache]
    entry = CachedImages(load_split(root, CIFAR, "train800"), Preprocessing(size=8), cache_dir=cache).entry
    shown = [
        f"{entry.size:>16,} bytes  vtab cifar train800, 8 images",
        f"{entry.size:>16,} bytes in {cache}",
    ]
    assert run(capsys, "info", *where) == (0, shown)
    assert entry.path.exists()
    assert run(capsys, "clean", *where) == (0, [*shown, f"{entry.size:>16,} bytes deleted"])
    assert not entry.path.exists()
    assert run(capsys, "info", *where) == (0, [f"{0:>16,} bytes in {cache}"])
