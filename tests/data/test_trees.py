import json
import os
import re
import shutil
from dataclasses import replace
from hashlib import sha256

import datasets
import numpy as np
import pytest
import trees
from PIL import Image

from peft_heads.data.tasks import find_task
from peft_heads.data.trees import check_tree, load_split


CIFAR = trees.small("cifar", "vtab")
PETS = trees.small("oxford-pets", "fewshot")
BIRDS = trees.small("nabirds", "fgvc")
CUB = trees.small("cub", "fgvc")


@pytest.fixture
def vtab(tmp_path):
    trees.write_vtab(tmp_path, CIFAR)
    return tmp_path


def paths(split, folder):
    return [os.path.relpath(image["path"], folder) for image in split.dataset["image"]]


def add(file, *lines):
    file.write_text(file.read_text() + "".join(f"{line}\n" for line in lines))


# the published layouts


def test_vtab_text_lists(vtab):
    split = load_split(vtab, CIFAR, "train800")
    assert split.dataset.features == datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["0", "1", "2"])}
    )
    assert paths(split, vtab / "cifar")[:2] == ["images/train800/000000.jpg", "images/train800/000001.jpg"]
    assert split.dataset["label"][:] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert split.dataset[0]["image"]["bytes"] is None
    assert (split.layout, split.image_format, split.repeated, split.drawn) == ("text lists", "JPEG", 0, None)
    assert len(load_split(vtab, CIFAR, "train800val200").dataset) == 12
    assert len(load_split(vtab, CIFAR, "test").dataset) == 6


def test_vtab_json_lists_draw_the_validation_split(tmp_path):
    task = trees.small("kitti", "vtab", sizes={"train800": 40, "val200": 10, "train800val200": 50, "test": 6})
    trees.write_vtab(tmp_path, task, layout="json")
    whole, train, val = (load_split(tmp_path, task, name) for name in ("train800val200", "train800", "val200"))
    assert (whole.layout, whole.image_format, whole.drawn) == ("JSON lists", "PNG", None)
    assert train.drawn == val.drawn == "from train800val200.json with seed 0"
    folder = tmp_path / "kitti"
    assert sorted(paths(train, folder) + paths(val, folder)) == paths(whole, folder)
    assert len(val.dataset) == 10 and set(val.dataset["label"]) == {0, 1, 2}
    assert paths(val, folder) != paths(whole, folder)[40:]
    assert paths(val, folder) == paths(load_split(tmp_path, task, "val200"), folder)
    shutil.copy(folder / "test.json", folder / "val200.json")  # a list of its own is taken as it is
    assert load_split(tmp_path, task, "val200", check_sizes=False).drawn is None


def test_few_shot_lists_with_repeats_and_spaces(tmp_path):
    trees.write_few_shot(tmp_path, PETS, repeat=2)
    split = load_split(tmp_path, PETS, "train", shots=1, list_seed=2)
    expected = [f"images/class {label}/an image 2.jpg" for label in range(3)]
    assert paths(split, tmp_path / "oxford-pets") == expected
    assert split.dataset["label"][:] == [0, 1, 2]
    assert (split.repeated, split.shots, split.list_seed) == (3, 1, 2)
    assert len(load_split(tmp_path, PETS, "train", shots=16, list_seed=0).dataset) == 48
    val = load_split(tmp_path, PETS, "val", shots=16, list_seed=0)
    assert len(val.dataset) == 6 and val.shots is None


def test_repeats_stay_where_the_published_size_counts_them(tmp_path):
    folder = trees.write_few_shot(tmp_path, PETS, shots=[1])
    lines = (folder / "annotations" / "test_meta.list").read_text().splitlines()
    (folder / "annotations" / "test_meta.list").write_text("\n".join(lines[:5] + lines[:1]))
    split = load_split(tmp_path, PETS, "test")
    assert len(split.dataset) == 6 and split.repeated == 0
    assert load_split(tmp_path, PETS, "test", check_sizes=False).repeated == 1


