import os
import pickle
import struct
import warnings

import datasets
import numpy as np
import pytest
from deep_files import write_png, write_tiff
from PIL import Image

from peft_heads.data import decoding
from peft_heads.data.decoding import NamingImage, decode_image


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(decoding, "_alpha_was_said", False)


# transparency


def see_through(mode):
    """Make noisy colours, half of them not opaque."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 4)).astype(np.uint8)
    noise[..., 3] = [255, 0] * 4
    if mode == "LA":
        return Image.fromarray(noise[..., [0, 3]])
    picture = Image.fromarray(noise)
    if mode == "RGBA":
        return picture
    picture = Image.fromarray(noise[..., 0], "L") if mode == "L" else picture.convert("RGB")
    if mode == "P":
        picture = picture.quantize(16)
    return picture


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGBA", {}),
        ("LA", {}),
        ("P", {"transparency": 3}),
        ("P", {"transparency": bytes(range(0, 160, 10))}),
        ("L", {"transparency": 0}),
        ("RGB", {"transparency": (0, 0, 0)}),
    ],
)
def test_transparency_is_dropped_with_one_warning(tmp_path, mode, options):
    picture = see_through(mode)
    if mode in ("L", "RGB"):
        picture.putpixel((0, 0), options["transparency"])
    picture.save(tmp_path / "a.png", **options)
    with pytest.warns(UserWarning, match="a.png is transparent in places: transparency is dropped") as said:
        found = decode_image(tmp_path / "a.png")
    assert len(said) == 1
    plain = picture.copy()
    plain.info.clear()
    assert found.mode == "RGB" and found.tobytes() == plain.convert("RGB").tobytes()
    assert decode_image(tmp_path / "a.png").tobytes() == found.tobytes()  # said once


def test_transparency_of_16_bits(tmp_path):
    grey = np.random.default_rng(0).integers(5000, 65536, (8, 8)).astype(np.uint16)
    write_png(tmp_path / "key.png", grey, transparent=int(grey[2, 3]))
    write_png(tmp_path / "rgba.png", np.dstack([grey] * 4))
    for name in ("key.png", "rgba.png"):
        decoding._alpha_was_said = False
        with pytest.warns(UserWarning, match=f"{name} is transparent"):
            found = np.asarray(decode_image(tmp_path / name))
        assert (found == np.rint(grey / 257)[..., None]).all()


def test_opaque_images_say_nothing(tmp_path):
    noise = np.full((8, 8, 4), 255, np.uint8)
    for name, picture in (
        ("a.png", Image.fromarray(noise)),
        ("b.png", Image.fromarray(noise[..., :2])),
        ("c.png", Image.fromarray(noise[..., 0])),
    ):
        picture.save(tmp_path / name, **({"transparency": 7} if name == "c.png" else {}))
        decode_image(tmp_path / name)
        decode_image(picture)


# files that are no images, or too large


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = "/dev/zero" if kind == "device" else str(tmp_path / "a.png")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    message = "No such file" if kind == "nothing" else "is not a regular file"
    for image in (path, {"path": path, "bytes": None}):
        with pytest.raises(ValueError, match=f"^image {path} cannot be read: .*{message}"):
            decode_image(image)


def bomb(name, side):
    """Return a few bytes that claim to be `side` x `side` pixels."""
    if name.endswith(".ppm"):
        return b"P6 %d %d 255\n" % (side, side)
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)


def bomb_files(folder):
    """Return files by name; the TIFF and the AVIF are real, and too large only under a lower limit."""
    for name in ("a.ppm", "a.bmp"):
        (folder / name).write_bytes(bomb(name, 40_000))
    write_tiff(folder / "a.tif", np.zeros((300, 300), np.uint8))
    Image.new("RGB", (300, 300)).save(folder / "a.png")
    names = ["a.ppm", "a.bmp", "a.tif", "a.png"]
    if ".avif" in Image.registered_extensions():
        Image.new("RGB", (300, 300)).save(folder / "a.avif")
        names.append("a.avif")
    return names


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    names = bomb_files(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 // 2 - 1)
    for name in names:
        for image in (str(tmp_path / name), {"path": name, "bytes": (tmp_path / name).read_bytes()}):
            with pytest.raises(ValueError, match=rf"^image .*{name} cannot be read: .*decompression bomb"):
                decode_image(image)


def test_pixels_above_pillow_s_warning_are_read(tmp_path, monkeypatch):
    """They are read up to twice the limit; where warnings are errors, the error is one line."""
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 - 1)
    with pytest.raises(ValueError, match=r"a.png cannot be read: .*decompression bomb"):
        decode_image(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_image(tmp_path / "a.png").size == (300, 300)


# rows of datasets


def test_errors_of_rows_name_the_file(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:900])
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "good.png"), str(tmp_path / "bad.png")]})
    rows = rows.cast_column("image", NamingImage(datasets.Image()))
    assert rows[0]["image"].size == (64, 64)
    with pytest.raises(ValueError, match=r"image .*bad.png cannot be read"):
        rows[1]
    with pytest.raises(ValueError, match=r"image .*bad.png cannot be read"):
        rows.with_transform(lambda batch: batch)[1]


def test_rows_with_a_range(tmp_path):
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    write_tiff(tmp_path / "a.tif", values, kind=3)
    rows = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": (tmp_path / "a.tif").read_bytes()}]})
    rows = rows.cast_column("image", NamingImage(datasets.Image(), (0, 15)))
    assert np.asarray(rows[0]["image"])[..., 0].ravel().tolist() == [17 * i for i in range(16)]
    copy = pickle.loads(pickle.dumps(rows))
    assert copy.features["image"].image_range == (0, 15)


def test_the_feature_is_that_of_datasets(tmp_path):
    """It is the same in files and comparisons, so rows can be joined with others and read anywhere."""
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    stock = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    ours = stock.cast_column("image", NamingImage(datasets.Image(mode="L"), (0, 1)))
    assert ours[0]["image"].mode == "L"
    ours = stock.cast_column("image", NamingImage(datasets.Image()))
    assert ours.features == stock.features and stock.features == ours.features
    assert len(datasets.concatenate_datasets([ours, stock])) == 2
    ours.save_to_disk(tmp_path / "saved")
    assert type(datasets.load_from_disk(tmp_path / "saved").features["image"]) is datasets.Image
    assert ours.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"].endswith("a.png")
