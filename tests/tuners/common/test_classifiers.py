import copy
import shutil

import pytest
import tiny
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, pack_adapter, set_head_masks, set_image_processor
from peft_heads.adapter_folder.contents import folder_contents
from peft_heads.adapter_folder.labels import read_labels


ANIMALS = {0: "cat", 1: "dog", 2: "eel"}
PLANTS = {0: "oak", 1: "pea", 2: "rye", 3: "fig", 4: "yew"}


def saved(folder, labels, head, seed):
    """Save an adapter on a classifier with these labels; return its folder and logits."""
    vit = tiny.make("vit", num_labels=len(labels))
    vit.config.id2label, vit.config.label2id = dict(labels), {label: i for i, label in labels.items()}
    model = get_peft_model(vit, HeadMaskedLoraConfig(ne=1)).eval()
    tiny.randomize_lora(model, seed)
    set_head_masks(model, tiny.masks_off(model, head))
    generator = torch.Generator().manual_seed(seed)
    model.get_base_model().classifier.modules_to_save["default"].weight.data.normal_(generator=generator)
    model.save_pretrained(folder)
    return folder, logits(model)


def logits(model):
    with torch.no_grad():
        return model(pixel_values=tiny.images()).logits


@pytest.fixture
def adapters(tmp_path):
    return saved(tmp_path / "animals", ANIMALS, 1, 1), saved(tmp_path / "plants", PLANTS, 4, 2)


def labels_of(model):
    config = model.get_base_model().config
    assert config.label2id == {label: index for index, label in config.id2label.items()}
    assert config.num_labels == model.get_base_model().num_labels == len(config.id2label)
    return config.id2label


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_side_by_side(adapters, low_cpu_mem_usage):
    (animals, animal_logits), (plants, plant_logits) = adapters
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(tiny.make("vit"), animals, adapter_name="animals", **options)
    model.load_adapter(plants, "plants", **options)
    assert labels_of(model) == ANIMALS
    for _ in range(2):
        assert torch.equal(logits(model), animal_logits)
        model.set_adapter("plants")
        assert torch.equal(logits(model), plant_logits)
        assert labels_of(model) == PLANTS
        model.set_adapter("animals")
        assert labels_of(model) == ANIMALS
    with pytest.warns(UserWarning, match="Setting active adapter to plants"):
        model.delete_adapter("animals")
    assert torch.equal(logits(model), plant_logits)
    assert labels_of(model) == PLANTS
    with model.disable_adapter():  # the base model's own classifier
        assert logits(model).shape == (4, 3) and labels_of(model) == {i: f"LABEL_{i}" for i in range(3)}
        assert model(pixel_values=tiny.images(), labels=torch.tensor([0, 1, 2, 0])).loss.isfinite()
    assert labels_of(model) == PLANTS
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), plant_logits, atol=1e-5)
    assert merged.config.num_labels == 5


def test_the_first_adapter_may_differ_from_the_base_model(adapters):
    _, (plants, plant_logits) = adapters
    model = PeftModel.from_pretrained(tiny.make("vit"), plants)
    assert torch.equal(logits(model), plant_logits)
    assert labels_of(model) == PLANTS


def test_stock_peft_raises(adapters, tmp_path):
    """This is the control: delete our handling once stock PEFT no longer raises."""
    stock = get_peft_model(
        tiny.make("vit", num_labels=5), LoraConfig(target_modules=tiny.now(["q_proj"]), modules_to_save=["classifier"])
    )
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "stock")


def test_training_and_loss_follow_the_active_adapter(adapters):
    (animals, _), (plants, _) = adapters
    model = PeftModel.from_pretrained(tiny.make("vit"), animals, adapter_name="animals")
    model.load_adapter(plants, "plants", is_trainable=True)
    model.set_adapter("plants")
    loss = model(pixel_values=tiny.images(), labels=torch.tensor([4, 3, 0, 1])).loss
    expected = torch.nn.functional.cross_entropy(logits(model), torch.tensor([4, 3, 0, 1]))
    assert torch.allclose(loss, expected)
    loss.backward()
    assert model.get_base_model().classifier.modules_to_save["plants"].weight.grad.shape == (5, 24)


def test_each_saves_its_own_labels(adapters, tmp_path):
    (animals, animal_logits), (plants, plant_logits) = adapters
    model = PeftModel.from_pretrained(tiny.make("vit"), animals, adapter_name="animals")
    model.load_adapter(plants, "plants")
    model.save_pretrained(tmp_path / "both")
    base = tiny.make("vit")
    for name, expected, labels in (("animals", animal_logits, ANIMALS), ("plants", plant_logits, PLANTS)):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both" / name)
        assert torch.equal(logits(again), expected)
        assert labels_of(again) == labels


