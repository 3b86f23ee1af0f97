import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading

import datasets
import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torch.utils.data import DataLoader

from peft_heads.data import decoding, files, image_store
from peft_heads.data.cache import CachedImages, StreamedImages, cache_entries, cache_size, clean_cache, open_images
from peft_heads.data.image_folders import folder_task, load_folder_split
from peft_heads.data.images import collate, decode_image, load_image_dataset
from peft_heads.data.preprocessing import Preprocessing
from peft_heads.data.trees import load_split


TASK = trees.small("cifar", "vtab")
SMALL = Preprocessing(size=16, normalization="imagenet")
VARIED = Preprocessing(size=16, resize="shorter_side", resize_size=18, crop="random")


@pytest.fixture
def root(tmp_path):
    trees.write_vtab(tmp_path / "root", TASK)
    return tmp_path / "root"


@pytest.fixture
def split(root):
    return load_split(root, TASK, "train800")


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_HEADS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """List the paths of the images that are decoded."""
    paths = []

    def decode(image, image_range=None):
        paths.append(image["path"])
        return decode_image(image, image_range)

    monkeypatch.setattr(decoding, "decode_image", decode)
    return paths


def whole(images):
    """An augmentation that crops at a corner and changes nothing else."""
    return torch.stack([image[:, :16, :16] / 255 for image in images])


# values


def test_cached_values_are_those_of_pillow(split, cache_dir):
    images = CachedImages(split, SMALL)
    assert len(images) == 8 and images.labels == [0, 1, 2, 0, 1, 2, 0, 1]
    with Image.open(split.dataset[5]["image"]["path"]) as image:
        expected = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert images[5]["labels"] == 2
    assert images[5]["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(images[5]["pixel_values"].numpy(), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preprocessing", [SMALL, VARIED])