def test_few_shot_alias_and_images_beside_the_lists(tmp_path):
    task = trees.small("stanford-cars", "fewshot")
    trees.write_few_shot(tmp_path, task, folder="standford-cars", images="", shots=[1])
    split = load_split(tmp_path, task, "train", shots=1, list_seed=0)
    assert paths(split, tmp_path / "standford-cars")[0] == "class 0/an image 0.jpg"


@pytest.mark.parametrize(
    ("task", "images", "text_classes", "names"),
    [(BIRDS, "images", True, ["0295", "0296", "0297"]), (CUB, "Images", False, ["1", "2", "3"])],
)
def test_fgvc_classes_are_numbered_in_order(tmp_path, task, images, text_classes, names):
    folder = trees.write_fgvc(tmp_path, task, images=images, text_classes=text_classes)
    split = load_split(tmp_path, task, "val")
    assert split.dataset.features["label"].names == names
    assert split.dataset["label"][:] == [0, 1, 2, 0, 1, 2]
    assert paths(split, folder)[0] == f"{images}/001.Some_bird/val_0000.jpg"


def test_fgvc_numbers_are_sorted_as_numbers_over_all_lists(tmp_path):
    task = replace(CUB, num_classes=11, sizes={"train": 10, "val": 11, "test": 1})
    trees.write_fgvc(tmp_path, task)
    split = load_split(tmp_path, task, "test")
    assert split.dataset.features["label"].names == [str(number) for number in range(1, 12)]


def test_fingerprint(vtab):
    split = load_split(vtab, CIFAR, "val200")
    lines = [
        f"images/val200/{i:06}.jpg {i % 3} {(vtab / f'cifar/images/val200/{i:06}.jpg').stat().st_size}\n"
        for i in range(4)
    ]
    assert split.fingerprint == sha256("".join(lines).encode()).hexdigest()
    assert split.to_dict() == {
        "suite": "vtab",
        "task": "cifar",
        "split": "val200",
        "images": 4,
        "layout": "text lists",
        "image_format": "JPEG",
        "fingerprint": split.fingerprint,
        "content_fingerprint": split.content_fingerprint,
        "repeated": 0,
        "drawn": None,
        "shots": None,
        "list_seed": None,
    }


def test_fingerprint_of_the_content(vtab):
    split = load_split(vtab, CIFAR, "val200")
    lines = [
        f"images/val200/{i:06}.jpg {i % 3} "
        f"{sha256((vtab / f'cifar/images/val200/{i:06}.jpg').read_bytes()).hexdigest()}\n"
        for i in range(4)
    ]
    assert split.content_fingerprint == sha256("".join(lines).encode()).hexdigest()


DEEP = {
    "float.tif": np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8),
    "12bit.png": np.arange(64, dtype=np.uint16).reshape(8, 8),
    "int.tif": np.arange(64, dtype=np.int32).reshape(8, 8),
}


@pytest.mark.parametrize("name", DEEP)
def test_images_that_need_a_range(vtab, name):
    """Such images are recognised whatever the file is called."""
    path = vtab / "cifar" / "images" / "val200" / "000002.jpg"
    Image.fromarray(DEEP[name]).save(path, format=name[-3:].replace("tif", "tiff"))
    fault = r"val200.txt:3: 'images/val200/000002.jpg' cannot be read: its values .* give --image_range LOW HIGH"
    with pytest.raises(ValueError, match=rf"cifar \(val200\) in .*cannot be used: {fault}"):
        load_split(vtab, CIFAR, "val200")
    assert len(load_split(vtab, CIFAR, "val200", image_range=[0, 63]).dataset) == 4
    (report,) = check_tree(vtab, "vtab", [CIFAR])
    assert len(report.faults) == 1 and re.match(fault, report.faults[0])
    (report,) = check_tree(vtab, "vtab", [CIFAR], (0, 63))
    assert report.faults == ()
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(path, format="PNG")  # checked again
    assert len(load_split(vtab, CIFAR, "val200").dataset) == 4


