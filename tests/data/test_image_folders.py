"""A user's own data set as a task."""

import os
import shutil

import numpy as np
import pytest
import trees
from PIL import Image

from peft_heads.data.image_folders import check_folders, folder_task, folder_tasks, load_folder_split


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for label, name in enumerate(["ant", "bee hive"]):
            folder = tmp_path / "insects" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                trees.picture(label, 2, index).save(folder / f"{index}.{'png' if split == 'val' else 'jpg'}")
    (tmp_path / "insects" / "train" / "ant" / ".DS_Store").write_text("hidden")
    (tmp_path / "other").mkdir()
    return tmp_path


def test_tasks_are_folders_with_train(root):
    (task,) = folder_tasks(root)
    assert (task.name, task.suite, task.num_classes) == ("insects", "folder", 2)
    assert folder_task(root, "insects") == task


def test_splits(root):
    task = folder_task(root, "insects")
    train, val, test = (load_folder_split(root, task, split) for split in ("train", "val", "test"))
    assert train.dataset["label"] == [0, 0, 0, 1, 1, 1] and len(val.dataset) == 4 and len(test.dataset) == 2
    assert train.dataset.features["label"].names == ["ant", "bee hive"]
    assert [os.path.relpath(row["path"], root) for row in train.dataset["image"]][3:] == [
        f"insects/train/bee hive/{i}.jpg" for i in range(3)
    ]
    assert (train.image_format, val.image_format) == ("JPEG", "PNG")
    assert len({split.fingerprint for split in (train, val, test)}) == 3
    before = train.fingerprint
    (root / "insects" / "train" / "ant" / "2.jpg").unlink()
    assert load_folder_split(root, task, "train").fingerprint != before


def names_of(root, split="train"):
    found = load_folder_split(root, folder_task(root, "insects"), split)
    return [os.path.relpath(row["path"], root / "insects" / split) for row in found.dataset["image"]]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir"])
def test_hidden_folders_are_passed_over(root, hidden):
    """They are skipped at every depth; they hold copies, or no images."""
    before = names_of(root)
    (root / "insects" / "train" / "ant" / "site").mkdir()
    for place in ("train", "train/ant", "train/ant/site", "."):
        folder = root / "insects" / place / hidden
        folder.mkdir()
        (folder / "0-checkpoint.jpg").write_bytes((root / "insects/train/ant/0.jpg").read_bytes())
        (folder / "train").mkdir()
    (root / hidden / "train").mkdir(parents=True)
    assert names_of(root) == before
    assert [task.name for task in folder_tasks(root)] == ["insects"]


def test_folders_in_classes_and_linked_ones(root):
    """Any depth and links within the task's folder work; rows are in the order of the paths."""
    home = root / "insects"
    (home / "store" / "deep").mkdir(parents=True)
    trees.picture(0, 2, 7).save(home / "store" / "9.jpg")
    trees.picture(0, 2, 8).save(home / "store" / "deep" / "10.jpg")
    (home / "train" / "ant" / "site").symlink_to(home / "store")
    (home / "train" / "ant" / "0 site").symlink_to("../../store/deep")
    (home / "train" / "ant" / "again.jpg").symlink_to("0.jpg")
    expected = ["0 site/10.jpg", "0.jpg", "1.jpg", "2.jpg", "again.jpg", "site/9.jpg", "site/deep/10.jpg"]
    assert names_of(root)[:7] == [f"ant/{name}" for name in expected]


@pytest.mark.parametrize("where", ["train/ant/site", "train/ant/site/deeper"])
def test_linked_folders_that_lead_out(root, tmp_path_factory, where):
    outside = tmp_path_factory.mktemp("outside")
    trees.picture(0, 2).save(outside / "0.jpg")
    link = root / "insects" / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{link} is a link to a folder outside of .*insects, {outside}: copy it"):
        names_of(root)
    link.unlink()
    link.symlink_to(root / "insects" / "gone")
    with pytest.raises(ValueError, match=f"train cannot be used: {where} is missing"):
        names_of(root)