def test_labels_without_names(tmp_path):
    folder, expected = saved(tmp_path / "numbered", {i: f"LABEL_{i}" for i in range(5)}, 0, 3)
    model = PeftModel.from_pretrained(tiny.make("vit"), folder)
    assert torch.equal(logits(model), expected)
    assert labels_of(model) == {i: f"LABEL_{i}" for i in range(5)}
    # of the right size, the model's own names are better than none
    named = tiny.make("vit", num_labels=5)
    named.config.id2label, named.config.label2id = PLANTS, {label: i for i, label in PLANTS.items()}
    assert labels_of(PeftModel.from_pretrained(named, folder)) == PLANTS


def test_a_new_adapter_begins_with_the_base_models_labels(adapters):
    _, (plants, _) = adapters
    vit = tiny.make("vit")
    vit.config.id2label, vit.config.label2id = ANIMALS, {label: i for i, label in ANIMALS.items()}
    model = PeftModel.from_pretrained(vit, plants, adapter_name="plants")
    model.add_adapter("new", HeadMaskedLoraConfig(ne=1))
    assert labels_of(model) == PLANTS
    model.set_adapter("new")
    assert labels_of(model) == ANIMALS
    assert logits(model).shape == (4, 3)


def test_labels_renamed_by_hand_stay_with_their_adapter(adapters, tmp_path):
    (animals, _), (plants, _) = adapters
    model = PeftModel.from_pretrained(tiny.make("vit"), animals, adapter_name="animals")
    model.load_adapter(plants, "plants")
    config, names = model.get_base_model().config, {0: "Katze", 1: "Hund", 2: "Aal"}
    config.id2label, config.label2id = dict(names), {label: i for i, label in names.items()}
    model.set_adapter("plants")
    assert labels_of(model) == PLANTS
    model.save_pretrained(tmp_path / "both")
    assert labels_of(PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "both" / "animals")) == names
    model.set_adapter("animals")
    assert labels_of(model) == names


def test_an_adapter_without_a_head_leaves_the_labels_alone(tmp_path):
    vit = tiny.make("vit", num_labels=5)
    vit.config.id2label, vit.config.label2id = dict(PLANTS), {label: i for i, label in PLANTS.items()}
    model = get_peft_model(vit, HeadMaskedLoraConfig(ne=0, modules_to_save=[]))
    model.save_pretrained(tmp_path)
    base = tiny.make("vit")
    base.config.id2label, base.config.label2id = dict(ANIMALS), {label: i for i, label in ANIMALS.items()}
    again = PeftModel.from_pretrained(base, tmp_path)
    assert labels_of(again) == ANIMALS
    assert again(pixel_values=tiny.images(), labels=torch.tensor([0, 1, 2, 0])).loss.isfinite()


def test_labels_set_after_creation_survive_loading_weights(tmp_path):
    """Trainer loads weights on resuming, and for load_best_model_at_end."""
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0))
    config = model.get_base_model().config
    config.id2label, config.label2id = dict(ANIMALS), {label: i for i, label in ANIMALS.items()}
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert labels_of(model) == ANIMALS
    model.add_adapter("other", HeadMaskedLoraConfig(ne=0))
    model.delete_adapter("other")
    assert labels_of(model) == ANIMALS


def test_mixed_batches(adapters, tmp_path):
    (animals, animal_logits), (plants, _) = adapters
    model = PeftModel.from_pretrained(tiny.make("vit"), animals, adapter_name="animals")
    model.load_adapter(plants, "plants")
    model.load_adapter(saved(tmp_path / "more", {0: "a", 1: "b", 2: "c"}, 2, 5)[0], "more")
    model.eval()
    with pytest.raises(ValueError, match=r"outputs of classifier are: animals 3, plants 5; predict with one adapter"):
        model(pixel_values=tiny.images(), adapter_names=["animals", "plants", "animals", "plants"])
    with pytest.raises(ValueError, match=r"plants 5, __base__ 3"):
        model(pixel_values=tiny.images(), adapter_names=["plants", "__base__", "plants", "plants"])
    with torch.no_grad():
        mixed = model(pixel_values=tiny.images(), adapter_names=["animals", "more", "__base__", "animals"]).logits
    assert torch.allclose(mixed[[0, 3]], animal_logits[[0, 3]], atol=1e-6)
    model.set_adapter("more")
    assert torch.allclose(mixed[1], logits(model)[1], atol=1e-6)


