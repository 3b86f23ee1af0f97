"""An adapter with an unregistered criterion loads, with its masks; only a selection by it is an error."""

import contextlib
import json
import warnings

import pytest
import tiny
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from trainers import make_trainer, off

from peft_heads import (
    HeadMaskedLoraConfig,
    HeadScorer,
    RLRRConfig,
    TaylorHeadScorer,
    get_head_masks,
    load_image_classifier,
    register_criterion,
    set_head_masks,
)
from peft_heads.convert.inspect import inspect_adapter


WARNING = "saved configuration has the criterion 'theirs', which is not registered here"


@pytest.fixture(params=[HeadMaskedLoraConfig, RLRRConfig])
def folder(request, tmp_path):
    """An adapter with masks, beside its base model."""
    tiny.make("vit").save_pretrained(tmp_path / "base")
    tiny.ViTProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    base = tiny.make("vit")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, request.param(ne=2))
    set_head_masks(model, tiny.masks_off(model, 1, 4))
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", criterion="theirs")
    return tmp_path / "adapter"


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_everything_loads_it(folder):
    with pytest.warns(UserWarning, match=WARNING):
        model = PeftModel.from_pretrained(tiny.make("vit"), folder, is_trainable=True)
    assert off(model) == {(1, 4)} and model.peft_config["default"].criterion == "theirs"
    with pytest.warns(UserWarning, match=WARNING):
        model, _ = load_image_classifier(folder)
    assert off(model) == {(1, 4)}
    with pytest.warns(UserWarning, match=WARNING):
        report = inspect_adapter(folder)
    assert report.settings["criterion"] == "theirs"
    assert str(report.masks) == str(get_head_masks(model))


def test_repositories_as_well(folder, monkeypatch):
    """PEFT constructs the configuration of a repository before it calls our class."""
    monkeypatch.setattr("peft_heads._compat.peft.own_config_class", lambda *args: None)
    with pytest.warns(UserWarning, match=WARNING):
        config = PeftConfig.from_pretrained(folder)
    assert config.criterion == "theirs"


def test_it_is_saved_and_copied_as_it_was(folder, tmp_path):
    with pytest.warns(UserWarning, match=WARNING):
        model = PeftModel.from_pretrained(tiny.make("vit"), folder)
    model.add_weighted_adapter(["default"], [1.0], "sum")  # PEFT copies the configuration by constructing it again
    assert model.peft_config["sum"].criterion == "theirs"
    model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["criterion"] == "theirs"


def test_only_a_selection_needs_it(folder, forget_criteria):
    with pytest.warns(UserWarning, match=WARNING):
        model = PeftModel.from_pretrained(tiny.make("vit"), folder, is_trainable=True)
    scorer = HeadScorer(model)
    tiny.train(model, steps=1, after_backward=scorer.update)
    assert set(scorer.all_scores())
    assert all((~mask).sum() == 2 for mask in scorer.select(criterion="grad_norm").values())
    for call in (scorer.select, scorer.scores):
        with pytest.raises(
            ValueError, match="criterion must be one of absolute.*got 'theirs'.*import the plugin first"
        ):
            call()
    register_criterion("theirs", lambda heads: torch.arange(heads.num_heads))
    assert all(mask.tolist() == [False] * 2 + [True] * 4 for mask in scorer.select().values())


def test_a_training_that_goes_on_keeps_the_masks(folder, tmp_path):
    with pytest.warns(UserWarning, match=WARNING):
        model = PeftModel.from_pretrained(tiny.make("vit"), folder, is_trainable=True)
    trainer = make_trainer(tmp_path / "out", [TaylorHeadScorer(warmup_epochs=1)], model=model, num_train_epochs=2)
    with pytest.warns(UserWarning, match="has deactivated heads already and keeps them"):
        trainer.train()
    assert off(model) == {(1, 4)}


def test_a_selection_that_is_ahead_is_refused_before_the_warm_up(folder, tmp_path):
    with pytest.warns(UserWarning, match=WARNING):
        model = PeftModel.from_pretrained(tiny.make("vit"), folder, is_trainable=True)
    set_head_masks(model, {name: torch.ones_like(mask) for name, mask in get_head_masks(model).items()})
    trainer = make_trainer(tmp_path / "out", [TaylorHeadScorer(warmup_epochs=1)], model=model)
    with pytest.raises(ValueError, match="criterion must be one of absolute.*got 'theirs'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_new_configuration_is_refused_and_so_is_one_of_another_type(folder, monkeypatch):
    for config_class in (HeadMaskedLoraConfig, RLRRConfig):
        with pytest.raises(ValueError, match=r"criterion must be one of absolute, .*got 'theirs'$"):
            config_class(ne=1, criterion="theirs")
        with pytest.raises(ValueError, match="criterion must be one of absolute"):
            config_class(ne=1, criterion=["theirs"])
    edit(folder, criterion=["theirs"])
    with pytest.raises(ValueError, match="criterion is .*a wrong type"):
        PeftConfig.from_pretrained(folder)
    monkeypatch.setattr("peft_heads._compat.peft.own_config_class", lambda *args: None)  # as of a repository
    with pytest.raises(ValueError, match="criterion must be one of absolute, .*got \\['theirs'\\]"):
        PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize("ne", [2, -1])
def test_a_new_configuration_is_new_once_another_was_read(folder, ne):
    """This holds even if the reading has failed."""
    edit(folder, ne=ne)
    with warnings.catch_warnings(), contextlib.nullcontext() if ne > 0 else pytest.raises(ValueError, match="got -1"):
        warnings.simplefilter("ignore")
        PeftConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="got 'theirs'"):
        HeadMaskedLoraConfig(criterion="theirs")
