"""`train_dir` and `validation_dir`: files that `datasets` silently leaves out or misinterprets."""

import json
import os

import pytest
import trees
from datasets import Image

from peft_heads.data.images import label_names, load_image_dataset


PLAIN = [("ant/0.png", 0), ("ant/1.png", 0), ("bee/0.png", 1), ("bee/1.png", 1)]


@pytest.fixture
def root(tmp_path):
    for label, name in enumerate(["ant", "bee"]):
        (tmp_path / "my [pics]" / name).mkdir(parents=True)
        for index in range(2):
            trees.picture(label, 2, index).save(tmp_path / "my [pics]" / name / f"{index}.png")
    return tmp_path / "my [pics]"


@pytest.fixture
def load(root, tmp_path):
    """Return the paths and labels of the loaded images, in order."""

    def load(folder=root):
        data = load_image_dataset(train_dir=str(folder), train_val_split=0, cache_dir=str(tmp_path / "cache"))
        assert label_names(data) == ["ant", "bee"]
        rows = data["train"].cast_column("image", Image(decode=False))
        return [(os.path.relpath(row["image"]["path"], folder), row["label"]) for row in rows]

    return load


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", "@eaDir"])
def test_hidden_folders(root, load, hidden):
    for place in (root / hidden, root / "ant" / hidden):
        place.mkdir()
        (place / "0.png").write_bytes((root / "ant" / "0.png").read_bytes())
    assert load() == PLAIN


def test_linked_classes_and_files(root, load, tmp_path):
    """Rows are in the order of the paths, as without links."""
    os.rename(root / "bee", root / ".store")
    (root / "bee").symlink_to(root / ".store")
    (root / "ant" / "2.png").symlink_to("1.png")
    (tmp_path / "link").symlink_to(root)
    assert load() == [*PLAIN[:2], ("ant/2.png", 0), *PLAIN[2:]]
    assert load(tmp_path / "link") == [*PLAIN[:2], ("ant/2.png", 0), *PLAIN[2:]]


def test_linked_classes_of_one_split(root, load, tmp_path):
    """Both splits have the same classes, and a single folder is no class."""
    load_both = {"train_dir": str(root), "validation_dir": str(tmp_path / "val"), "cache_dir": str(tmp_path / "c")}
    (tmp_path / "val" / "store").mkdir(parents=True)
    trees.picture(1, 2, 9).save(tmp_path / "val" / "store" / "0.png")
    with pytest.raises(ValueError, match="differs|no training image has: store"):
        load_image_dataset(**load_both)
    os.rename(tmp_path / "val" / "store", tmp_path / "val" / ".bee")
    (tmp_path / "val" / "bee").symlink_to(".bee")
    data = load_image_dataset(**load_both)
    assert label_names(data) == ["ant", "bee"] and data["validation"]["label"][:] == [1]
    assert data["validation"][0]["image"].size == (20, 16)
    with pytest.raises(ValueError, match="no label column"):
        load_image_dataset(validation_dir=str(tmp_path / "val"), cache_dir=str(tmp_path / "c"))


def test_links_that_lead_out(root, load, tmp_path):
    os.rename(root / "bee", tmp_path / "bee")
    (root / "bee").symlink_to(tmp_path / "bee")
    with pytest.raises(ValueError, match=r"bee is a link to a folder outside of .*pics\], .*bee: copy it there"):
        load()


def test_pipes(root, load):
    os.mkfifo(root / "ant" / "2.PNG")
    with pytest.raises(ValueError, match=r"image .*ant/2.PNG cannot be read: is not a regular file"):
        load()


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (
            {"ant/0.png": "ant/site/0.png"},
            r"different depths in .*pics\], ant/1.png and ant/site/0.png: there should be one",
        ),
        ({"ant/0.png": "0.png"}, r"different depths in .*, 0.png and ant/1.png"),
        (
            {f"{name}/{i}.png": f"{name}/site{i}/x.png" for name in ("ant", "bee") for i in (0, 1)},
            r"2 folders deep in .*, such as ant/site0/x.png, whose class could be ant or site0: there should be one",
        ),
    ],
)
def test_depths(root, load, moves, message):
    for source, target in moves.items():
        (root / target).parent.mkdir(exist_ok=True)
        os.rename(root / source, root / target)
    with pytest.raises(ValueError, match=message):
        load()


def test_one_folder_around_the_classes(root, load):
    (root / "train").mkdir()
    for name in ("ant", "bee"):
        os.rename(root / name, root / "train" / name)
    assert load() == [(f"train/{name}", label) for name, label in PLAIN]


def test_metadata_that_replaces_the_labels(root, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}

    def write(column, value):
        lines = [json.dumps({"file_name": path, column: value}) for path, _ in PLAIN]
        (root / "metadata.jsonl").write_text("\n".join(lines))

    write("caption", "x")
    message = r"no label column 'label'.*metadata.jsonl replaces the sub-folders as labels: write the labels into it"
    with pytest.raises(ValueError, match=message):
        load_image_dataset(train_dir=str(root), **cache)
    os.rename(root, tmp_path / "pics")  # `datasets` takes brackets in a data set's name for a pattern
    with pytest.raises(ValueError, match=message):
        load_image_dataset(str(tmp_path / "pics"), **cache)
    os.rename(tmp_path / "pics", root)
    write("label", "ant")
    data = load_image_dataset(train_dir=str(root), train_val_split=0, **cache)
    assert data["train"]["label"][:] == ["ant"] * 4