@pytest.mark.parametrize("kind", ["PPM", "TIFF", "AVIF", "WEBP"])
def test_decompression_bombs(vtab, monkeypatch, kind):
    """The header is read even of formats that their first bytes do not identify."""
    path = vtab / "cifar" / "images" / "val200" / "000002.jpg"
    if f".{kind.lower()}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow reads no {kind}")
    Image.new("RGB", (300, 300)).save(path, format=kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 // 2 - 1)
    with pytest.raises(ValueError, match=r"val200.txt:3: '.*000002.jpg' cannot be read: .*decompression bomb"):
        load_split(vtab, CIFAR, "val200")


def test_damaged_images_of_more_than_8_bits(vtab):
    path = vtab / "cifar" / "images" / "val200" / "000002.jpg"
    noise = np.random.default_rng(0).integers(0, 65536, (32, 32)).astype(np.uint16)
    Image.fromarray(noise).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"val200.txt:3: '.*000002.jpg' cannot be read: "):
        load_split(vtab, CIFAR, "val200")


def test_image_format_is_that_of_the_content(vtab):
    Image.new("RGB", (4, 4)).save(vtab / "cifar/images/val200/000001.jpg", format="PNG")
    Image.new("RGB", (4, 4)).save(vtab / "cifar/images/val200/000002.jpg", format="WEBP")
    assert load_split(vtab, CIFAR, "val200").image_format == "JPEG+PNG+WEBP"


# faults


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("images/val200/999999.jpg 1", r"val200.txt:5: 'images/val200/999999.jpg' is missing"),
        (
            "images/val200/../../../secret.jpg 1",
            r"val200.txt:5: 'images/val200/\.\./.*' leaves the task's folder \(absolute",
        ),
        ("/etc/hostname 1", r"val200.txt:5: '/etc/hostname' leaves the task's folder \(absolute"),
        ("C:\\images\\1.jpg 1", r"val200.txt:5: 'C:.*' leaves the task's folder \(absolute"),
        ("images\\..\\..\\1.jpg 1", r"val200.txt:5: 'images.*' leaves the task's folder \(absolute"),
        ("images/val200 1", r"val200.txt:5: 'images/val200' is not a file"),
        ("cifar.txt 1", r"val200.txt:5: 'cifar.txt' is no image: it begins with b'not an i'"),
        ("empty.jpg 1", r"val200.txt:5: 'empty.jpg' is empty"),
        ("link.jpg 1", r"val200.txt:5: 'link.jpg' leaves the task's folder by a link, to .*outside.jpg"),
        ("linked/outside.jpg 1", r"val200.txt:5: 'linked/outside.jpg' leaves the task's folder by a link, to"),
        ("images/train800/000001.jpg 3", r"val200.txt:5: label 3 is not one of 3 classes \(0 to 2\)"),
        ("images/train800/000001.jpg -1", r"val200.txt:5: label -1 is not one of 3 classes"),
        ("images/train800/000001.jpg one", r"val200.txt:5: 'images.*one' is not an image's path, a space and a label"),
        ("7", r"val200.txt:5: '7' is not an image's path"),
        ("images/val200/000001.jpg 2", r"val200.txt:5: '.*' has label 2, but 1 in val200.txt:2"),
        ("images/train800/000001.jpg 1", r"val200.txt lists 5 images, 4 expected"),
        ("\x00.jpg 1", r"leaves the task's folder \(absolute"),
    ],
)
def test_a_faulty_line_is_named(vtab, line, fault):
    folder = vtab / "cifar"
    Image.new("RGB", (4, 4)).save(vtab / "outside.jpg")
    Image.new("RGB", (4, 4)).save(vtab / "secret.jpg")
    (folder / "cifar.txt").write_text("not an image")
    (folder / "empty.jpg").touch()
    (folder / "link.jpg").symlink_to(vtab / "outside.jpg")
    (folder / "linked").symlink_to(vtab)
    add(folder / "val200.txt", line)
    with pytest.raises(ValueError, match=rf"cifar \(val200\) in .*cifar cannot be used: .*{fault}"):
        load_split(vtab, CIFAR, "val200")
    assert len(load_split(vtab, CIFAR, "train800").dataset) == 8


