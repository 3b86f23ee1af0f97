import logging

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from peft_heads import HeadMaskedLoraConfig, load_image_classifier, set_head_masks, set_image_processor
from peft_heads.data.images import ImageTransform, decode_image
from peft_heads.demo.model import load_demo_processor


@pytest.fixture
def base(tmp_path):
    """A base checkpoint with 5 labels of its own and an image processor."""
    folder = tmp_path / "base"
    tiny.make("vit", num_labels=5).save_pretrained(folder)
    processor = load_demo_processor()
    processor.size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter for 3 other labels and its model."""
    names = {0: "cat", 1: "dog", 2: "eel"}
    vit = AutoModelForImageClassification.from_pretrained(base, id2label=names, ignore_mismatched_sizes=True)
    model = get_peft_model(vit, HeadMaskedLoraConfig(ne=1))
    tiny.randomize_lora(model)
    set_head_masks(model, tiny.masks_off(model, 1))
    processor = load_demo_processor()
    processor.size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    processor.image_mean = [0.1, 0.2, 0.3]
    set_image_processor(model, processor)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


def test_load(adapter, caplog):
    expected, folder = adapter
    caplog.clear()
    model, processor = load_image_classifier(folder)
    assert not model.training
    assert model.config.num_labels == 3 and model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "eel": 2}
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert torch.equal(model(tiny.images()).logits, expected(tiny.images()).logits)
    assert "LOAD REPORT" not in caplog.text  # about a classifier that the adapter brings


def test_pipeline(adapter, caplog):
    model, processor = load_image_classifier(adapter[1])
    with caplog.at_level(logging.WARNING):
        classify = pipeline("image-classification", model=model, image_processor=processor)
        results = classify(Image.new("RGB", (20, 30), "red"))
    assert {result["label"] for result in results} == {"cat", "dog", "eel"}
    assert "not supported" not in caplog.text


def test_images_of_more_than_8_bits(adapter, tmp_path):
    """A pipeline would clip them; what was recorded says how they are decoded."""
    model, folder = adapter
    processor = load_demo_processor()
    processor.size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    values = np.random.default_rng(0).integers(1000, 3000, (20, 20)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "scan.png")
    row = {"image": [{"path": str(tmp_path / "scan.png"), "bytes": None}], "label": [0]}
    trained_on = ImageTransform(processor, image_range=(1000, 3000))(row)["pixel_values"][0]
    set_image_processor(model, processor)
    model.save_pretrained(tmp_path / "ranged")

    card = (tmp_path / "ranged" / "README.md").read_text()
    assert '`peft_heads.data.images.decode_image("FILE", image_range=(1000, 3000))`' in card
    assert "trained with 1000 as black and 3000 as white" in card
    other = (folder / "README.md").read_text()
    assert '`peft_heads.data.images.decode_image("FILE")`' in other and "as black" not in other

    message = (
        r"ranged was trained on images of more than 8 bits with 1000 as black .*decode_image\(path, image_range=\(1000"
    )
    with pytest.warns(UserWarning, match=message):
        loaded, again = load_image_classifier(tmp_path / "ranged")
    picture = decode_image(tmp_path / "scan.png", again.image_range)
    assert torch.equal(again(picture, return_tensors="pt")["pixel_values"][0], trained_on)
    classify = pipeline("image-classification", model=loaded, image_processor=again)
    scores = {entry["label"]: entry["score"] for entry in classify(picture)}
    with torch.no_grad():
        expected = loaded(trained_on[None]).logits.softmax(-1)[0]
    assert [scores[name] for name in ("cat", "dog", "eel")] == pytest.approx(expected.tolist(), abs=1e-6)


def test_base_model_fills_in_what_the_folder_lacks(adapter, base):
    _, folder = adapter
    (folder / "preprocessor_config.json").unlink()
    _, processor = load_image_classifier(folder)
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]


def test_stock_lora_adapter(base, tmp_path):
    vit = AutoModelForImageClassification.from_pretrained(base)
    model = get_peft_model(vit, LoraConfig(target_modules=tiny.now(["q_proj"]), modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path / "stock")
    loaded, _ = load_image_classifier(tmp_path / "stock")
    assert torch.equal(loaded(tiny.images()).logits, model.eval()(tiny.images()).logits)


def test_subfolder(adapter, tmp_path):
    expected, _ = adapter
    model, _ = load_image_classifier(tmp_path, subfolder="adapter")
    assert torch.equal(model(tiny.images()).logits, expected(tiny.images()).logits)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter 'me/nowhere': neither a local folder"):  # offline
        load_image_classifier("me/nowhere")
    with pytest.raises(FileNotFoundError, match="no adapter '/no/such/folder'"):
        load_image_classifier("/no/such/folder")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        load_image_classifier(tmp_path)
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0))  # made from a config: no name
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say which base model"):
        load_image_classifier(tmp_path)