def test_streamed_images_are_the_same_bit_for_bit(tmp_path, cache_dir, preprocessing):
    task = trees.small("cifar", "vtab", sizes={"train800": 70, "val200": 1, "test": 1})
    trees.write_vtab(tmp_path, task, size=(21, 37))
    split = load_split(tmp_path, task, "train800")
    augment = whole if preprocessing is VARIED else None
    cached = CachedImages(split, preprocessing, augment=augment)
    streamed = StreamedImages(split, preprocessing, augment=augment)
    assert len(cached) == 70 and (cached.entry.shapes == ([[32, 18]] if augment else [[16, 16]])).all()
    for one, other in zip(cached, streamed, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["labels"] == other["labels"]
    assert torch.equal(cached[-1]["pixel_values"], streamed[69]["pixel_values"])
    assert not torch.equal(cached[0]["pixel_values"], cached[1]["pixel_values"])
    with pytest.raises(IndexError):
        cached[70]


def test_batches_in_worker_processes(split, cache_dir):
    images = CachedImages(split, Preprocessing(size=64))
    expected = collate([images[i] for i in range(8)])
    copy = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < images.entry.size / 4  # the pixels stay on disk
    for batch in DataLoader(copy, batch_size=8, collate_fn=collate, num_workers=1):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert torch.equal(batch["labels"], expected["labels"])


def test_a_random_crop_needs_an_augmentation(split):
    with pytest.raises(ValueError, match="crop='random' leaves the cropping to an augmentation"):
        StreamedImages(split, VARIED)


def test_test_images_are_streamed_unless_asked_for(root, split, cache_dir):
    test = load_split(root, TASK, "test")
    assert type(open_images(test, SMALL)) is StreamedImages and not cache_dir.exists()
    assert type(open_images(test, SMALL, cache=True)) is CachedImages
    assert type(open_images(split, SMALL)) is CachedImages
    assert type(open_images(split, SMALL, cache=False)) is StreamedImages


def test_plain_image_folders_and_bytes(tmp_path, cache_dir):
    for i in range(4):
        path = tmp_path / "folder" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        trees.picture(i, 4).save(path)
    rows = load_image_dataset(train_dir=str(tmp_path / "folder"), train_val_split=0, cache_dir=str(tmp_path / "c"))
    images = CachedImages(rows["train"], SMALL)
    assert images.labels == [0, 0, 1, 1]
    assert torch.equal(images[1]["pixel_values"], StreamedImages(rows["train"], SMALL)[1]["pixel_values"])
    shutil.copytree(tmp_path / "folder", tmp_path / "copy")  # with the times of the files
    copy = load_image_dataset(train_dir=str(tmp_path / "copy"), train_val_split=0, cache_dir=str(tmp_path / "c"))
    assert CachedImages(copy["train"], SMALL).entry.path != images.entry.path
    embedded = [
        datasets.Dataset.from_dict(
            {"image": [trees.picture(label, 4)], "label": [label]},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
        )
        for label in (1, 2)
    ]
    for rows in embedded:
        assert torch.equal(
            CachedImages(rows, SMALL)[0]["pixel_values"], StreamedImages(rows, SMALL)[0]["pixel_values"]
        )
    assert len(cache_entries()) == 4
    with pytest.raises(ValueError, match="class_encode_column"):
        StreamedImages(datasets.Dataset.from_dict({"image": [None], "label": ["cat"]}), SMALL)


# what is made, and when


def test_decoded_once_and_reused(split, root, tmp_path, cache_dir, decoded):
    CachedImages(split, SMALL)
    assert sorted(decoded) == sorted(image["path"] for image in split.dataset["image"])
    CachedImages(split, SMALL)
    CachedImages(load_split(root, TASK, "train800"), Preprocessing(size=16, normalization="half"))
    os.rename(root, tmp_path / "moved")
    CachedImages(load_split(tmp_path / "moved", TASK, "train800"), SMALL)
    assert len(decoded) == 8


@pytest.mark.parametrize("change", ["size", "filter", "crop", "time", "file", "list", "pillow", "format"])
def test_made_anew_if_pixels_may_have_changed(split, root, cache_dir, decoded, monkeypatch, change):
    CachedImages(split, SMALL)
    preprocessing, image = SMALL, root / "cifar/images/train800/000003.jpg"
    if change == "size":
        preprocessing = Preprocessing(size=8)
    elif change == "filter":
        preprocessing = Preprocessing(size=16, filter="bilinear")
    elif change == "crop":
        preprocessing = Preprocessing(size=16, resize_size=20)
    elif change == "time":
        os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    elif change == "file":
        stat = image.stat()
        trees.picture(1, 3, size=(50, 50)).save(image)
        os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "list":
        lines = (root / "cifar/train800.txt").read_text().splitlines()
        (root / "cifar/train800.txt").write_text("\n".join(lines[1:] + lines[:1]))
    elif change == "pillow":
        monkeypatch.setattr("PIL.__version__", "0.1")
    elif change == "format":
        monkeypatch.setattr(image_store, "FORMAT_VERSION", 0)
    changed = load_split(root, TASK, "train800")
    found = CachedImages(changed, preprocessing)
    assert len(decoded) == 16
    for one, other in zip(found, StreamedImages(changed, preprocessing), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_the_list_is_part_of_the_key(split):
    keys = {image_store.pixel_key(split.dataset, SMALL, fingerprint) for fingerprint in ("a", "b", "a")}
    assert len(keys) == 2 and all(len(key) == 64 for key in keys)


def test_a_damaged_entry_is_made_anew(split, cache_dir, decoded):
    for name, content in (("pixels.bin", b"short"), ("entry.json", b"{"), ("entry.json", b"[]"), ("entry.json", None)):
        entry = CachedImages(split, SMALL).entry
        before = len(decoded)
        (entry.path / name).unlink()
        if content is not None:
            (entry.path / name).write_bytes(content)
        assert cache_entries() == []
        with pytest.warns(UserWarning, match="vtab cifar train800, 8 images.* is damaged"):
            images = CachedImages(split, SMALL)
        assert len(decoded) == before + 8 and images[7]["pixel_values"].isfinite().all()


def values(images):
    return [images[i]["pixel_values"] for i in range(len(images))]


def test_another_tree_s_pixels_do_not_come_back(tmp_path, cache_dir):
    """Like files of an archive, they have the same names, sizes and times, but other contents."""
    roots = [tmp_path / name for name in ("one", "two")]
    for number, root in enumerate(roots):
        for name in ("train/a/0.bmp", "train/b/0.bmp"):
            path = root / "task" / name
            path.parent.mkdir(parents=True)
            trees.picture(number, 5).save(path)
            os.utime(path, ns=(10**18, 10**18))
    splits = [load_folder_split(root, folder_task(root, "task"), "train") for root in roots]
    assert splits[0].fingerprint == splits[1].fingerprint  # as in results of earlier versions
    assert splits[0].content_fingerprint != splits[1].content_fingerprint
    for split in splits:
        images = zip(values(CachedImages(split, SMALL)), values(StreamedImages(split, SMALL)), strict=True)
        assert all(torch.equal(one, other) for one, other in images)
    # the same for rows that come from no tree
    rows = [split.dataset for split in splits]
    os.rename(roots[0] / "task", roots[0] / "moved")
    os.rename(roots[1] / "task", roots[0] / "task")
    rows[1] = load_folder_split(roots[0], folder_task(roots[0], "task"), "train").dataset
    assert rows[0]["image"][:] == rows[1]["image"][:]
    assert torch.equal(
        CachedImages(rows[1], SMALL)[0]["pixel_values"], StreamedImages(rows[1], SMALL)[0]["pixel_values"]
    )


def flip_a_bit(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize(
    ("damage", "is_open"),
    [(damage, is_open) for damage in ("bit", "zeros", "last byte") for is_open in (False, True)]
    + [("shape", False), ("checksum", False)],  # of entry.json, which is read once
)
def test_damaged_pixels_are_never_returned(split, cache_dir, decoded, damage, is_open):
    varied = Preprocessing(size=16, resize="shorter_side", resize_size=18, crop="random")
    images = CachedImages(split, varied, augment=whole)
    expected, pixels, entry = values(images), images.entry.path / "pixels.bin", images.entry.path / "entry.json"
    content = json.loads(entry.read_text())
    if damage == "bit":
        flip_a_bit(pixels, 5000)
    elif damage == "zeros":
        with open(pixels, "r+b") as file:
            file.write(bytes(pixels.stat().st_size))
    elif damage == "last byte":
        flip_a_bit(pixels, pixels.stat().st_size - 1)
    elif damage == "shape":  # as many bytes
        content["shapes"][3] = content["shapes"][3][::-1]
        entry.write_text(json.dumps(content))
    elif damage == "checksum":
        content["checksums"][7] += 1
        entry.write_text(json.dumps(content))
    if not is_open:
        images = CachedImages(split, varied, augment=whole)
    with pytest.warns(UserWarning, match="vtab cifar train800, 8 images.* is damaged.* made again") as said:
        found = values(images)
    assert len(said) == 1 and len(decoded) == 16
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    found = values(CachedImages(split, varied, augment=whole))  # on the disk, too
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)) and len(decoded) == 16


def test_two_that_see_the_same_damage_make_it_again_once(split, cache_dir, decoded):
    images = [CachedImages(split, SMALL) for _ in range(2)]
    flip_a_bit(images[0].entry.path / "pixels.bin", 0)
    with pytest.warns(UserWarning, match="is damaged") as said:
        one, other = (image[0]["pixel_values"] for image in images)
    assert torch.equal(one, other) and len(said) == 1 and len(decoded) == 16


def test_an_entry_is_not_made_again_of_other_images(split, root, cache_dir):
    images = CachedImages(split, SMALL)
    flip_a_bit(images.entry.path / "pixels.bin", 0)
    trees.picture(2, 3, 99).save(root / "cifar/images/train800/000005.jpg")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="the files have changed since"),
    ):
        images[0]
    assert cache_entries() == []


