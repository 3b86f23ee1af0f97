import io
import struct

import numpy as np
import pytest
from deep_files import write_png, write_pnm, write_tiff
from PIL import Image

from peft_heads.data.decoding import decode_image
from peft_heads.data.deep_images import check_image_range, is_deep, to_bytes


RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 65536, (9, 13)).astype(np.uint16)
COLOUR = RNG.integers(0, 65536, (9, 13, 3)).astype(np.uint16)
OPAQUE = np.dstack([COLOUR, np.full((9, 13), 65535, np.uint16)])
DARK_GREY, DARK = GREY >> 4, COLOUR >> 4  # 12 bits

UNSIGNED = {
    "grey.png": (write_png, GREY, {}),
    "grey.tif": (write_tiff, GREY, {}),
    "big-endian.tif": (write_tiff, GREY, {"big": True}),
    "deflated.tif": (write_tiff, GREY, {"deflate": True}),
    "grey.pgm": (write_pnm, GREY, {}),
    "colour.png": (write_png, COLOUR, {}),
    "opaque.png": (write_png, OPAQUE, {}),
    "colour.tif": (write_tiff, COLOUR, {}),
    "colour-big.tif": (write_tiff, COLOUR, {"big": True}),
    "colour-deflated.tif": (write_tiff, COLOUR, {"deflate": True}),
    "colour.ppm": (write_pnm, COLOUR, {}),
}
# with the range that they are asked for
NEED_RANGE = {
    "12.png": (write_png, DARK_GREY, {}, (0, 4095)),
    "12.tif": (write_tiff, DARK_GREY, {}, (0, 3000)),
    "12.pgm": (write_pnm, DARK_GREY, {}, (5, 4095)),
    "12-colour.png": (write_png, DARK, {}, (0, 4095)),
    "12-colour.tif": (write_tiff, DARK, {"deflate": True}, (100, 4000)),
    "12-colour.ppm": (write_pnm, DARK, {}, (0, 4095)),
    "black.png": (write_png, 0 * GREY, {}, (0, 65535)),
    "int16.tif": (write_tiff, GREY.astype(np.int16), {"kind": 2}, (-1000, 3000)),
    "int16-big.tif": (write_tiff, GREY.astype(np.int16), {"kind": 2, "big": True}, (-32768, 32767)),
    "int8.tif": (write_tiff, GREY.astype(np.int8), {"kind": 2}, (-128, 127)),
    "int32.tif": (write_tiff, GREY.astype(np.int32) - 1024, {"kind": 2}, (-1024, 3071)),
    "uint32.tif": (write_tiff, GREY.astype(np.uint32) * 65537, {}, (0, 2**32 - 1)),
    "float.tif": (write_tiff, (GREY / 65535).astype(np.float32), {"kind": 3}, (0.0, 1.0)),
    "float-big.tif": (write_tiff, (GREY / 100 - 50).astype(np.float32), {"kind": 3, "big": True}, (-50, 1e3)),
}


