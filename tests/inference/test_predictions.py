"""Images are found, decoded as in training, predicted in batches, and written."""

import csv
import io
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from peft_heads.data.images import ImageTransform
from peft_heads.inference.predictions import Prediction, find_images, predict, read_batches, written


@dataclass
class Bright:
    """A classifier of brightness, which notes the sizes of its batches."""

    image_processor: object
    id2label: dict = field(default_factory=lambda: {0: "dark", 1: "bright", 2: "none"})
    batches: list = field(default_factory=list)

    def logits(self, pixel_values):
        self.batches.append(len(pixel_values))
        mean = pixel_values.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean, torch.full_like(mean, -9)], dim=1)


@pytest.fixture
def bright():
    return Bright(tiny.ViTProcessor(size={"height": 8, "width": 8}))


@pytest.fixture
def folder(tmp_path):
    for name, value in {"b/2.png": 250, "a/1.JPG": 5, "a/x/3.tif": 200, ".hidden/4.png": 0, "a/.5.png": 0}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), (value,) * 3).save(tmp_path / name, format="PNG")
    (tmp_path / "a" / "notes.txt").touch()
    return tmp_path


def test_images_are_found(folder):
    below = [str(folder / name) for name in ("a/1.JPG", "a/x/3.tif", "b/2.png")]
    assert find_images([folder]) == below
    assert find_images([folder / "b" / "2.png", folder / "a"]) == [below[2], *below[:2]]
    with pytest.raises(FileNotFoundError, match="there is no file or folder .*none"):
        find_images([folder, folder / "none"])
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder .*empty holds no images"):
        find_images([folder / "empty"])


def test_order_batches_and_top_k(folder, bright):
    files = find_images([folder])
    found = list(predict(bright, files, batch_size=2, top_k=2))
    assert [x.file for x in found] == files and bright.batches == [2, 1]
    assert [[label for label, _ in x.classes] for x in found] == [["dark", "bright"], *[["bright", "dark"]] * 2]
    assert all(len(x.classes) == 3 for x in predict(bright, files, top_k=9))
    assert all(0.99 < sum(p for _, p in x.classes) < 1.01 for x in predict(bright, files, top_k=3))
    for wrong in ({"batch_size": 0}, {"top_k": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0 must be at least 1"):
            next(predict(bright, files, **wrong))


def test_an_unreadable_image_is_told_of(folder, bright):
    (folder / "a" / "0.png").write_bytes(b"no image")
    files, told = find_images([folder]), []
    with pytest.raises(ValueError, match="image .*0.png cannot be read"):
        list(predict(bright, files))
    assert [x.file for x in predict(bright, files, unreadable=told.append)] == files[1:]
    assert len(told) == 1 and "0.png cannot be read" in str(told[0])


def test_as_in_training(tmp_path, bright):
    """16 bits with the processor's range, and EXIF: what training sees."""
    values = (np.arange(48).reshape(6, 8) * 80).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((values // 16).astype(np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    bright.image_processor.image_range = [0, 4095]
    files = [str(tmp_path / name) for name in ("deep.png", "turned.jpg")]
    [(names, pixels)] = read_batches(bright.image_processor, files, 8)
    batch = {"image": files, "label": [0, 0]}
    expected = torch.stack(ImageTransform(bright.image_processor)(batch)["pixel_values"])
    assert names == files and torch.equal(pixels, expected)
    assert pixels[0].max() - pixels[0].min() > 1  # clipped or divided by 257 it would be one colour
    assert pixels[1, 0, 0].diff().mean() < 0  # the first row of the file is its right column


def test_images_of_other_sizes_are_other_batches(tmp_path, bright):
    bright.image_processor.do_resize = False
    for index, size in enumerate([(8, 8), (8, 8), (9, 8), (8, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    assert len(list(predict(bright, find_images([tmp_path])))) == 4
    assert bright.batches == [2, 1, 1]


def test_formats():
    found = [Prediction("a,b/1.png", [("Käfer", 0.75), ('"x"', 0.25)]), Prediction("2.png", [("bee", 1 / 3)])]
    assert "".join(written(found, "text")) == 'a,b/1.png\tKäfer 0.7500\t"x" 0.2500\n2.png\tbee 0.3333\n'
    rows = list(csv.DictReader(io.StringIO("".join(written(found, "csv")))))
    assert rows[1] == {"file": "a,b/1.png", "rank": "2", "label": '"x"', "probability": "0.25"} and len(rows) == 3
    parsed = json.loads("".join(written(found, "json")))
    assert parsed[0] == {
        "file": "a,b/1.png",
        "predictions": [{"label": "Käfer", "probability": 0.75}, {"label": '"x"', "probability": 0.25}],
    }
    assert json.loads("".join(written([], "json"))) == [] and "".join(written([], "csv")).count("\n") == 1
