import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from peft_heads.data.images import ImageTransform
from peft_heads.data.preprocessing import Preprocessing, resized_by_shorter_side


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image, **settings):
    return Preprocessing(**settings).pixels(image)


def test_squashed_to_a_square_bicubic():
    image = noise(60, 40)
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    found = pixels(image)
    assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(found, expected)
    nearest = np.asarray(image.resize((16, 16), Image.Resampling.NEAREST)).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(image, size=16, filter="nearest"), nearest)


@pytest.mark.parametrize("resize_size", [None, 64])
def test_squashed_then_centre_crop(resize_size):
    image = noise(100, 50)
    found = pixels(image, size=32, resize="squash", resize_size=resize_size)
    side = resize_size or 32
    whole = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    at = (side - 32) // 2
    np.testing.assert_array_equal(found, whole[at : at + 32, at : at + 32].transpose(2, 0, 1))


@pytest.mark.parametrize(("size", "resized"), [((640, 480), (341, 256)), ((300, 451), (256, 385)), ((9, 900), None)])
def test_shorter_side_then_centre_crop(size, resized):
    image = noise(*size)
    width, height = resized or (256, 25600)
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 224) // 2, (width - 224) // 2
    expected = whole[top : top + 224, left : left + 224].transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(image, resize="shorter_side"), expected)


def test_a_random_crop_is_left_to_do():
    assert pixels(noise(640, 480), resize="shorter_side", crop="random").shape == (3, 256, 341)
    assert pixels(noise(640, 480), resize="squash", resize_size=256, crop="random").shape == (3, 256, 256)
    assert pixels(noise(640, 480), crop="random").shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("none", [[0, 1], [0, 1], [0, 1]]),
        ("half", [[-1, 1], [-1, 1], [-1, 1]]),
        ("imagenet", [[-2.117904, 2.248908], [-2.035714, 2.428571], [-1.804444, 2.64]]),
    ],
)
def test_normalisation(normalization, expected):
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(5, 3, 1, 2)
    values = Preprocessing(normalization=normalization).normalize(images)
    assert values.dtype == torch.float32 and values.shape == (5, 3, 1, 2)
    torch.testing.assert_close(values[4, :, 0], torch.tensor(expected, dtype=torch.float32))
    floats = Preprocessing(normalization=normalization).normalize(images.float() / 255)
    torch.testing.assert_close(floats, values)


@pytest.mark.parametrize("do_normalize", [True, False])
def test_the_checkpoint_s_own(do_normalize):
    size = {"height": 24, "width": 24}
    mean, std = [0.2, 0.3, 0.4], [0.5, 0.25, 0.1]
    processor = tiny.ViTProcessor(
        size=size, resample=Image.Resampling.BICUBIC, image_mean=mean, image_std=std, do_normalize=do_normalize
    )
    preprocessing = Preprocessing.from_processor(processor, size=24)
    processor.image_range = [0, 9]
    assert Preprocessing.from_processor(processor, size=24).image_range == (0, 9)
    image = noise(60, 40)
    found = preprocessing.normalize(torch.from_numpy(preprocessing.pixels(image)))
    expected = ImageTransform(processor)({"image": [image], "label": [0]})["pixel_values"][0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_to_dict_holds_everything_as_plain_values():
    found = Preprocessing(resize="shorter_side", normalization="imagenet").to_dict()
    assert json.loads(json.dumps(found)) == {
        "size": 224,
        "resize": "shorter_side",
        "resize_size": 256,
        "crop": "center",
        "filter": "bicubic",
        "normalization": "imagenet",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert Preprocessing().to_dict()["resize_size"] == 224
    assert Preprocessing(size=112, resize="shorter_side").to_dict()["resize_size"] == 128


def test_a_range_of_deep_images_is_recorded_where_there_is_one():
    """Runs without a range keep their names."""
    found = Preprocessing(image_range=[0, 4095])
    assert found.image_range == (0, 4095) and json.loads(json.dumps(found.to_dict()))["image_range"] == [0, 4095]
    assert Preprocessing(**{**found.to_dict(), "mean": None, "std": None}).image_range == (0, 4095)
    assert "image_range" not in Preprocessing().to_dict()
    assert len({str(Preprocessing(image_range=x).pixel_settings()) for x in (None, (0, 1), (0, 2))}) == 3


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (2_000_000, 50)])
def test_the_shorter_side_of_a_line(size):
    with pytest.raises(ValueError, match=f"it has {size[0]} x {size[1]} pixels, and .* above the 89,478,485 of PIL"):
        resized_by_shorter_side(size, 256)


def test_a_long_image_has_room():
    assert Preprocessing(size=8, resize="shorter_side").pixels(Image.new("RGB", (3000, 3))).shape == (3, 8, 8)
    assert resized_by_shorter_side((13, 7), 14) == (26, 14)


def test_pixel_settings_leave_the_normalisation_out():
    settings = Preprocessing().pixel_settings()
    assert settings == Preprocessing(normalization="half").pixel_settings()
    for change in ({"size": 16}, {"resize_size": 256}, {"crop": "random"}, {"filter": "box"}):
        assert Preprocessing(**change).pixel_settings() != settings
    assert Preprocessing(resize_size=224) != Preprocessing()
    assert Preprocessing(resize_size=224).pixel_settings() == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "crop"}, "resize='crop' is not one of squash, shorter_side"),
        ({"crop": "corner"}, "crop='corner' is not one of"),
        ({"filter": "cubic"}, "filter='cubic' is not one of .*bicubic"),
        ({"normalization": "clip"}, "normalization='clip' is not one of none, imagenet, half, checkpoint"),
        ({"normalization": "checkpoint"}, "mean and std are given with normalization='checkpoint'"),
        ({"mean": (0.1,) * 3, "std": (1.0,) * 3}, "mean and std are given with normalization='checkpoint'"),
        ({"normalization": "checkpoint", "mean": (0.1,), "std": (1.0,) * 3}, "mean=.* must have three values"),
        ({"normalization": "checkpoint", "mean": (0.1,) * 3, "std": (0.0,) * 3}, "std=.* above 0"),
        ({"image_range": (5, 5)}, r"image_range=\(5, 5\) must be two finite numbers"),
        ({"size": 0}, "size=0 must be at least 1"),
        ({"size": 224, "resize_size": 200}, "size=224 must be .* not above resize_size=200"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**settings)


def test_a_processor_without_normalisation():
    assert Preprocessing.from_processor(SimpleNamespace()).normalization == "none"