def test_files_that_change_while_they_are_decoded(split, root, cache_dir, monkeypatch):
    lock, new = threading.Lock(), root / "new.jpg"

    def decode(image, image_range):
        with lock:  # several threads decode
            trees.picture(2, 3, 99).save(new)
            os.replace(new, root / "cifar/images/train800/000005.jpg")
        return decode_image(image, image_range)

    monkeypatch.setattr(decoding, "decode_image", decode)
    with pytest.raises(ValueError, match="vtab cifar train800, 8 images: the files have changed since"):
        CachedImages(split, SMALL)
    assert cache_entries() == []


def test_contents_are_read_once(split, root, cache_dir, monkeypatch):
    """A sweep opens the same images thousands of times."""
    CachedImages(split, SMALL)
    monkeypatch.setattr(files, "open", lambda *_, **__: pytest.fail("read again"), raising=False)
    monkeypatch.setattr(files, "_format", lambda *_: "JPEG")
    CachedImages(load_split(root, TASK, "train800"), SMALL)


def test_a_pipe_among_the_rows(tmp_path, cache_dir):
    os.mkfifo(tmp_path / "a.png")
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "a.png")], "label": [0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    with pytest.raises(ValueError, match=r"image .*a.png cannot be read: is not a regular file"):
        CachedImages(rows, SMALL)
    with pytest.raises(ValueError, match=r"image .*a.png cannot be read: is not a regular file"):
        StreamedImages(rows, SMALL)[0]


def test_images_of_more_than_8_bits(tmp_path, cache_dir):
    """They can be cached and streamed, and the range is part of the key."""
    values = np.random.default_rng(0).integers(0, 4096, (16, 16)).astype(np.uint16)
    for name in ("train/a/0.png", "train/b/0.png"):
        (tmp_path / "task" / name).parent.mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / "task" / name)
    task = folder_task(tmp_path, "task")
    with pytest.raises(ValueError, match=r"train cannot be used: train/a/0.png cannot be read: .*--image_range LOW"):
        load_folder_split(tmp_path, task, "train")
    split = load_folder_split(tmp_path, task, "train", (0, 4095))
    with pytest.raises(ValueError, match=r"image .*0.png cannot be read: .*--image_range LOW HIGH"):
        CachedImages(split, Preprocessing(size=16))
    paths = set()
    for low, high in ((0, 4095), (0, 2000)):
        preprocessing = Preprocessing(size=16, image_range=(low, high))
        expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
        for kind in (CachedImages, StreamedImages):
            images = kind(split, preprocessing)
            assert (images.pixels(0) == expected).all()
        paths.add(CachedImages(split, preprocessing).entry.path)
    assert len(paths) == 2


