import io
import json
import os
import pickle

import datasets
import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL import Image as PIL

from peft_heads.data import decoding
from peft_heads.data.images import (
    ImageTransform,
    collate,
    image_range_of,
    label_names,
    load_image_dataset,
    load_image_processor,
)


def picture(index=0, mode="RGB"):
    return PIL.new(mode, (20, 16), index % 200)


def rows(labels, feature=None, names=("cat", "dog", "emu")):
    feature = feature or ClassLabel(names=list(names))
    features = Features({"image": Image(), "label": feature})
    return Dataset.from_dict({"image": [picture(i) for i in range(len(labels))], "label": labels}, features=features)


@pytest.fixture
def folders(tmp_path):
    """Make image folders train (3 classes x 4) and validation (x 2), in a path with special characters of globs."""
    for split, count in (("train", 4), ("validation", 2)):
        for label in ("cat", "dog", "emu"):
            folder = tmp_path / "my [pics]" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                picture(index).save(folder / f"{index}.png")
    return tmp_path / "my [pics]"


def load_folders(folders, tmp_path, **kwargs):
    return load_image_dataset(train_dir=str(folders / "train"), cache_dir=str(tmp_path / "cache"), **kwargs)


# sources


def test_image_folders(folders, tmp_path):
    data = load_folders(folders, tmp_path, validation_dir=str(folders / "validation"))
    assert {split: len(part) for split, part in data.items()} == {"train": 12, "validation": 6}
    assert label_names(data) == ["cat", "dog", "emu"]


def test_validation_is_split_off_train_by_seed(folders, tmp_path):
    splits = [load_folders(folders, tmp_path, train_val_split=0.25, seed=seed) for seed in (0, 0, 1)]
    assert {split: len(part) for split, part in splits[0].items()} == {"train": 9, "validation": 3}
    first, same, other = ([image.tobytes() for image in data["train"]["image"]] for data in splits)
    assert first == same != other
    assert "validation" not in load_folders(folders, tmp_path, train_val_split=0)


@pytest.mark.parametrize("as_dict", [True, False])
def test_folder_of_save_to_disk_is_left_as_it_was(tmp_path, as_dict):
    data = rows([0, 1, 2] * 4)
    (DatasetDict(train=data) if as_dict else data).save_to_disk(tmp_path / "saved")
    before = sorted(os.listdir(tmp_path / "saved")), sorted(os.listdir(tmp_path))
    loaded = load_image_dataset(str(tmp_path / "saved"), train_val_split=0.5, max_train_samples=4, max_eval_samples=3)
    assert {split: len(part) for split, part in loaded.items()} == {"train": 4, "validation": 3}
    assert (sorted(os.listdir(tmp_path / "saved")), sorted(os.listdir(tmp_path))) == before
    assert not list(tmp_path.rglob("cache-*"))
    with pytest.raises(ValueError, match="dataset_config_name='x' does not apply"):
        load_image_dataset(str(tmp_path / "saved"), "x")


def test_dataset_name_reaches_load_dataset(monkeypatch):
    def load_dataset(name, config_name, cache_dir, token):
        assert (name, config_name, cache_dir, token) == ("someone/pets", "small", "here", "secret")
        return DatasetDict(train=rows([0, 1]), validation=rows([1]), test=rows([0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_image_dataset("someone/pets", "small", cache_dir="here", token="secret")
    assert list(data) == ["train", "validation"]


def test_samples_are_drawn_not_cut(tmp_path):
    rows([0] * 20 + [1] * 20).save_to_disk(tmp_path)
    data = load_image_dataset(str(tmp_path), train_val_split=0, max_train_samples=20, seed=1)
    assert set(data["train"]["label"]) == {0, 1}
    assert len(load_image_dataset(str(tmp_path), train_val_split=0, max_train_samples=99)["train"]) == 40
    with pytest.raises(ValueError, match="max_train_samples=0 must be at least 1"):
        load_image_dataset(str(tmp_path), train_val_split=0, max_train_samples=0)


# labels


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        (["dog", "cat", "dog"], Value("string"), ["cat", "dog"]),
        ([2, 0, 10], Value("int64"), [str(i) for i in range(11)]),
        ([1, 0, 1], None, ["cat", "dog", "emu"]),
    ],
)
def test_label_names(labels, feature, names):
    assert label_names({"train": rows(labels, feature)}) == names


def load(tmp_path, data, **kwargs):
    data.save_to_disk(tmp_path / "data")
    return load_image_dataset(str(tmp_path / "data"), **kwargs)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows([0, 1]).rename_column("image", "img"), r"no image column 'image'.*'img' \(Image\).*--image_column_name"),
        (
            rows([0, 1]).rename_column("label", "fine"),
            r"no label column 'label'.*'fine' \(ClassLabel\).*--label_column",
        ),
        (rows([0, 1]).remove_columns("label"), "no label column 'label'.*one per class"),
        (
            Dataset.from_dict({"image": ["a.png"], "label": [0]}),
            r"'image' of split 'train' holds no images.*cast_column",
        ),
        (rows([0, -1]), "without a label"),
        (rows([0, None]), "without a label"),
        (rows([[0], [1]], Sequence(Value("int64"))), "one class per image"),
        (rows([0.5, 1.5], Value("float32")), "one class per image"),
        (rows([0]), "one training image cannot be split"),
        (
            DatasetDict(train=rows([0, 1]), validation=rows([2])),
            "validation has labels that no training image has: emu",
        ),
        (DatasetDict(train=rows([0]), validation=rows([0], names="ab")), "differs between the splits"),
    ],
)
def test_unusable_data(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, data)