def test_a_class_that_is_a_link(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    os.rename(root / "insects" / "train" / "ant", outside / "ant")
    (root / "insects" / "train" / "ant").symlink_to(outside / "ant")
    with pytest.raises(ValueError, match=r"train/ant/0.jpg leaves the task's folder by a link, to .*outside"):
        names_of(root)


@pytest.mark.parametrize("links", [{"ant/a": "ant"}, {"ant/a": "."}, {"ant/a": "bee hive", "bee hive/b": "ant"}])
def test_links_that_go_round_in_a_circle(root, links):
    for link, target in links.items():
        (root / "insects" / "train" / link).symlink_to(root / "insects" / "train" / target)
    with pytest.raises(ValueError, match="is a link to a folder that holds it, .*: remove the link"):
        names_of(root)


def test_pipes_and_devices(root):
    os.mkfifo(root / "insects" / "train" / "ant" / "pipe.jpg")
    with pytest.raises(ValueError, match=r"train cannot be used: train/ant/pipe.jpg is not a file"):
        names_of(root)


def test_fingerprint_of_the_content(root):
    task, path = folder_task(root, "insects"), root / "insects" / "train" / "ant" / "2.jpg"
    before, info = load_folder_split(root, task, "train"), path.stat()
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))  # size and time as before
    after = load_folder_split(root, task, "train")
    assert after.fingerprint == before.fingerprint and after.content_fingerprint != before.content_fingerprint


def test_check(root):
    (report,) = check_folders(root)
    assert (report.faults, report.notes, report.layout) == ((), (), "image folder")
    assert (report.images, report.image_format) == ({"train": 6, "val": 4, "test": 2}, "JPEG+PNG")
    values = np.arange(64, dtype=np.int32).reshape(8, 8)
    Image.fromarray(values).save(root / "insects" / "train" / "ant" / "scan.tif")
    (root / "insects" / "val" / "cat").mkdir()
    shutil.rmtree(root / "insects" / "test")
    (report,) = check_folders(root, ["insects"])
    assert report.faults[0].startswith("train/ant/scan.tif cannot be read: its values are 32-bit")
    assert "--image_range LOW HIGH" in report.faults[0] and "classes that" in report.faults[1]
    assert len(report.faults) == 2 and report.notes == ("there is no folder test",)
    (report,) = check_folders(root, image_range=(0, 63))
    assert len(report.faults) == 1
    with pytest.raises(FileNotFoundError, match="no folder .*other"):
        check_folders(root, ["other"])


def test_faults(root, tmp_path_factory):
    task = folder_task(root, "insects")
    with pytest.raises(FileNotFoundError, match=r"expected TASK/train/CLASS/IMAGE"):
        folder_tasks(root / "insects")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        folder_tasks(root / "gone")
    with pytest.raises(FileNotFoundError, match="no folder .*other"):
        folder_task(root, "other")
    with pytest.raises(
        FileNotFoundError, match=r"insects has no folder .*validation \(splits of 'folder': train, val"
    ):
        load_folder_split(root, task, "validation")
    (root / "insects" / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match="classes that .*train has not: cat"):
        load_folder_split(root, task, "val")
    (root / "insects" / "train" / "ant" / "notes.txt").write_text("no image")
    outside = tmp_path_factory.mktemp("outside") / "x.jpg"
    trees.picture(0, 2).save(outside)
    (root / "insects" / "train" / "ant" / "link.jpg").symlink_to(outside)
    with pytest.raises(ValueError, match="ant/link.jpg leaves the task's folder by a link.*ant/notes.txt is no image"):
        load_folder_split(root, task, "train")
    for path in (root / "insects" / "test").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(ValueError, match="it has no images"):
        load_folder_split(root, task, "test")
    (root / "single" / "train" / "one").mkdir(parents=True)
    with pytest.raises(ValueError, match="has 1 folders of classes; at least two"):
        folder_task(root, "single")
