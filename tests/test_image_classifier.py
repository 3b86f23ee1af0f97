import io
import json
import logging
import sys

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline

from peft_heads import HeadMaskedLoraConfig, load_image_classifier, set_head_masks, set_image_processor
from peft_heads.adapter_folder.base_model import base_model_class
from peft_heads.cli.errors import raised_by_this_package
from peft_heads.cli.main import main
from peft_heads.convert.inspect import inspect_adapter
from peft_heads.convert.merged import export_merged
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
    """A pipeline would clip them; the recorded range determines how they are decoded."""
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


@pytest.fixture
def stock(base, tmp_path):
    """A stock LoRA adapter with ranks of 8, and of 3 for one kind of module."""
    vit = AutoModelForImageClassification.from_pretrained(base)
    targets, patterns = tiny.now(["q_proj", "v_proj"]), {tiny.now("v_proj"): 3}
    model = get_peft_model(
        vit, LoraConfig(target_modules=targets, rank_pattern=patterns, modules_to_save=["classifier"])
    )
    model.save_pretrained(tmp_path / "stock")
    return model.eval(), tmp_path / "stock"


def edit_settings(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2_000_000},
        {"r": 7},
        {"r": "x"},
        {"rank_pattern": {}},
        {"rank_pattern": {".*v.*": 2_000_000}},
        {"rank_pattern": {"(": 1}},
    ],
)
def test_a_stock_adapter_whose_rank_was_edited(stock, base, tmp_path, monkeypatch, settings):
    model, folder = stock
    loaded, _ = load_image_classifier(folder)
    assert torch.equal(loaded(tiny.images()).logits, model(tiny.images()).logits)
    edit_settings(folder, **settings)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)  # nothing is made
    for use in (load_image_classifier, inspect_adapter, lambda folder: export_merged(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match="rank") as caught:
            use(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert raised_by_this_package(caught.value)


def test_a_stock_adapter_that_peft_cannot_load(stock, base, tmp_path):
    _, folder = stock
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if "lora_B" in key)
    save_file(weights | {key: weights[key][:-1].clone()}, path)
    for use in (load_image_classifier, lambda folder: export_merged(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match="cannot be used .RuntimeError: .*lora_B") as caught:
            use(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert raised_by_this_package(caught.value)


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


@pytest.fixture
def with_code(adapter, monkeypatch, tmp_path):
    """An adapter whose image processor brings code, and a user who answers every question with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO(9 * "y\n"))
    _, folder = adapter
    proof = tmp_path / "the code has run"
    (folder / "code.py").write_text(
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import ViTImageProcessor\n"
        "class Theirs(ViTImageProcessor): pass\n"
    )
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"image_processor_type": "Theirs"}
    path.write_text(json.dumps(settings | {"auto_map": {"AutoImageProcessor": "code.Theirs"}}))
    return folder, proof


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_an_adapter_s_folder_never_runs(with_code, trust):
    folder, proof = with_code
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        load_image_classifier(folder, trust_remote_code=trust)
    assert not proof.exists()


def test_code_never_runs_in_commands(with_code, tmp_path, capsys):
    folder, proof = with_code
    for form in ("merged", "lora"):
        assert main(["export", str(folder), "--to", form, str(tmp_path / form)]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / form).exists()
    assert main(["inspect", str(folder)]) == 0
    assert not proof.exists()


@pytest.mark.parametrize(
    "name",
    [
        "pipeline",
        "AutoTokenizer",
        "ViTConfig",
        "ViTImageProcessor",
        "Trainer",
        "models",
        "TFViTModel",
        "__name__",
        5,
        ["x"],
    ],
)
def test_what_auto_mapping_may_not_name(adapter, name):
    _, folder = adapter
    if getattr(__import__("transformers"), str(name), None) is None and isinstance(name, str):
        pytest.skip("this transformers has no such name")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"auto_mapping": {"base_model_class": name}}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"auto_mapping .* \(expected a model class"):
        load_image_classifier(folder)
    assert inspect_adapter(folder).no_norms.count("auto_mapping")


def test_what_auto_mapping_may_name():
    for name in ("ViTForImageClassification", "AutoModel", "AutoModelForImageClassification"):
        assert base_model_class({"auto_mapping": {"base_model_class": name}}, "").__name__ == name
    for other in ({"base_model_class": "OfMyOwn"}, {"base_model_class": None}, None):
        assert base_model_class({"auto_mapping": other}, "") is AutoModelForImageClassification


def test_a_bin_is_read_everywhere(adapter, tmp_path):
    model, folder = adapter
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin" / "adapter_model.safetensors").exists()
    wanted = model(tiny.images()).logits
    loaded, _ = load_image_classifier(tmp_path / "bin")
    assert torch.equal(loaded(tiny.images()).logits, wanted)
    merged = AutoModelForImageClassification.from_pretrained(export_merged(tmp_path / "bin", tmp_path / "merged"))
    assert torch.allclose(merged.eval()(tiny.images()).logits, wanted, atol=1e-5)
    reports = [inspect_adapter(path) for path in (folder, tmp_path / "bin")]
    assert reports[0].parameters == reports[1].parameters
    assert all(torch.equal(norms, reports[1].norms[name]) for name, norms in reports[0].norms.items())
    assert sum(reports[1].bytes.values()) == (tmp_path / "bin" / "adapter_model.bin").stat().st_size