@pytest.mark.parametrize("share", [1.0, -0.1, 3])
def test_share_out_of_range(tmp_path, share):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        load(tmp_path, rows([0, 1]), train_val_split=share)


def test_no_rows(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: DatasetDict(train=rows([])))
    with pytest.raises(ValueError, match="the split 'train' has no rows"):
        load_image_dataset("someone/pets")


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="no data"):
        load_image_dataset()
    with pytest.raises(ValueError, match="not both"):
        load_image_dataset("name", train_dir="folder")
    with pytest.raises(FileNotFoundError, match="validation_dir '/nowhere' is not a folder"):
        load_image_dataset(validation_dir="/nowhere")
    with pytest.raises(FileNotFoundError, match=r"no dataset '\./nowhere'"):
        load_image_dataset("./nowhere", cache_dir=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty"):
        load_image_dataset(train_dir=str(tmp_path / "empty"), cache_dir=str(tmp_path))


# preprocessing


@pytest.fixture
def processor():
    return tiny.ViTProcessor(size={"height": 8, "width": 8}, image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.25, 0.1])


def test_checkpoint_s_own_normalisation_by_default(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    white = PIL.new("RGB", (8, 8), (255, 255, 255))
    own = load_image_processor(tmp_path)
    pixels = ImageTransform(own)({"image": [white], "label": [0]})["pixel_values"][0]
    assert pixels.shape == (3, 8, 8)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([0.8 / 0.5, 0.7 / 0.25, 0.6 / 0.1]))

    plain = load_image_processor(tmp_path, do_normalize=False)
    pixels = ImageTransform(plain)({"image": [white], "label": [0]})["pixel_values"][0]
    torch.testing.assert_close(pixels, torch.ones(3, 8, 8))
    plain.save_pretrained(tmp_path / "used")
    assert load_image_processor(tmp_path / "used").do_normalize is False


def test_no_image_processor(tmp_path):
    with pytest.raises(FileNotFoundError, match="--image_processor_name"):
        load_image_processor(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_any_image_mode(processor, mode, monkeypatch):
    monkeypatch.setattr(decoding, "_alpha_was_said", mode in ("RGBA", "LA"))  # see test_decoding
    pixels = ImageTransform(processor)({"image": [picture(1, mode)], "label": [0]})["pixel_values"]
    assert pixels[0].shape == (3, 8, 8)


def test_batches_from_a_dataset(processor):
    data = rows(["dog", "cat", "dog"], Value("string")).add_column("other", [1, 2, 3])
    transform = ImageTransform(processor, names=label_names({"train": data}))
    data = data.with_transform(transform, columns=["image", "label"])
    batch = collate([data[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["labels"].dtype == torch.int64
    assert set(batch) == {"pixel_values", "labels"}


def test_a_range_is_saved_with_the_processor(processor, tmp_path):
    """It is saved once: the transform reads it there, and writes it there."""
    image = PIL.fromarray(np.full((8, 8), 200, np.int32))
    with pytest.raises(ValueError, match="--image_range"):
        ImageTransform(processor)({"image": [image], "label": [0]})
    first = ImageTransform(processor, image_range=(100, 300))({"image": [image], "label": [0]})["pixel_values"]
    processor.save_pretrained(tmp_path)
    again = load_image_processor(tmp_path)
    assert image_range_of(again) == (100, 300)
    assert torch.equal(first[0], ImageTransform(again)({"image": [image], "label": [0]})["pixel_values"][0])
    again = load_image_processor(tmp_path, image_range=(0, 400))
    assert image_range_of(again) == ImageTransform(again).image_range == (0, 400)
    assert image_range_of(load_image_processor(tmp_path, do_normalize=False)) == (100, 300)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"image_range": [3, "x"]}))
    with pytest.raises(ValueError, match=r"image_range=\[3, 'x'\] must be two finite numbers"):
        load_image_processor(tmp_path)


def test_a_data_set_with_a_range(folders, tmp_path, processor):
    deep = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)
    for path in folders.glob("train/*/*.png"):
        PIL.fromarray(deep).save(path)
    rows = load_folders(folders, tmp_path, train_val_split=0)["train"].with_transform(ImageTransform(processor))
    with pytest.raises(ValueError, match=r"image .*cat/0.png cannot be read: .*--image_range LOW HIGH"):
        rows[0]
    data = load_folders(folders, tmp_path, train_val_split=0, image_range=(0, 4095))
    assert np.ptp(np.asarray(data["train"][0]["image"])) == 255
    with pytest.raises(ValueError, match="must be two finite numbers"):
        load_folders(folders, tmp_path, image_range=(1, 0))


def test_a_line_that_would_become_a_sea(processor):
    """The size is checked before the processor resizes."""
    processor.size = {"shortest_edge": 224}
    line = io.BytesIO()
    PIL.new("RGB", (20_000, 1)).save(line, "PNG")
    with pytest.raises(ValueError, match=r"image lines/1.png cannot be resized: it has 20000 x 1 pixels"):
        ImageTransform(processor)({"image": [{"path": "lines/1.png", "bytes": line.getvalue()}], "label": [0]})


def test_transform_goes_to_worker_processes(processor):
    transform = pickle.loads(pickle.dumps(ImageTransform(processor, names=["a"])))
    assert transform({"image": [picture()], "label": ["a"]})["labels"] == [0]
