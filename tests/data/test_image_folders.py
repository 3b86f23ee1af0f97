"""A data set of one's own as a task."""

import os

import pytest
import trees

from peft_heads.data.image_folders import folder_task, folder_tasks, load_folder_split


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