def test_links_within_the_folder_and_a_linked_folder_are_followed(tmp_path, vtab):
    (vtab / "cifar" / "link.jpg").symlink_to("images/val200/000000.jpg")
    add(vtab / "cifar" / "val200.txt", "link.jpg 0")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cifar100").symlink_to(vtab / "cifar")
    assert len(load_split(tmp_path / "root", CIFAR, "val200", check_sizes=False).dataset) == 5


def test_many_faults_are_counted(vtab):
    shutil.rmtree(vtab / "cifar" / "images" / "train800val200")
    with pytest.raises(ValueError) as error:
        load_split(vtab, CIFAR, "train800val200")
    assert str(error.value).count("is missing") == 10
    assert str(error.value).endswith("; and 2 more")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"a.png": 1}', "test.json is not a list of objects with one entry"),
        ("[1, 2", "test.json is no JSON: "),
        ('[{"a.png": 1, "b.png": 2}]', r"test.json, entry 1: .* is no image's path with a label"),
        ('[{"test_000000.png": "1"}]', r"test.json, entry 1: .* is no image's path with a label"),
        ('[{"test_000000.png": true}]', r"test.json, entry 1: .* is no image's path with a label"),
        ("[]", "test.json lists 0 images, 6 expected"),
        ('[{"\\ud800": 1}]', r"test.json, entry 1: .* cannot be read"),
        (f'[{{"{"a" * 5000}": 1}}]', r"test.json, entry 1: .* cannot be read"),
        ("[" * 100_000, "test.json is no JSON"),
    ],
)
def test_faulty_json(tmp_path, content, fault):
    folder = trees.write_vtab(tmp_path, CIFAR, layout="json")
    (folder / "test.json").write_text(content)
    with pytest.raises(ValueError, match=fault):
        load_split(tmp_path, CIFAR, "test")


def test_faulty_fgvc_lists(tmp_path):
    folder = trees.write_fgvc(tmp_path, CUB)
    entries = json.loads((folder / "val.json").read_text())
    (folder / "val.json").write_text(json.dumps(entries | {"x.jpg": 9}))
    with pytest.raises(ValueError, match="the lists name 4 classes, 3 expected"):
        load_split(tmp_path, CUB, "train")
    (folder / "val.json").write_text(json.dumps(dict.fromkeys(entries, "1") | {"x.jpg": 1}))
    with pytest.raises(ValueError, match="some classes by number and others by text"):
        load_split(tmp_path, replace(CUB, num_classes=4), "train")
    name = next(iter(entries))
    (folder / "val.json").write_text(json.dumps(entries)[:-1] + f', "{name}": 2}}')  # a key twice
    with pytest.raises(ValueError, match=f"val.json, entry 7: '{name}' has label 2, but 1 in val.json, entry 1"):
        load_split(tmp_path, CUB, "val")


