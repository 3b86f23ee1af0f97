import json

import pytest
import tiny
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, set_head_masks, set_image_processor
from peft_heads.adapter_folder.contents import folder_contents
from peft_heads.adapter_folder.labels import read_labels
from peft_heads.adapter_folder.score_files import HEAT_MAP_FILE, SCORES_FILE
from peft_heads.data.images import load_image_processor
from peft_heads.demo.model import load_demo_processor


@pytest.fixture
def model():
    base = tiny.make("vit")
    base.config.id2label = {0: "cat", 1: "dog", 2: "Übung"}
    return get_peft_model(base, HeadMaskedLoraConfig(ne=1, r=4, lora_alpha=2))


def card_of(folder):
    return ModelCard.load(folder / "README.md")


# PEFT looks for the base model's config.json, which is not available here
no_base_config = pytest.mark.filterwarnings("ignore:Could not find a config file in")


@no_base_config
def test_card(model, tmp_path):
    model.peft_config["default"].base_model_name_or_path = "google/vit-base-patch16-224-in21k"
    set_head_masks(model, tiny.masks_off(model, 4))
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert {"peft_heads", "head-masked-lora"} <= set(card.data.tags)
    assert card.data["library_name"] == "peft" and card.data.pipeline_tag == "image-classification"
    assert "Head-masked LoRA adapter for google/vit-base-patch16-224-in21k" in card.text
    assert "head 4 of 6 in all 4 projections" in card.text
    for row in ("| `ne` | 1 |", "| `criterion` | absolute |", "| `mask_scope` | adapter |", "| `r` | 4 |"):
        assert row in card.text
    assert "pip install peft-heads" in card.text and "import peft_heads" in card.text
    assert "PEFT 0." in card.text and "[More Information Needed]" not in card.text


@no_base_config
def test_card_names_a_local_base_model_without_its_folder(model, tmp_path):
    base = tmp_path / "my-vit"
    model.get_base_model().save_pretrained(base)
    model.get_base_model().config._name_or_path = str(base)  # where PEFT takes the card's base_model from
    model.peft_config["default"].base_model_name_or_path = str(base)
    set_head_masks(model, tiny.masks_off(model, 4))
    model.save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()  # the Hub would refuse it
    assert "`my-vit` (a local checkpoint)" in card_of(tmp_path / "adapter").text


def test_another_method_in_the_same_folder_takes_our_section_out(model, tmp_path):
    set_head_masks(model, tiny.masks_off(model, 4))
    model.save_pretrained(tmp_path)
    get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"]))).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "Deactivated heads" not in card.text and "head-masked-lora" not in card.data.tags
    assert "PEFT 0." in card.text


def test_card_is_updated_and_keeps_what_a_person_wrote(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    with pytest.warns(UserWarning, match="none has been selected"):
        model.save_pretrained(tmp_path)
    assert "My words." in card_of(tmp_path).text and "None have been selected yet" in card_of(tmp_path).text
    set_head_masks(model, tiny.masks_off(model, 2))
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "My words." in card.text and card.data.license == "mit"
    assert card.text.count("## Deactivated heads") == 1
    assert "head 2 of 6" in card.text and "None have been" not in card.text


def test_saving_before_the_selection_warns(model, tmp_path):
    with pytest.warns(UserWarning, match=r"to deactivate heads \(ne=1\), but none has been selected"):
        model.save_pretrained(tmp_path)


def test_ne_0_is_silent(tmp_path):
    get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0)).save_pretrained(tmp_path)
    assert "plain LoRA" in card_of(tmp_path).text


def test_labels(model, tmp_path):
    set_head_masks(model, tiny.masks_off(model, 1))
    model.save_pretrained(tmp_path)
    assert read_labels(tmp_path) == {0: "cat", 1: "dog", 2: "Übung"}
    # transformers would take the folder for a full checkpoint
    assert not (tmp_path / "config.json").exists()
    assert read_labels(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["", "[]", '{"id2label": {"a": "b"}}', '{"labels": 1}'])
def test_broken_label_file_names_itself(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match="labels.json is not a label file"):
        read_labels(tmp_path)


def test_image_processor(model, tmp_path):
    processor = load_demo_processor()
    processor.image_mean = [0.1, 0.2, 0.3]
    set_image_processor(model, processor)
    set_head_masks(model, tiny.masks_off(model, 1))
    model.save_pretrained(tmp_path)
    assert list(load_image_processor(tmp_path).image_mean) == [0.1, 0.2, 0.3]
    set_image_processor(model, object())  # a tokenizer, say: not ours to save
    assert json.loads(folder_contents(model).image_processor)["image_mean"] == [0.1, 0.2, 0.3]


def test_card_of_a_trainer(model, tmp_path):
    """Trainer writes a card of its own, to which our section is added."""
    set_head_masks(model, tiny.masks_off(model, 1))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trainer.save_model()
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert "head 1 of 6 in all 4 projections" in card.text
    assert "training procedure" in card.text.lower() and "learning_rate" in card.text


def scores_of(heads, **settings):
    """Return what the scorer leaves in `FolderContents`, as far as it matters here."""
    settings = {"ne": 1, "ratio": None, "granularity": "global", "joint": True, "criterion": "absolute"} | settings
    off = dict.fromkeys(tiny.masks_off(tiny.make("vit")), heads)
    report = {**settings, "mask_scope": "adapter", "deactivated_heads": off}
    return {SCORES_FILE: json.dumps(report).encode(), HEAT_MAP_FILE: b"PNG"}


def test_heat_map_goes_with_the_masks_it_explains(model, tmp_path):
    folder_contents(model).head_scores = scores_of([4])
    set_head_masks(model, tiny.masks_off(model, 4))
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "head_scores.png").read_bytes() == b"PNG"
    assert "](head_scores.png)" in card_of(tmp_path / "one").text

    set_head_masks(model, tiny.masks_off(model, 3))
    for folder in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(folder)
        assert "head 3 of 6" in card_of(folder).text and "head_scores" not in card_of(folder).text
    assert not (tmp_path / "two" / "head_scores.png").exists()
    # the report of the earlier selection is the only one there is
    assert (tmp_path / "one" / "head_scores.json").exists()


def test_heat_map_of_the_folder_is_shown(model, tmp_path):
    """A loaded adapter does not carry the heat map, but may be saved to the folder that has it."""
    for name, content in scores_of([4]).items():
        (tmp_path / name).write_bytes(content)
    set_head_masks(model, tiny.masks_off(model, 4))
    model.save_pretrained(tmp_path)
    assert "](head_scores.png)" in card_of(tmp_path).text


@pytest.mark.parametrize("content", [scores_of([4], criterion="random")[SCORES_FILE], b"", b"[]", b"{}", b"\xff"])
def test_another_report_is_not_shown(model, tmp_path, content):
    (tmp_path / "head_scores.json").write_bytes(content)
    (tmp_path / "head_scores.png").write_bytes(b"PNG")
    set_head_masks(model, tiny.masks_off(model, 4))
    model.save_pretrained(tmp_path)
    assert "head_scores" not in card_of(tmp_path).text