def test_a_stock_adapter_of_another_size_joins(adapters, tmp_path):
    (animals, animal_logits), _ = adapters
    torch.manual_seed(4)
    stock = get_peft_model(
        tiny.make("vit", num_labels=5),
        LoraConfig(target_modules=tiny.now(["q_proj", "v_proj"]), modules_to_save=["classifier"]),
    )
    tiny.randomize_lora(stock)
    stock.eval().save_pretrained(tmp_path / "stock")
    model = PeftModel.from_pretrained(tiny.make("vit"), animals, adapter_name="animals")
    model.add_adapter("stock", HeadMaskedLoraConfig.from_lora(tmp_path / "stock"))
    model.load_adapter(tmp_path / "stock", "stock")
    assert torch.equal(logits(model), animal_logits)
    model.set_adapter("stock")
    assert torch.equal(logits(model), logits(stock))
    assert labels_of(model) == {i: f"LABEL_{i}" for i in range(5)}


def test_segmentation_heads(tmp_path):
    def make(num_labels):
        torch.manual_seed(0)
        sizes = {"depths": [1] * 4, "hidden_sizes": [4, 8, 8, 8], "num_attention_heads": [2, 2, 2, 2]}
        config = SegformerConfig(**sizes, mlp_ratios=[1] * 4, decoder_hidden_size=8, num_labels=num_labels)
        return SegformerForSemanticSegmentation(config)

    model = get_peft_model(make(7), HeadMaskedLoraConfig(ne=1)).eval()
    tiny.randomize_lora(model)
    set_head_masks(model, tiny.masks_off(model, 0))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values=images).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(3), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, expected)
    assert again.get_base_model().decode_head.modules_to_save["default"].classifier.out_channels == 7


def test_other_mismatches_are_refused(adapters):
    (animals, _), _ = adapters
    wider = tiny.make("vit")
    wider.classifier = torch.nn.Linear(25, 3)
    with pytest.raises(ValueError, match=r"classifier.weight has the shape \(3, 24\), but .* \(3, 25\)"):
        PeftModel.from_pretrained(wider, animals)
    assert type(wider.classifier) is torch.nn.Linear  # nothing was put in
    assert all(param.requires_grad for param in wider.parameters())


def labelled(names):
    model = tiny.make("vit", num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    return model


def test_a_configuration_that_serves_for_several_models(tmp_path):
    """Neither labels nor image processor of one model are passed to the next."""
    config = HeadMaskedLoraConfig(ne=1)
    for names in (["cat", "dog", "eel"], ["a", "b", "c"], ["oak", "pea", "rye", "fig", "yew"]):
        model = get_peft_model(labelled(names), config)
        assert folder_contents(model).image_processor is None
        set_image_processor(model, tiny.ViTProcessor())
        set_head_masks(model, tiny.masks_off(model, 0))
        assert labels_of(model) == dict(enumerate(names)) and model.get_base_model().num_labels == len(names)
        model(**tiny.batch()).loss.backward()
        model.save_pretrained(tmp_path / names[0])
        assert read_labels(tmp_path / names[0]) == dict(enumerate(names))


def test_a_configuration_for_two_adapters_of_one_model(tmp_path):
    config = HeadMaskedLoraConfig(ne=0)
    model = get_peft_model(labelled(["cat", "dog", "eel"]), config)
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.get_base_model().config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path)
    assert read_labels(tmp_path) == {0: "cat", 1: "dog", 2: "eel"}
    assert read_labels(tmp_path / "other") == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_a_saved_configuration_for_a_new_adapter(tmp_path, how):
    """The folder's labels belong to its weights, which are not loaded; and the folder may be deleted."""
    get_peft_model(labelled(["cat", "dog", "eel"]), HeadMaskedLoraConfig(ne=0)).save_pretrained(tmp_path / "saved")
    config = HeadMaskedLoraConfig.from_pretrained(tmp_path / "saved")
    base = labelled(["oak", "pea", "rye", "fig", "yew"])
    if how == "get_peft_model":
        model = get_peft_model(base, config)
    else:
        model = get_peft_model(base, HeadMaskedLoraConfig(ne=0))
        model.add_adapter("new", config)
        model.set_adapter("new")
    assert labels_of(model)[0] == "oak" and len(labels_of(model)) == model.get_base_model().num_labels == 5
    shutil.rmtree(tmp_path / "saved")
    get_peft_model(labelled(["a", "b", "c"]), config)