def test_a_list_that_is_not_utf_8(vtab):
    (vtab / "cifar" / "val200.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"val200.txt is not UTF-8"):
        load_split(vtab, CIFAR, "val200")


def test_what_is_not_there(tmp_path, vtab):
    with pytest.raises(FileNotFoundError, match=r"no folder dtd \(or dtd47\) in "):
        load_split(vtab, find_task("dtd", "vtab"), "test")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_split(tmp_path / "nowhere", CIFAR, "test")
    (vtab / "cifar" / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no list val200.txt in .*cifar"):
        load_split(vtab, CIFAR, "val200")
    (vtab / "svhn").mkdir()
    with pytest.raises(FileNotFoundError, match=r"svhn holds no list of svhn, neither test.txt nor test.json"):
        load_split(vtab, find_task("svhn", "vtab"), "test")
    for name in ("pet", "pets"):
        (vtab / name).mkdir()
    with pytest.raises(ValueError, match="oxford_iiit_pet under several names, pet, pets: keep one"):
        load_split(vtab, find_task("pet", "vtab"), "test")


def test_wrong_requests(vtab):
    with pytest.raises(ValueError, match="cifar has no split 'train'; there are train800, val200"):
        load_split(vtab, CIFAR, "train")
    with pytest.raises(ValueError, match="shots and list_seed are for few-shot tasks"):
        load_split(vtab, CIFAR, "test", shots=1)
    with pytest.raises(ValueError, match=r"needs shots \(1, 2, 4, 8, 16\) and list_seed \(0, 1, 2\); got 3 and 0"):
        load_split(vtab, PETS, "train", shots=3, list_seed=0)


# check_tree


def test_check_of_whole_trees(tmp_path):
    trees.write_vtab(tmp_path / "vtab", CIFAR)
    trees.write_vtab(tmp_path / "json", CIFAR, layout="json")
    trees.write_few_shot(tmp_path / "fewshot", PETS, repeat=2)
    trees.write_fgvc(tmp_path / "fgvc", BIRDS)
    for folder, task in (("vtab", CIFAR), ("json", CIFAR), ("fewshot", PETS), ("fgvc", BIRDS)):
        (report,) = check_tree(tmp_path / folder, task.suite, [task])
        assert report.faults == (), report
    (report,) = check_tree(tmp_path / "vtab", "vtab", [CIFAR])
    assert (report.layout, report.image_format, report.images) == ("text lists", "JPEG", trees.VTAB_SIZES)
    (report,) = check_tree(tmp_path / "json", "vtab", [CIFAR])
    assert report.notes[0] == "train800: drawn from train800val200.json with seed 0"
    (report,) = check_tree(tmp_path / "fewshot", "fewshot", [PETS])
    assert report.notes[0] == "train (1 shots, seed 0): 3 lines repeat others and are left out"
    assert len(report.images) == 17


def test_check_says_what_is_missing_and_wrong(vtab):
    reports = check_tree(vtab, "vtab")
    assert [report.task.name for report in reports if report.folder] == ["cifar"] and len(reports) == 19
    assert reports[0].faults == (
        "train800.txt lists 8 images, 800 expected",
        "val200.txt lists 4 images, 200 expected",
        "train800val200.txt lists 12 images, 1,000 expected",
        "test.txt lists 6 images, 10,000 expected",
    )
    assert reports[2].faults == (f"no folder dtd (or dtd47) in {vtab}",)
    (vtab / "cifar" / "test.txt").unlink()
    (report,) = check_tree(vtab, "vtab", [CIFAR])
    assert report.faults == (f"no list test.txt in {vtab / 'cifar'}",)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        check_tree(vtab / "nowhere", "vtab")


def test_check_compares_the_splits(vtab, tmp_path):
    file = vtab / "cifar" / "train800val200.txt"
    file.write_text(file.read_text().replace("000000.jpg 0", "000000.jpg 1"))
    (report,) = check_tree(vtab, "vtab", [CIFAR])
    assert report.faults == ("train800 and val200 together have other labels than train800val200",)

    lists = trees.write_few_shot(tmp_path, PETS) / "annotations"
    (lists / "val_meta.list").write_text((lists / "test_meta.list").read_text())
    (report,) = check_tree(tmp_path, "fewshot", [PETS])
    assert report.faults == ("6 images of val are test images as well, the first 'test_0_0.jpg'",)


def test_an_image_listed_twice_is_drawn_into_one_part(tmp_path):
    """This concerns trees without lists of train800 and val200."""
    import json

    task = trees.small("cifar", "vtab", sizes={"train800": 8, "val200": 8, "train800val200": 16, "test": 3})
    home = trees.write_vtab(tmp_path, task, layout="json")
    path = home / "train800val200.json"
    path.write_text(json.dumps(json.loads(path.read_text()) * 2))
    parts = [load_split(tmp_path, task, split, check_sizes=False) for split in ("train800", "val200")]
    train, val = ({row["path"] for row in part.dataset["image"]} for part in parts)
    assert len(train) == len(val) == 8 and not train & val