def expected(values, low=0, high=65535):
    values = values[..., :3].astype(np.float64) if values.ndim == 3 else np.dstack([values.astype(np.float64)] * 3)
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def ways(path):
    """Return a file in the forms in which callers pass it."""
    rows = [{"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}]
    return [str(path), path, *rows]


@pytest.mark.parametrize("name", UNSIGNED)
def test_unsigned_16_bits_are_divided_by_257(tmp_path, name):
    write, values, options = UNSIGNED[name]
    write(tmp_path / name, values, **options)
    for image in ways(tmp_path / name):
        found = decode_image(image)
        assert found.mode == "RGB" and (np.asarray(found) == expected(values)).all()
    assert (np.asarray(decode_image(tmp_path / name, (1000, 30000))) == expected(values, 1000, 30000)).all()


@pytest.mark.parametrize("name", NEED_RANGE)
def test_what_needs_a_range(tmp_path, name):
    write, values, options, image_range = NEED_RANGE[name]
    write(tmp_path / name, values, **options)
    for image in ways(tmp_path / name):
        named = "without a file name" if isinstance(image, dict) and image["path"] is None else name
        with pytest.raises(ValueError, match=rf"^image .*{named}.* cannot be read: .* give --image_range LOW HIGH"):
            decode_image(image)
        difference = np.asarray(decode_image(image, image_range)).astype(int) - expected(values, *image_range)
        assert np.abs(difference).max() == 0


def test_12_bits_are_those_below_4096(tmp_path):
    values = np.full((4, 4), 4095, np.uint16)
    write_png(tmp_path / "a.png", values)
    with pytest.raises(ValueError, match=r"below 4096, from 4095 to 4095.*\(0 4095 for 12 bits, 0 65535 for 16\)"):
        decode_image(tmp_path / "a.png")
    write_png(tmp_path / "a.png", values + 1)
    assert (np.asarray(decode_image(tmp_path / "a.png")) == 16).all()


def test_the_same_range_for_all_images(tmp_path):
    """No image is stretched by its own minimum and maximum."""
    for name, values in (("bright", GREY // 2 + 30000), ("dark", GREY // 2)):
        write_png(tmp_path / f"{name}.png", values)
    means = [np.asarray(decode_image(tmp_path / f"{name}.png")).mean() for name in ("bright", "dark")]
    assert means[0] - means[1] == pytest.approx(30000 / 257, abs=1)


def test_images_of_pillow():
    """They are already decoded, as `datasets` returns them, with all grey values."""
    assert (np.asarray(decode_image(Image.fromarray(GREY))) == expected(GREY)).all()
    with pytest.raises(ValueError, match="--image_range"):
        decode_image(Image.fromarray(GREY.astype(np.int32)))
    found = decode_image(Image.fromarray(GREY.astype(np.float32)), (0, 60000))
    assert (np.asarray(found) == expected(GREY, 0, 60000)).all()
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, "PNG")
    with Image.open(file) as image:
        assert (np.asarray(decode_image(image)) == expected(GREY)).all()


def test_eight_bits_are_taken_as_they_are(tmp_path):
    """In mixed folders a range applies only to deep images."""
    picture = Image.fromarray((COLOUR >> 8).astype(np.uint8))
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert decode_image(tmp_path / name, (0, 5)).tobytes() == picture.tobytes()


def test_16_bits_for_three_channels(tmp_path):
    """A BMP may have 5, 6 and 5 bits."""
    packed = GREY[:, :12].astype("<u2")
    head = struct.pack("<IHHI", 0, 0, 0, 66) + struct.pack("<IiiHHIIiiII", 40, 12, -9, 1, 16, 3, 0, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    (tmp_path / "a.bmp").write_bytes(b"BM" + head + masks + packed.tobytes())
    with Image.open(tmp_path / "a.bmp") as image:
        assert not is_deep(image)
    found = np.asarray(decode_image(tmp_path / "a.bmp", (0, 5)))
    assert (found[..., 0] >> 3 == packed >> 11).all()


def test_the_largest_value_that_a_file_declares_is_white(tmp_path):
    for values in (DARK_GREY, DARK):
        write_pnm(tmp_path / "a.pnm", values, white=4095)
        assert (np.asarray(decode_image(tmp_path / "a.pnm")) == expected(values, 0, 4095)).all()
        assert (np.asarray(decode_image(tmp_path / "a.pnm", (100, 200))) == expected(values, 100, 200)).all()


def test_plain_text(tmp_path):
    words = " ".join(map(str, DARK.ravel()))
    (tmp_path / "a.ppm").write_text(f"P3 13 9 4095\n{words}\n")
    difference = np.asarray(decode_image(tmp_path / "a.ppm")).astype(int) - expected(DARK, 0, 4095)
    assert np.abs(difference).max() <= 1
    (tmp_path / "a.ppm").write_text(f"P3 13 9 65535\n{words}\n")  # 12 bits as of 16
    with pytest.raises(ValueError, match=r"a.ppm cannot be read: .* only the upper 8 .*--image_range"):
        decode_image(tmp_path / "a.ppm")


def test_grey_with_alpha_of_16_bits(tmp_path):
    """Pillow reads only one of the two bytes."""
    values = np.dstack([GREY, np.full_like(GREY, 65535)])
    write_png(tmp_path / "a.png", values)
    difference = np.asarray(decode_image(tmp_path / "a.png")).astype(int) - expected(GREY)
    assert np.abs(difference).max() <= 1
    with pytest.raises(ValueError, match=r"a.png cannot be read: .* only the upper 8 can be read"):
        decode_image(tmp_path / "a.png", (0, 4095))
    write_png(tmp_path / "a.png", np.dstack([DARK_GREY, np.full_like(GREY, 65535)]))
    with pytest.raises(ValueError, match=r"a.png cannot be read: .* at most"):
        decode_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sgi(tmp_path, mode):
    """The file has 16 bits, but its colours come from 8 bits, so the upper byte determines them."""
    picture = Image.fromarray((COLOUR >> 8).astype(np.uint8)).convert(mode)
    picture.save(tmp_path / "a.sgi", bpc=2)
    with Image.open(tmp_path / "a.sgi") as image:
        assert is_deep(image)
    difference = np.asarray(decode_image(tmp_path / "a.sgi")).astype(int) - np.asarray(picture.convert("RGB"))
    assert np.abs(difference).max() <= 1
    with pytest.raises(ValueError, match="only the upper 8 can be read"):
        decode_image(tmp_path / "a.sgi", (0, 4095))


def test_white_is_zero(tmp_path):
    """16 bits are inverted as Pillow inverts 8 bits."""
    write_tiff(tmp_path / "8.tif", (GREY >> 8).astype(np.uint8), photometric=0)
    write_tiff(tmp_path / "16.tif", (GREY >> 8) * 257, photometric=0)
    eight, sixteen = (np.asarray(decode_image(tmp_path / name)) for name in ("8.tif", "16.tif"))
    assert (eight == sixteen).all() and (eight[..., 0] == 255 - (GREY >> 8)).all()


def test_the_right_way_up(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for values in (GREY, (GREY >> 8).astype(np.uint8)):
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
        found = np.asarray(decode_image(tmp_path / "a.png"))
        upright = np.rot90(values, -1)
        assert (found == expected(upright, 0, 65535 if values is GREY else 255)).all()


def test_values_that_are_not_a_number(tmp_path):
    values = (GREY / 65535).astype(np.float32)
    values[0, :2] = np.nan
    values[1, 0], values[1, 1] = np.inf, -np.inf
    write_tiff(tmp_path / "a.tif", values, kind=3)
    with pytest.raises(ValueError, match=r"a.tif cannot be read: 2 of its values are not a number \(NaN\)"):
        decode_image(tmp_path / "a.tif", (0, 1))
    values[0, :2] = 0
    write_tiff(tmp_path / "a.tif", values, kind=3)
    assert np.asarray(decode_image(tmp_path / "a.tif", (0, 1)))[1, :2, 0].tolist() == [255, 0]


def test_mapping_in_blocks_of_rows():
    tall = np.arange(700, dtype=np.uint16)[:, None] * 90
    found = np.asarray(decode_image(Image.fromarray(tall)))[..., 0]
    assert (found[:, 0] == np.rint(tall[:, 0] / 257)).all()
    assert to_bytes(np.array([-5, 0, 1, 2, 9]), 0, 2).tolist() == [0, 0, 128, 255, 255]


def test_ranges_are_plain_numbers():
    found = check_image_range([np.int64(3), np.float32(4.5)])
    assert found == (3, 4.5) and [type(x) for x in found] == [int, float]


@pytest.mark.parametrize(
    "image_range", [(0,), (1, 0), (1, 1), (0, float("nan")), (0, float("inf")), "01", (0, "1"), (False, True), 5, {}]
)
def test_wrong_ranges(image_range):
    with pytest.raises(ValueError, match="must be two finite numbers"):
        check_image_range(image_range)
    with pytest.raises(ValueError, match="must be two finite numbers"):
        decode_image(Image.new("RGB", (2, 2)), image_range)