def test_injected_with_another_number_of_classes():
    source = inject_adapter_in_model(HeadMaskedLoraConfig(ne=0), tiny.make("vit", num_labels=7))
    state_dict = get_peft_model_state_dict(source)
    model = inject_adapter_in_model(HeadMaskedLoraConfig(ne=0), tiny.make("vit"))
    set_peft_model_state_dict(model, state_dict)
    assert model.num_labels == model.config.num_labels == 7
    assert model(**tiny.batch()).loss.isfinite()


# ignore_mismatched_sizes: a new task keeps its own classifier


KINDS = {
    "head-masked": HeadMaskedLoraConfig(ne=1),
    "k bit": HeadMaskedLoraConfig(ne=1, adapter_bits=2, classifier_bits=4),
    "packed": HeadMaskedLoraConfig(ne=1, adapter_bits=2, classifier_bits=4),
    "rlrr": RLRRConfig(ne=1),
}


def base(labels):
    vit = tiny.make("vit", num_labels=len(labels))
    vit.config.id2label, vit.config.label2id = dict(labels), {label: i for i, label in labels.items()}
    return vit


@pytest.fixture(params=KINDS)
def five_classes(request, tmp_path):
    model = get_peft_model(base(PLANTS), copy.deepcopy(KINDS[request.param]))
    for name, param in model.named_parameters():
        if "lora_B" in name or "rlrr_left" in name or "modules_to_save" in name:
            param.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    set_head_masks(model, tiny.masks_off(model, 2))
    if request.param == "packed":
        pack_adapter(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def by_from_pretrained(vit, folder, **options):
    return PeftModel.from_pretrained(vit, folder, is_trainable=True, **options)


def by_load_adapter(vit, folder, **options):
    kind = type(PeftConfig.from_pretrained(folder))
    model = get_peft_model(vit, kind(ne=1))
    model.load_adapter(folder, "new", is_trainable=True, **options)
    model.set_adapter("new")
    return model


@pytest.mark.parametrize("load", [by_from_pretrained, by_load_adapter])
def test_mismatched_heads_are_ignored_if_asked(five_classes, load):
    with pytest.warns(UserWarning, match="being ignored because you passed `ignore_mismatched_sizes=True`"):
        model = load(base(ANIMALS), five_classes, ignore_mismatched_sizes=True)
    head = model.get_base_model().classifier.modules_to_save[model.active_adapter]
    assert labels_of(model) == ANIMALS and head.out_features == 3
    assert torch.equal(head.weight, base(ANIMALS).classifier.weight) and head.weight.requires_grad
    assert logits(model).shape == (4, 3)
    mine, saved = (
        get_peft_model_state_dict(each, adapter_name=each.active_adapter)
        for each in (model, by_from_pretrained(base(PLANTS), five_classes))
    )
    compared = [key for key in mine if "classifier" not in key and not key.endswith("_packed")]
    assert all(torch.equal(mine[key], saved[key]) for key in compared if key in saved)

    model = load(base(ANIMALS), five_classes)  # without the option, the file's classifier takes over
    assert labels_of(model) == PLANTS and logits(model).shape == (4, 5)


@pytest.mark.filterwarnings("ignore:Some weights of")
def test_with_the_ignored_head_a_new_task_is_trained_and_saved(five_classes, tmp_path):
    model = by_from_pretrained(base(ANIMALS), five_classes, ignore_mismatched_sizes=True)
    tiny.train(model, steps=1)
    model.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(base(PLANTS), tmp_path / "new")
    assert labels_of(again) == ANIMALS
    assert torch.equal(logits(again.eval()), logits(model.eval()))


@pytest.mark.filterwarnings("ignore:Some weights of")
def test_nothing_of_an_ignored_head_is_left_for_later(five_classes):
    """Weights that are loaded by hand afterwards must fit."""
    model = by_from_pretrained(base(ANIMALS), five_classes, ignore_mismatched_sizes=True)
    other = by_from_pretrained(base(PLANTS), five_classes)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*classifier\.modules_to_save\.default\.weight"):
        model.load_state_dict(other.state_dict())


def test_a_head_of_the_same_size_is_loaded_all_the_same(five_classes):
    names = {index: f"new{index}" for index in range(5)}
    model = by_from_pretrained(base(names), five_classes, ignore_mismatched_sizes=True)
    assert labels_of(model) == PLANTS
    assert torch.equal(logits(model.eval()), logits(by_from_pretrained(base(PLANTS), five_classes).eval()))
