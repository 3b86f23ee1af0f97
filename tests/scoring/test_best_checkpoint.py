"""After training with `load_best_model_at_end` every active adapter is the best checkpoint's, whatever its name."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from trainers import STEPS_PER_EPOCH, make_trainer, off
from transformers import TrainerCallback

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, TaylorHeadScorer
from peft_heads.scoring import best_checkpoint


pytestmark = pytest.mark.filterwarnings("ignore:.*none has been selected")  # the adapters that are not trained

BEST = 2 * STEPS_PER_EPOCH
VALUES = 0.1, 0.5, 0.4  # values of the metric after each of three epochs; heads are selected after the first


def make_model(names, active, config=HeadMaskedLoraConfig, **settings):
    """Make a model with adapters of these names, which all have different weights."""
    torch.manual_seed(0)
    first, *others = names
    model = get_peft_model(tiny.make("vit"), config(ne=1, **settings), adapter_name=first)
    for name in others:
        model.add_adapter(name, config(ne=1, **settings))
    model.base_model.set_adapter(list(active))
    return model


def train(folder, model, values=VALUES, scorer=None, callbacks=(), **arguments):
    scorer = scorer or TaylorHeadScorer(warmup_epochs=1)
    trainer = make_trainer(
        folder,
        [scorer, *callbacks],
        model=model,
        eval_dataset=tiny.examples(8),
        num_train_epochs=len(values),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **arguments,
    )
    remaining = iter(values)
    trainer.compute_metrics = lambda prediction: {"score": next(remaining)}
    trainer.train()
    return trainer


def in_file(checkpoint, name):
    return load_file(checkpoint / ("" if name == "default" else name) / "adapter_model.safetensors")


def same(state_dict, other):
    assert state_dict.keys() == other.keys()
    return all(torch.equal(state_dict[key], other[key]) for key in other)


K_BIT = {"adapter_bits": 1, "classifier_bits": 1}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["default", "second"], {}),
        (["foo"], {}),
        slow(["second", "default"], {}),
        slow(["first", "second"], {}),
        slow(["default", "second"], K_BIT),
        slow(["foo"], K_BIT),
        (["default", "second"], {"config": RLRRConfig}),
        slow(["foo"], {"config": RLRRConfig}),
    ],
    ids=str,
)
def test_the_trained_adapter_is_the_best_checkpoint_s(tmp_path, names, settings):
    trained = "foo" if names == ["foo"] else "second"
    model = make_model(names, [trained], **settings)
    untouched = {name: get_peft_model_state_dict(model, adapter_name=name) for name in names if name != trained}
    untouched = {name: {k: v.clone() for k, v in tensors.items()} for name, tensors in untouched.items()}
    trainer = train(tmp_path, model)
    assert trainer.state.best_global_step == BEST

    now = get_peft_model_state_dict(model, adapter_name=trained)  # weights, masks, classifier
    assert same(now, in_file(tmp_path / f"checkpoint-{BEST}", trained))
    assert not same(now, in_file(tmp_path / f"checkpoint-{BEST + STEPS_PER_EPOCH}", trained))
    assert {len(heads) for heads in off(model, trained)} == {1}
    for name, tensors in untouched.items():
        assert same(get_peft_model_state_dict(model, adapter_name=name), tensors)
    # and it uses them
    fresh = make_model([trained], [trained], **settings)
    fresh.load_adapter(tmp_path / f"checkpoint-{BEST}" / trained, trained)
    with torch.no_grad():
        logits = [m.eval()(tiny.images()).logits for m in (model, fresh)]
    assert torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize("active", [["default", "second"], ["second", "default"]], ids=str)
def test_several_active_adapters(tmp_path, active):
    model = make_model(["default", "second"], active, modules_to_save=[])
    train(tmp_path, model, scorer=TaylorHeadScorer(warmup_epochs=1, adapter_name="second"))
    for name in active:
        now = get_peft_model_state_dict(model, adapter_name=name)
        assert same(now, in_file(tmp_path / f"checkpoint-{BEST}", name)), name
        assert not same(now, in_file(tmp_path / f"checkpoint-{BEST + STEPS_PER_EPOCH}", name)), name
    assert off(model, "default") == {()} and {len(heads) for heads in off(model, "second")} == {1}


def test_another_number_of_classes_and_labels(tmp_path):
    """Trainer has just given the adapter the classifier of "default", with its size."""
    old = get_peft_model(tiny.make("vit", num_labels=5), HeadMaskedLoraConfig(ne=1))
    old.save_pretrained(tmp_path / "five")
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    model.load_adapter(tmp_path / "five", "default")
    model.add_adapter("second", HeadMaskedLoraConfig(ne=1))
    model.set_adapter("second")
    labels = {0: "bean", 1: "leaf", 2: "root"}
    model.get_base_model().config.id2label = labels
    train(tmp_path / "run", model)
    now = get_peft_model_state_dict(model, adapter_name="second")
    assert same(now, in_file(tmp_path / "run" / f"checkpoint-{BEST}", "second"))
    assert model.get_base_model().config.id2label == labels
    assert model(tiny.images()).logits.shape == (4, 3)
    model.set_adapter("default")
    assert model(tiny.images()).logits.shape == (4, 5)


@pytest.mark.slow
def test_best_checkpoint_older_than_the_selection(tmp_path):
    model = make_model(["default", "second"], ["second"])
    with pytest.warns(UserWarning, match="checkpoint of step 4, which is older than the selection of heads at step 8"):
        train(tmp_path, model, values=(1.0, 0.5, 0.2), scorer=TaylorHeadScorer(warmup_epochs=2))
    assert off(model, "second") == {()}
    assert same(get_peft_model_state_dict(model, adapter_name="second"), in_file(tmp_path / "checkpoint-4", "second"))


@pytest.mark.slow
def test_a_masked_adapter_that_is_trained_further(tmp_path):
    model = make_model(["default", "second"], ["second"])
    train(tmp_path / "first", model)
    heads = off(model, "second")
    with pytest.warns(UserWarning, match="keeps them"):
        train(tmp_path / "then", model, values=(0.5, 0.1))
    assert off(model, "second") == heads and {len(each) for each in heads} == {1}
    now = get_peft_model_state_dict(model, adapter_name="second")
    assert same(now, in_file(tmp_path / "then" / f"checkpoint-{STEPS_PER_EPOCH}", "second"))


# What cannot be loaded is refused before training


def refuse(tmp_path, model, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model)
    assert same(model.state_dict(), before)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, r"lora_A.weight has the shape \(8, 24\) in 'default' and \(4, 24\) in 'second'"),
        ({"ne": 0}, "'default' alone has .*head_mask.mask and 3 others"),
        ({"use_dora": True}, "'second' alone has .*lora_magnitude_vector and 3 others"),
        ({"modules_to_save": []}, "'default' alone has .*classifier.bias and 1 others"),
    ],
    ids=str,
)
def test_refused_where_trainer_s_own_loading_would_fail(tmp_path, settings, message):
    model = make_model(["default"], ["default"])
    model.add_adapter("second", HeadMaskedLoraConfig(**{"ne": 1, **settings}))
    model.set_adapter("second")
    refuse(tmp_path, model, f"file of adapter 'default' into the active adapter 'second'.*{message}.*at_end=False")


@pytest.mark.slow
def test_the_way_out_that_the_message_names(tmp_path):
    model = make_model(["default"], ["default"])
    model.add_adapter("second", HeadMaskedLoraConfig(ne=1, r=4))
    model.set_adapter("second")
    refuse(tmp_path, model, "delete the adapter 'default' from the model")
    model.delete_adapter("default")
    train(tmp_path, model)
    now = get_peft_model_state_dict(model, adapter_name="second")
    assert same(now, in_file(tmp_path / f"checkpoint-{BEST}", "second"))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_refused_where_parameters_may_be_sharded(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(best_checkpoint, "AcceleratorState", lambda: SimpleNamespace(distributed_type=kind))
    best_checkpoint.check_best_checkpoint(make_model(["default"], ["default"]), ["default"])  # Trainer's own way
    refuse(tmp_path, make_model(["default", "second"], ["second"]), f"'second' does not work under {kind.value}; name")


def test_a_file_that_is_missing_at_the_end(tmp_path):
    class Delete(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == BEST:
                (tmp_path / f"checkpoint-{BEST}" / "foo" / "adapter_model.safetensors").unlink()

    model = make_model(["foo"], ["foo"])
    with pytest.raises(ValueError, match=r"no file of adapter 'foo' \(.*checkpoint-8/foo/adapter_model.safetensors"):
        train(tmp_path, model, callbacks=[Delete()])


def test_without_the_option_nothing_is_loaded(tmp_path):
    model = make_model(["default", "second"], ["second"])
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=1)], model=model, save_strategy="epoch")
    trainer.train()
    now = get_peft_model_state_dict(model, adapter_name="second")
    assert same(now, in_file(tmp_path / f"checkpoint-{trainer.state.global_step}", "second"))
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert report["adapter"] == "second" and report["degenerate"] is False