def test_a_line_that_would_become_a_sea(tmp_path, cache_dir):
    """With its shorter side resized, a line would take gigabytes."""
    for name in ("train/a/0.png", "train/b/0.png"):
        (tmp_path / "task" / name).parent.mkdir(parents=True)
        Image.new("RGB", (20_000, 1)).save(tmp_path / "task" / name)
    split = load_folder_split(tmp_path, folder_task(tmp_path, "task"), "train")
    for kind in (CachedImages, StreamedImages):
        with pytest.raises(ValueError, match=r"image .*0.png cannot be resized: it has 20000 x 1 pixels, and 5120000"):
            kind(split, Preprocessing(resize="shorter_side"))[0]
    assert StreamedImages(split, Preprocessing())[0]["pixel_values"].shape == (3, 224, 224)


def test_a_damaged_image_leaves_nothing_behind(split, root, cache_dir):
    path = root / "cifar/images/train800/000006.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"image .*000006.jpg cannot be read"):
        CachedImages(split, SMALL)
    assert [path.suffix for path in cache_dir.iterdir()] in ([], [".lock"])
    with pytest.raises(ValueError, match=r"image .*000006.jpg cannot be read"):
        StreamedImages(split, SMALL)[6]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"image .*000006.jpg is gone"):
        CachedImages(split, SMALL)


