import json
from importlib.util import find_spec

import pytest
import torch
from torch.utils.data import DataLoader

from peft_heads.data import augmentation
from peft_heads.data.augmentation import FEW_SHOT, FGVC, Augmentation, random_crop
from peft_heads.data.images import collate


with_kornia = pytest.mark.skipif(find_spec("kornia") is None, reason="needs the extra [augment]")


def positions(height, width):
    """Make an image (3, H, W) whose channels are each pixel's row, its column, and 255."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 255)]).to(torch.uint8)


def pictures(number, size=32):
    return [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(number)]


def test_random_crops_are_parts_and_every_place_occurs():
    image = positions(7, 6)
    corners = set()
    for _ in range(200):
        part = random_crop(image, 5)
        top, left = part[0, 0, 0].item(), part[1, 0, 0].item()
        assert torch.equal(part, image[:, top : top + 5, left : left + 5])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(3) for left in range(2)}
    with pytest.raises(ValueError, match="an image of 7 x 6 has no part of 8 x 8"):
        random_crop(image, 8)


def test_flips_left_and_right_in_half_the_images():
    image = positions(4, 4)
    found = Augmentation(flip=True, size=4)([image] * 400)
    assert found.dtype == torch.float32 and found.shape == (400, 3, 4, 4)
    plain = image / 255
    flipped = sum(torch.equal(values, plain.flip(-1)) for values in found)
    assert flipped + sum(torch.equal(values, plain) for values in found) == 400
    assert 140 < flipped < 260


def test_images_of_several_sizes_are_cropped_to_one():
    found = Augmentation(**FGVC, size=8)([positions(9, 12), positions(11, 8)])
    assert found.shape == (2, 3, 8, 8) and found[:, 2].eq(1).all()


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"an image of \(9, 12\) is not 8 x 8: .* random_crop"):
        Augmentation(flip=True, size=8)([positions(9, 12)])


@pytest.mark.parametrize("settings", [FGVC, pytest.param(FEW_SHOT, marks=with_kornia)])
def test_the_generator_decides(settings):
    images = pictures(4)
    augment = Augmentation(**settings, size=32 if settings is FEW_SHOT else 24)
    torch.manual_seed(1)
    first = augment(images)
    second = augment(images)
    torch.manual_seed(1)
    assert torch.equal(augment(images), first) and not torch.equal(second, first)


class Images(torch.utils.data.Dataset):
    def __init__(self, augment):
        self.augment = augment

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixel_values": self.augment([positions(32, 32)])[0], "labels": 0}


@pytest.mark.parametrize("settings", [{**FGVC, "size": 16}, pytest.param({**FEW_SHOT, "size": 32}, marks=with_kornia)])
def test_workers_draw_differently(settings):
    images = Images(Augmentation(**settings))
    batches = DataLoader(images, batch_size=4, num_workers=2, collate_fn=collate, multiprocessing_context="fork")
    one, other = (batch["pixel_values"] for batch in batches)
    assert not torch.equal(one, other)


def test_to_dict():
    assert json.loads(json.dumps(Augmentation(**FGVC).to_dict())) == {
        "random_crop": True,
        "flip": True,
        "color_jitter": 0.0,
        "rand_augment": None,
        "size": 224,
    }


def test_without_kornia(monkeypatch):
    monkeypatch.setattr(augmentation, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need kornia: pip install 'peft-heads\[augment\]'"):
        Augmentation(**FEW_SHOT)
    Augmentation(**FGVC)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"color_jitter": 1.5}, "color_jitter=1.5 must lie between 0 and 1"),
        ({"rand_augment": (0, 9)}, r"rand_augment=\(0, 9\) must be \(n, m\)"),
        ({"rand_augment": (2, 30)}, r"rand_augment=\(2, 30\) must be"),
        ({"rand_augment": [2]}, r"rand_augment=\(2,\) must be"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


@with_kornia
def test_colour_jitter_scales_the_colours():
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    found = Augmentation(color_jitter=0.4, size=8)([grey] * 100) * 255
    # contrast and saturation do not change an image of one shade of grey
    assert (found - found[:, :1, :1, :1]).abs().max() < 0.01
    shades = found[:, 0, 0, 0]
    assert 59.9 < shades.min() < 75 and 125 < shades.max() < 140.1


@with_kornia
def test_every_image_has_its_own_operations():
    image = pictures(1)[0]
    found = Augmentation(**FEW_SHOT, size=32)([image] * 6)
    assert found.shape == (6, 3, 32, 32) and 0 <= found.min() and found.max() <= 1
    assert len({values.sum().item() for values in found}) == 6


@with_kornia
def test_lists_of_a_configuration_file():
    assert Augmentation(rand_augment=[2, 9]) == Augmentation(rand_augment=(2, 9))