def test_decompression_bombs_are_refused(split, cache_dir, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 16 // 2 - 1)
    for kind in (CachedImages, StreamedImages):
        with pytest.raises(ValueError, match=r"image .*train800/00000\d.jpg cannot be read: .*decompression bomb"):
            kind(split, SMALL)[0]


def test_a_cache_that_cannot_be_written(split, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the image cache .*file/cache cannot be written .*PEFT_HEADS_CACHE"):
        CachedImages(split, SMALL, cache_dir=tmp_path / "file" / "cache")


def test_a_file_system_without_locks(split, cache_dir, monkeypatch, decoded):
    """Two processes make the same entry; the slower one uses the entry of the faster one."""

    def acquire(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    write = image_store._write_pixels

    def overtaken(*args):
        shapes = write(*args)
        monkeypatch.setattr(image_store, "_write_pixels", write)
        CachedImages(split, SMALL)
        assert len(list(cache_dir.glob("_*"))) == 1  # the unfinished entry is still there
        return shapes

    monkeypatch.setattr(image_store, "_write_pixels", overtaken)
    assert len(CachedImages(split, SMALL)) == 8
    assert len(decoded) == 16 and len(cache_entries()) == 1
    assert [path.name for path in cache_dir.iterdir()] == [cache_entries()[0].path.name]


def test_an_entry_that_appears_meanwhile_is_used(split, cache_dir, monkeypatch, decoded):
    make = image_store.new_folder

    def overtaken(target):
        with make(target) as folder:
            _, checksums = image_store._write_pixels(split.dataset["image"], SMALL, folder / "pixels.bin", 1)
            content = {"description": "faster", "shapes": [[16, 16]] * 8, "checksums": checksums}
            (folder / "entry.json").write_text(json.dumps(content))
        return make(target)

    monkeypatch.setattr(image_store, "new_folder", overtaken)
    assert CachedImages(split, SMALL).entry.description == "faster" and len(decoded) == 8


def test_an_entry_is_read_without_writing(split, cache_dir, monkeypatch):
    entry = CachedImages(split, SMALL).entry
    for path in cache_dir.glob(".*.lock"):
        path.unlink()
    assert CachedImages(split, SMALL).entry.path == entry.path
    assert list(cache_dir.iterdir()) == [entry.path]


# several processes

MAKER = """
import sys, time
sys.path[:0] = {path!r}
import trees
from peft_heads.data import decoding, files
from peft_heads.data.cache import CachedImages
from peft_heads.data.preprocessing import Preprocessing
from peft_heads.data.trees import load_split
decode = decoding.decode_image
def slow(image, image_range):
    print("decoding", flush=True)
    time.sleep({seconds})
    return decode(image, image_range)
decoding.decode_image = slow
split = load_split({root!r}, trees.small("cifar", "vtab"), "train800")
print("values", CachedImages(split, Preprocessing(size=16), workers=1)[7]["pixel_values"].sum().item(), flush=True)
"""


def start(root, seconds):
    code = MAKER.format(path=sys.path, root=str(root), seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_one_process_makes_and_others_wait(root, cache_dir):
    makers = [start(root, 0.1) for _ in range(3)]
    lines = [line for maker in makers for line in maker.communicate()[0].splitlines()]
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert lines.count("decoding") == 8
    assert len({line for line in lines if line.startswith("values")}) == 1
    assert len(cache_entries()) == 1


@pytest.mark.slow
def test_a_killed_maker_leaves_nothing_that_is_read(root, split, cache_dir):
    maker = start(root, 60)
    maker.stdout.readline()
    assert cache_entries() == [] and cache_size() == 0
    (unfinished,) = cache_dir.glob("_*")
    (unfinished / "new" / "pixels.bin").write_bytes(b"half")
    assert clean_cache() == 0 and unfinished.exists()  # it is being made
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    assert cache_size() == 4
    CachedImages(split, Preprocessing(size=16))
    assert not unfinished.exists() and len(cache_entries()) == 1


# size and deletion


def test_size_and_deletion(split, cache_dir, caplog):
    caplog.set_level("INFO", logger="peft_heads")
    images = CachedImages(split, SMALL)
    CachedImages(split, VARIED, augment=whole)
    names = [entry.description for entry in cache_entries()]
    assert names == ["vtab cifar train800, 8 images"] * 2
    assert caplog.messages[0].startswith(f"{names[0]}: decoded into {cache_dir} (0.0")
    size = sum(path.stat().st_size for path in cache_dir.glob("*/*"))
    assert size > 8 * 3 * 16 * 16 and cache_size() == cache_size(cache_dir) == size

    unfinished = cache_dir / f"_{images.entry.path.name}.x" / "new"
    unfinished.mkdir(parents=True)
    (unfinished / "pixels.bin").write_bytes(b"1234")
    for other in ("notes", "ab" * 31, "_" + "x" * 64):
        (cache_dir / other).mkdir()
        (cache_dir / other / "pixels.bin").write_bytes(b"mine")
    assert clean_cache() == size + 4
    assert sorted(path.name for path in cache_dir.iterdir() if path.is_dir()) == sorted(
        ["notes", "ab" * 31, "_" + "x" * 64]
    )
    assert cache_size() == 0 and clean_cache(cache_dir / "nowhere") == 0
    # an open entry is still read
    assert torch.equal(images[3]["pixel_values"], StreamedImages(split, SMALL)[3]["pixel_values"])


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_HEADS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert image_store.default_cache_dir() == tmp_path / ".cache" / "peft_heads" / "images"


def test_an_entry_says_what_it_is(split, cache_dir):
    entry = CachedImages(split, SMALL).entry
    content = json.loads((entry.path / "entry.json").read_text())
    checksums = content.pop("checksums")
    assert content == {"format": 2, "description": "vtab cifar train800, 8 images", "shapes": [[16, 16]] * 8}
    assert len(set(checksums)) == 8 and all(0 <= number < 2**64 for number in checksums)
    assert (entry.path / "pixels.bin").stat().st_size == 8 * 3 * 16 * 16
    shutil.rmtree(cache_dir)
