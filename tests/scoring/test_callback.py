import json
import logging
import warnings

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from trainers import STEPS_PER_EPOCH, make_trainer, off
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from peft_heads import (
    HeadMaskedLoraConfig,
    HeadScorer,
    RLRRConfig,
    TaylorHeadScorer,
    get_head_masks,
    set_head_masks,
)
from peft_heads.demo.model import load_demo_processor
from peft_heads.heads import CRITERIA


class Watch(TrainerCallback):
    """A callback that notes the scored steps and the step at which masks are set."""

    def __init__(self, scorer):
        self.scorer, self.counted, self.masked = scorer, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.counted.append(self.scorer._scorer.num_steps)
        self.masked.append(self.scorer.masks is not None)


# When


@pytest.mark.parametrize(
    ("arguments", "window", "selected"),
    [
        ({}, (1, 2), 2),  # 0.1 of 16 steps, rounded up
        ({"select_at": 0.5}, (5, 8), 8),
        ({"select_at": 0.5, "window": "all"}, (1, 8), 8),
        ({"select_at": 0.5, "window": "last_step"}, (8, 8), 8),
        ({"select_at": 6}, (3, 6), 6),
        ({"select_at": 3}, (1, 3), 3),  # the window is cut to the warm-up
        ({"warmup_epochs": 2}, (5, 8), 8),
        ({"warmup_epochs": 0.5}, (1, 2), 2),
        ({"warmup_epochs": 2, "window": "all"}, (1, 8), 8),
    ],
)
def test_window_and_selection(tmp_path, arguments, window, selected):
    scorer = TaylorHeadScorer(**arguments)
    watch = Watch(scorer)
    trainer = make_trainer(tmp_path, [scorer, watch])
    trainer.train()
    first, last = window
    expected = [min(max(step - first + 1, 0), last - first + 1) for step in range(1, 17)]
    assert watch.counted == expected
    assert (scorer.progress["first_step"], scorer.progress["select_step"]) == window
    assert watch.masked == [step >= selected for step in range(1, 17)]
    assert len(off(trainer.model)) == 1 and len(next(iter(off(trainer.model)))) == 1


def test_share_of_the_steps_is_read_as_written(tmp_path):
    scorer = TaylorHeadScorer(select_at=0.28)
    trainer = make_trainer(tmp_path, [scorer], max_steps=25)  # 0.28 * 25 == 7.000000000000001
    trainer.train()
    assert scorer.progress["selected_at"] == 7


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    scorer = TaylorHeadScorer(warmup_epochs=2)
    watch = Watch(scorer)
    trainer = make_trainer(tmp_path, [scorer, watch], per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    assert scorer.progress["selected_at"] == 2 * STEPS_PER_EPOCH
    assert max(watch.counted) == STEPS_PER_EPOCH


def scores_of_a_run(folder, **arguments):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    trainer = make_trainer(folder, [TaylorHeadScorer(warmup_epochs=1)], model=model, **arguments)
    with pytest.warns(UserWarning, match="the score of all 6 heads is 0"):  # lora_B stays zero
        trainer.train()
    return json.loads((folder / "head_scores.json").read_text())["scores"]


@pytest.mark.parametrize("criterion", ["absolute", "positive", "grad_norm"])
def test_clipping_and_accumulation_do_not_matter(tmp_path, criterion):
    """Invariant 7 through Trainer. Nothing is learned, so that clipping cannot change the weights either."""
    plain = {"learning_rate": 0.0, "max_grad_norm": 0}
    expected = scores_of_a_run(tmp_path / "a", **plain)
    clipped = scores_of_a_run(tmp_path / "b", **{**plain, "max_grad_norm": 1e-3})
    assert clipped[criterion] == expected[criterion]
    split = scores_of_a_run(tmp_path / "c", **plain, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    for name, values in expected[criterion].items():
        torch.testing.assert_close(torch.tensor(split[criterion][name]), torch.tensor(values), rtol=1e-5, atol=1e-9)
    assert any(any(values) for values in expected["grad_norm"].values())


# What it leaves behind


def test_files_log_and_masks(tmp_path, caplog):
    scorer = TaylorHeadScorer(warmup_epochs=2)
    trainer = make_trainer(tmp_path, [scorer])
    with caplog.at_level(logging.INFO, logger="peft_heads"):
        trainer.train()
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert set(report["scores"]) == {name for name in CRITERIA if not CRITERIA[name].needs_gates}
    assert report["step"] == 8 and report["epoch"] == 2.0
    assert report["window"] == {"first_step": 5, "last_step": 8, "steps_counted": 4, "steps_skipped": 0}
    assert report["masks"] == {name: mask.tolist() for name, mask in get_head_masks(trainer.model).items()}
    assert {name: [i for i, on in enumerate(m) if not on] for name, m in report["masks"].items()} == report[
        "deactivated_heads"
    ]
    assert str(scorer.masks) == str(get_head_masks(trainer.model))
    assert (tmp_path / "head_scores.png").read_bytes().startswith(b"\x89PNG")

    (entry,) = [entry for entry in trainer.state.log_history if "deactivated_heads" in entry]
    assert entry["step"] == 8 and entry["epoch"] == 2.0 and "of 6 in all 4 projections" in entry["deactivated_heads"]
    assert any("deactivated heads by absolute: head" in r.message and r.levelname == "INFO" for r in caplog.records)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no temporary files


def test_attached_it_logs_through_the_trainer(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, [Reporter()], logging_strategy="steps", logging_steps=1)
    scorer = TaylorHeadScorer(warmup_epochs=2).attach(trainer)
    assert scorer in trainer.callback_handler.callbacks
    trainer.train()
    assert [log["deactivated_heads"] for log in seen if "deactivated_heads" in log]
    assert [log for log in seen if "loss" in log and log["epoch"] == 2.0]  # the step's own entry is not lost
    assert len([entry for entry in trainer.state.log_history if "deactivated_heads" in entry]) == 1


def test_the_image_processor_is_saved_with_the_adapter(tmp_path):
    """The model itself saves it, as in push_to_hub, not only Trainer."""
    scorer = TaylorHeadScorer(warmup_epochs=2)
    trainer = make_trainer(tmp_path, [scorer])
    trainer.callback_handler.processing_class = load_demo_processor()
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "preprocessor_config.json").read_text())["size"]["height"] == 32


def test_same_seed_same_heads(tmp_path):
    reports = []
    for name in "ab":
        make_trainer(tmp_path / name, [TaylorHeadScorer(warmup_epochs=2)]).train()
        reports.append(json.loads((tmp_path / name / "head_scores.json").read_text()))
    assert reports[0] == reports[1]


def test_ne_0_is_scored_and_never_masked(tmp_path):
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], ne=0)
    trainer.train()
    assert off(trainer.model) == {()}
    assert json.loads((tmp_path / "head_scores.json").read_text())["deactivated_heads"] == {}


def test_scoring_does_not_change_training(tmp_path):
    """With ne=0 the weights equal those of a run without the callback, bit for bit."""
    weights = []
    for callbacks in ([TaylorHeadScorer(warmup_epochs=2)], []):
        trainer = make_trainer(tmp_path, callbacks, ne=0)
        trainer.train()
        weights.append(trainable(trainer.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def trainable(model):
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


# Resuming


@pytest.mark.parametrize("restore", [False, True], ids=["", "restore_callback_states"])
@pytest.mark.parametrize("resume_at", [3, 4, 6, 8, 10, 16])
def test_resumed_run_equals_the_undisturbed_one(tmp_path, resume_at, restore):
    """Runs resume before (3, 4), in (6), at the end of (8) and after (10) the window of steps 5 to 8, and at the end."""
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = make_trainer(tmp_path / "whole", [TaylorHeadScorer(warmup_epochs=2)], **settings)
    whole.train()

    checkpoint = tmp_path / "whole" / f"checkpoint-{resume_at}"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all(m.all() for n, m in saved.items() if "head_mask" in n) == (resume_at < 8)
    scorer = TaylorHeadScorer(warmup_epochs=2)
    resumed = make_trainer(
        tmp_path / "resumed", [scorer], restore_callback_states_from_checkpoint=restore, seed=0, **settings
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert off(resumed.model) == off(whole.model) and len(next(iter(off(whole.model)))) == 1
    final = [load_file(trainer_file(t, tmp_path)) for t in (whole, resumed)]
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]), name
    if resume_at < 8:
        reports = [json.loads((tmp_path / d / "head_scores.json").read_text()) for d in ("whole", "resumed")]
        assert reports[0] == reports[1]


@pytest.mark.parametrize("resume_at", [3, 6, 10])
def test_resumed_k_bit_run_equals_the_undisturbed_one(tmp_path, resume_at):
    """Checkpoints hold the full-precision weights behind the bits."""
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 8}
    trainers = []
    for name in ("whole", "resumed"):
        options = {"adapter_bits": 1, "classifier_bits": 1, "bottleneck_dropout": 0.1, "lora_dropout": 0.1}
        model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, **options))
        trainers.append(make_trainer(tmp_path / name, [TaylorHeadScorer(select_at=8)], model=model, **settings))
    whole, resumed = trainers
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{resume_at}"))
    assert off(resumed.model) == off(whole.model) != {()}
    final = [load_file(trainer_file(t, tmp_path)) for t in trainers]
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]), name
    model = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "whole" / "checkpoint-16").eval()
    with torch.no_grad():
        assert torch.equal(model(tiny.images()).logits, whole.model.eval()(tiny.images()).logits)


def trainer_file(trainer, tmp_path):
    folder = tmp_path / f"final-{id(trainer)}"
    trainer.model.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def test_same_callback_used_again_for_an_earlier_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], save_strategy="steps", save_steps=2)
    trainer.train()
    first = off(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert off(trainer.model) == first and first != {()}


def test_resuming_with_another_window(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], **settings).train()
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=3)], **settings)
    with pytest.raises(ValueError, match=r"window of steps 5 to 8, but this run's window is 9 to 12.*select_at=8"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ne": 2}, r"ne=2 \(was 1\)"),
        ({"ne": 0}, "carries no mask there: it was created with ne=0"),
        (
            {"granularity": "layer", "criterion": "front"},
            r"criterion='front' \(was 'absolute'\), granularity='layer' \(was",
        ),
        ({"mask_scope": "head"}, "was saved without mask_scope=head, which its configuration says"),
    ],
)
def test_resuming_after_the_selection_with_other_settings(tmp_path, change, message):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], **settings).train()
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(**{"ne": 1, **change}))
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], model=model, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    # before the selection they may change
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert all(len(heads) == model.peft_config["default"].ne for heads in off(model))


def train_without_scorer(folder, settings):
    with pytest.warns(UserWarning, match="none has been selected"):
        make_trainer(folder, [], **settings).train()


def test_resuming_a_run_that_had_no_scorer(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6}
    train_without_scorer(tmp_path, settings)
    late = make_trainer(tmp_path, [TaylorHeadScorer(select_at=4)], **settings)
    with pytest.raises(ValueError, match="resumes at step 6, after the selection of heads at step 4.*more than 6"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    fine = make_trainer(tmp_path, [TaylorHeadScorer(select_at=10)], **settings)
    fine.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert off(fine.model) != {()}


def test_catching_up_needs_no_scores_for_front(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6}
    train_without_scorer(tmp_path, settings)
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=2, criterion="front"))
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(select_at=4)], model=model, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert off(trainer.model) == {(0, 1)}


def test_checkpoints_of_the_warm_up_are_saved_without_a_warning(tmp_path):
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], save_strategy="epoch")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*none has been selected")
        trainer.train()
    assert "None have been selected yet" in (tmp_path / "checkpoint-4" / "README.md").read_text()
    assert "None have been" not in (tmp_path / "checkpoint-8" / "README.md").read_text()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select_at": 0.1, "warmup_epochs": 1}, "not both; got select_at=0.1, warmup_epochs=1"),
        ({"select_at": 0}, "got 0"),
        ({"select_at": 2.5}, "whole number of steps; got 2.5"),
        ({"select_at": float("nan")}, "got nan"),
        ({"select_at": float("inf")}, "got inf"),
        ({"warmup_epochs": float("inf")}, "positive; got inf"),
        ({"warmup_epochs": 0}, "positive; got 0"),
        ({"window": "epoch"}, "window must be one of last_epoch, all, last_step; got 'epoch'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaylorHeadScorer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select_at": 17}, "select_at=17 selects heads at step 17, after the end of training at step 16"),
        ({"warmup_epochs": 10}, "warmup_epochs=10 of 4 steps selects heads at step 40, after the end"),
    ],
)
def test_selection_after_the_end_of_training(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [TaylorHeadScorer(**arguments)]).train()


def test_selection_at_the_last_step(tmp_path):
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=4)])
    with pytest.warns(UserWarning, match="the last of training: no step is trained with the masks"):
        trainer.train()
    assert off(trainer.model) != {()}


def begin(folder, scorer, model, **arguments):
    """Run what comes before the first step."""
    trainer = make_trainer(folder, [scorer], model=model, **arguments)
    state = TrainerState(max_steps=16)
    dataloader = trainer.get_train_dataloader()
    scorer.on_train_begin(trainer.args, state, trainer.control, model=model, train_dataloader=dataloader)


FIRST_STEP = [
    ({"select_at": 1}, {}),
    ({"select_at": 1, "window": "last_step"}, {}),
    ({"select_at": 1, "window": "all"}, {}),
    ({"select_at": 0.05}, {}),
    ({"warmup_epochs": 0.2}, {}),
    ({"warmup_epochs": 1}, {"gradient_accumulation_steps": 4}),  # epochs of one step
]


@pytest.mark.parametrize(("when", "arguments"), FIRST_STEP, ids=str)
def test_selection_by_the_first_step_of_a_new_adapter(tmp_path, when, arguments):
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(**when)], **arguments)
    where = tiny.now(r"vit\.layers\.\*\.attention\.q_proj, vit\.layers\.\*\.attention\.v_proj")
    (name, value), *_ = when.items()
    with pytest.raises(
        ValueError, match=f"{name}={value} .*'absolute' scores of step 1 alone.*in {where}: .*select_at=2"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and off(trainer.model) == {()}
    if when == {"select_at": 1}:
        trainer.remove_callback(TaylorHeadScorer)
        TaylorHeadScorer(select_at=2).attach(trainer)  # the way out
        trainer.train()
        assert off(trainer.model) != {()}


@pytest.mark.parametrize("criterion", ["positive", "negative", "most_responsive"])
@pytest.mark.parametrize("lora", [{}, {"lora_bias": True}, {"use_dora": True}, {"granularity": "layer"}], ids=str)
def test_every_taylor_criterion_is_refused_at_the_first_step(tmp_path, criterion, lora):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, criterion=criterion, **lora))
    with pytest.raises(ValueError, match=f"{criterion!r} scores of step 1 alone"):
        begin(tmp_path, TaylorHeadScorer(select_at=1), model)


def test_rlrr_that_begins_with_zero_is_refused_at_the_first_step(tmp_path):
    model = get_peft_model(tiny.make("vit"), RLRRConfig(ne=1, init="zero"))
    with pytest.raises(ValueError, match="scores of step 1 alone"):
        begin(tmp_path, TaylorHeadScorer(select_at=1), model)


@pytest.mark.parametrize(
    "config",
    [
        *(HeadMaskedLoraConfig(ne=1, criterion=each) for each in ("grad_norm", "front", "random")),
        HeadMaskedLoraConfig(ne=0),
        HeadMaskedLoraConfig(ne=1, init_lora_weights=False),
        HeadMaskedLoraConfig(ne=1, adapter_bits=1),
        RLRRConfig(ne=1),
    ],
    ids=lambda config: f"{config.peft_type.value} {config.criterion}",
)
def test_selection_by_the_first_step_where_it_says_something(tmp_path, config):
    model = get_peft_model(tiny.make("vit"), config)
    make_trainer(tmp_path, [TaylorHeadScorer(select_at=1)], model=model, max_steps=2).train()  # warnings are errors
    assert (off(model) == {()}) == (config.ne == 0)


def test_a_trained_adapter_may_be_scored_by_the_first_step(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    begin(tmp_path, TaylorHeadScorer(select_at=2), model)
    tiny.randomize_lora(model)
    begin(tmp_path, TaylorHeadScorer(select_at=1), model)
    set_head_masks(model, tiny.masks_off(model, 4))
    tiny.randomize_lora(model, std=0)
    with pytest.warns(UserWarning, match="keeps them"):  # nothing is scored
        begin(tmp_path, TaylorHeadScorer(select_at=1), model)


def test_scores_that_are_all_equal_are_told_once_and_recorded(tmp_path):
    """Nothing is learned: lora_B stays zero."""
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(select_at=3)], learning_rate=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)
        trainer.train()
    (warning,) = [str(each.message) for each in caught if "head" in str(each.message)]
    assert tiny.now("vit.layers.*.attention.q_proj, vit.layers.*.attention.v_proj, and head 0 will") in warning
    (entry,) = [entry for entry in trainer.state.log_history if "deactivated_heads" in entry]
    assert entry["degenerate"] is True
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert report["degenerate"] is True and off(trainer.model) == {(0,)}


# Which adapter


def two_adapters(active):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, modules_to_save=[]))
    model.add_adapter("second", HeadMaskedLoraConfig(ne=2, modules_to_save=[]))
    model.base_model.set_adapter(active)
    return model


@pytest.mark.parametrize(
    ("active", "name", "scored"),
    [
        (["second"], None, "second"),
        (["second"], "second", "second"),
        (["default", "second"], "second", "second"),
        (["default", "second"], None, "default"),
    ],
    ids=str,
)
def test_the_adapter_that_is_scored(tmp_path, active, name, scored):
    model = two_adapters(active)
    scorer = TaylorHeadScorer(select_at=2, adapter_name=name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*none has been selected")  # the other adapter
        make_trainer(tmp_path, [scorer], model=model, max_steps=4, save_strategy="steps", save_steps=2).train()
    (other,) = {"default", "second"} - {scored}
    assert off(model, other) == {()} and {len(heads) for heads in off(model, scored)} == {model.peft_config[scored].ne}
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert report["adapter"] == scored
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    saved = saved["stateful_callbacks"]["TaylorHeadScorer"]
    assert saved["args"]["adapter_name"] == name and saved["attributes"]["progress"]["adapter"] == scored
    assert TaylorHeadScorer.from_state(saved).adapter_name == name


def test_an_adapter_that_cannot_be_scored(tmp_path):
    model = two_adapters(["default"])
    with pytest.raises(ValueError, match="the model has no adapter 'third'; it has: default, second"):
        make_trainer(tmp_path, [TaylorHeadScorer(adapter_name="third")], model=model).train()
    with pytest.raises(ValueError, match=r"adapter 'second' is not active.*active: default.*set_adapter\('second'\)"):
        make_trainer(tmp_path, [TaylorHeadScorer(adapter_name="second")], model=model).train()
    with pytest.raises(ValueError, match="no head-masked adapter"):
        make_trainer(tmp_path, [TaylorHeadScorer(adapter_name="second")], model=tiny.make("vit")).train()
    model.set_requires_grad("default", False)
    with pytest.raises(ValueError, match="adapter 'default' cannot be scored: its parameters in .* are frozen"):
        make_trainer(tmp_path, [TaylorHeadScorer(adapter_name="default")], model=model).train()


def test_checkpoints_of_another_adapter_s_warm_up(tmp_path):
    """They lie in a folder of the adapter's name, are saved without a warning, and resume only this adapter."""
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1), adapter_name="foo")
    settings = {"save_strategy": "epoch", "num_train_epochs": 3}
    make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], model=model, **settings).train()
    resumed = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1), adapter_name="foo")
    trainer = make_trainer(tmp_path / "again", [TaylorHeadScorer(warmup_epochs=2)], model=resumed, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    weights = [trainable(each) for each in (model, resumed)]
    assert off(model, "foo") == off(resumed, "foo") != {()}
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    scorer = TaylorHeadScorer(warmup_epochs=2)
    trainer = make_trainer(tmp_path / "other", [scorer], **settings)  # of an adapter "default"
    with pytest.raises(ValueError, match="scored the heads of adapter 'foo', but this run scores 'default'"):
        scorer.on_train_begin(trainer.args, state, trainer.control, model=trainer.model,
                              train_dataloader=trainer.get_train_dataloader())  # fmt: skip


# transformers' own add_adapter


def with_own_adapter(name, **settings):
    """Make a model with an adapter by transformers' own add_adapter, without a PeftModel around it."""
    model = tiny.make("vit")
    try:
        model.add_adapter(HeadMaskedLoraConfig(ne=1, **settings), adapter_name=name)
    except (ValueError, ImportError) as error:
        if "peft" not in str(error).lower():
            raise
        pytest.skip(f"transformers {transformers.__version__} asks for a newer peft: {error}")
    return model


@pytest.mark.parametrize("asked", [None, "foo"])
def test_a_mixin_adapter(tmp_path, asked):
    model = with_own_adapter("foo")
    scorer = TaylorHeadScorer(select_at=2, adapter_name=asked)
    trainer = make_trainer(tmp_path, [scorer], model=model, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    assert {len(heads) for heads in off(model, "foo")} == {1}
    assert json.loads((tmp_path / "head_scores.json").read_text())["adapter"] == "foo"
    trainer.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "final")
    assert off(loaded) == off(model, "foo")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tiny.images()).logits, model.eval()(tiny.images()).logits)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_mixin_adapter_that_cannot_be_scored(tmp_path):
    model = with_own_adapter("foo", modules_to_save=[])
    model.add_adapter(HeadMaskedLoraConfig(ne=1, modules_to_save=[]), adapter_name="bar")  # active from now on
    with pytest.raises(ValueError, match="the model has no adapter 'third'; it has: foo, bar"):
        make_trainer(tmp_path, [TaylorHeadScorer(adapter_name="third")], model=model).train()
    with pytest.raises(ValueError, match="adapter 'foo' is not active.*active: bar"):
        make_trainer(tmp_path, [TaylorHeadScorer(adapter_name="foo")], model=model).train()
    best = {"eval_dataset": tiny.examples(8), "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="no PeftModel.*get_peft_model.*load_best_model_at_end=False"):
        make_trainer(tmp_path, [TaylorHeadScorer()], model=model, load_best_model_at_end=True, **best).train()


def test_an_injected_adapter(tmp_path):
    """Nothing around the model knows the adapter's name."""
    model = inject_adapter_in_model(HeadMaskedLoraConfig(ne=1), tiny.make("vit"), "foo")
    scorer = TaylorHeadScorer(select_at=2)
    begin(tmp_path, scorer, model)
    assert scorer.progress["adapter"] == "foo"


@pytest.mark.parametrize("arguments", [{}, {"warmup_epochs": 1}, {"warmup_epochs": 1, "window": "all"}], ids=str)
def test_unknown_epoch_length(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"length of an epoch, which is unknown.*select_at=500.*window='all' or"):
        make_trainer(tmp_path, [TaylorHeadScorer(**arguments)], train_dataset=Stream(), max_steps=6).train()


def test_stream_with_steps(tmp_path):
    trainer = make_trainer(
        tmp_path, [TaylorHeadScorer(select_at=3, window="all")], train_dataset=Stream(), max_steps=6
    )
    trainer.train()
    assert off(trainer.model) != {()}


class Stream(IterableDataset):
    def __iter__(self):
        yield from tiny.examples(64)


@pytest.mark.parametrize("model", ["stock", "plain"])
def test_model_without_head_masked_adapter(tmp_path, model):
    base = tiny.make("vit")
    if model == "stock":
        base = get_peft_model(base, LoraConfig(target_modules=tiny.now(["q_proj"])))
    with pytest.raises(ValueError, match="it has no head-masked adapter.*HeadMaskedLoraConfig"):
        make_trainer(tmp_path, [TaylorHeadScorer()], model=base).train()


def test_two_scorers(tmp_path):
    with pytest.raises(ValueError, match="another scorer is attached to adapter 'default'"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about two callbacks of a class as well
        make_trainer(tmp_path, [TaylorHeadScorer(), TaylorHeadScorer()]).train()


def test_a_plain_scorer_is_in_the_way(tmp_path):
    trainer = make_trainer(tmp_path, [TaylorHeadScorer()])
    scorer = HeadScorer(trainer.model)
    with pytest.raises(ValueError, match="another scorer is attached"):
        trainer.train()
    assert scorer.recording


def test_a_run_that_broke_off_is_not_in_the_way(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    broken = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2), Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    with pytest.warns(UserWarning, match="none has been selected"):  # nothing is pending any more
        broken.model.save_pretrained(tmp_path / "adapter")
    again = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], model=broken.model)
    again.train()
    assert off(again.model) != {()}


def test_a_run_that_broke_off_can_be_closed(tmp_path):
    trainer = make_trainer(tmp_path, [])
    scorer = TaylorHeadScorer().attach(trainer)
    scorer.on_train_begin(trainer.args, TrainerState(max_steps=16), trainer.control, model=trainer.model,
                          train_dataloader=trainer.get_train_dataloader())  # fmt: skip
    with pytest.raises(ValueError, match="or the TaylorHeadScorer of a run that broke off"):
        HeadScorer(trainer.model)
    scorer.close()
    HeadScorer(trainer.model)


def test_masked_adapter_keeps_its_masks_and_says_so(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    set_head_masks(model, tiny.masks_off(model, 4))
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], model=model)
    with pytest.warns(UserWarning, match="deactivated heads already and keeps them: head 4 of 6"):
        trainer.train()
    assert off(model) == {(4,)}
    assert not (tmp_path / "head_scores.json").exists()


class OutOfMemory(TrainerCallback):
    """A callback that raises CUDA's error, once, at the end of the given step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.slow
def test_auto_find_batch_size_starts_the_scoring_again(tmp_path, step):
    """The error comes before the window of steps 5 to 8, or in it; a smaller batch makes an epoch longer."""
    scorer = TaylorHeadScorer(warmup_epochs=2)
    watch = Watch(scorer)
    trainer = make_trainer(tmp_path, [scorer, watch, OutOfMemory(step)], auto_find_batch_size=True)
    trainer.train()
    steps = trainer.state.max_steps // 4  # of an epoch
    assert steps > STEPS_PER_EPOCH
    assert (scorer.progress["first_step"], scorer.progress["selected_at"]) == (steps + 1, 2 * steps)
    window = json.loads((tmp_path / "head_scores.json").read_text())["window"]
    assert window["steps_counted"] == steps  # none of the attempt that failed
    assert all(len(heads) == 1 for heads in off(trainer.model))


@pytest.mark.slow
def test_auto_find_batch_size_after_the_selection_keeps_the_heads(tmp_path, caplog):
    """Their rows are zero by then, so they could not be scored."""
    scorer = TaylorHeadScorer(warmup_epochs=2)
    watch = Watch(scorer)
    trainer = make_trainer(tmp_path, [scorer, watch, OutOfMemory(10)], auto_find_batch_size=True)
    with caplog.at_level(logging.INFO, logger="peft_heads"):
        trainer.train()
    assert watch.masked.count(False) == 7  # of the first attempt
    assert scorer.progress["selected_at"] == 0
    assert caplog.text.count("deactivated heads by absolute") == 1 and "begins again, with the heads" in caplog.text
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert {tuple(heads) for heads in report["deactivated_heads"].values()} == off(trainer.model)


class SkipNonFinite(torch.optim.SGD):
    """An optimizer that skips non-finite gradients, as a loss scaler does."""

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(torch.isfinite(grad).all() for grad in grads):
            super().step(closure)


def poisoned_trainer(tmp_path, *steps):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=4,
        max_grad_norm=0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
    )
    optimizer = SkipNonFinite([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scorer = TaylorHeadScorer(warmup_epochs=2)
    return Trainer(
        model,
        args,
        train_dataset=tiny.examples(),
        callbacks=[Poison(*steps), scorer],
        optimizers=(optimizer, None),
    )


class Poison(TrainerCallback):
    """A callback that makes the loss of the given steps, and so the gradients, not a number."""

    def __init__(self, *steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        forward = model.forward

        def poisoned(*inputs, **more):
            output = forward(*inputs, **more)
            if state.global_step + 1 in self.steps:
                output["loss"] = output["loss"] * float("nan")
            return output

        model.forward = poisoned


def test_non_finite_steps_are_skipped_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_heads"):
        poisoned_trainer(tmp_path, 6, 7).train()
    window = json.loads((tmp_path / "head_scores.json").read_text())["window"]
    assert (window["steps_counted"], window["steps_skipped"]) == (2, 2)
    assert "step 6: the gradients are not finite" in caplog.text


def test_nothing_but_non_finite_steps_is_an_error(tmp_path):
    trainer = poisoned_trainer(tmp_path, 5, 6, 7, 8)
    with pytest.raises(ValueError, match="the gradients of all 4 steps were not finite"):
        trainer.train()
    assert off(trainer.model) == {()}


def test_training_that_ends_before_the_selection(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2), Stop()])
    with pytest.warns(UserWarning, match="ended at step 5, before the selection at step 8: no head is deactivated"):
        trainer.train()


def train_with_best(tmp_path, *values):
    """Evaluate with the given scores and save after each of four epochs; heads are selected after the second."""
    trainer = make_trainer(
        tmp_path,
        [TaylorHeadScorer(warmup_epochs=2), EarlyStoppingCallback(5)],
        eval_dataset=tiny.examples(8),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    values = iter(values)
    trainer.compute_metrics = lambda prediction: {"score": next(values)}
    trainer.train()
    return trainer


def test_best_checkpoint_older_than_the_selection(tmp_path):
    with pytest.warns(UserWarning, match="checkpoint of step 4, which is older than the selection of heads at step 8"):
        trainer = train_with_best(tmp_path, 1.0, 0.5, 0.2, 0.1)
    assert off(trainer.model) == {()}


@pytest.mark.parametrize(("patience", "stops_at"), [(1, 12), (2, 16)])
def test_early_stopping_after_the_selection(tmp_path, patience, stops_at):
    """The best checkpoint is the first with masks; later training does not change them."""
    scorer = TaylorHeadScorer(warmup_epochs=2)
    trainer = make_trainer(
        tmp_path,
        [scorer, EarlyStoppingCallback(patience)],
        eval_dataset=tiny.examples(8),
        num_train_epochs=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    values = iter([0.1, 0.5, 0.4, 0.4])
    trainer.compute_metrics = lambda prediction: {"score": next(values)}
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (stops_at, 8)
    selected = {
        tuple(heads) for heads in json.loads((tmp_path / "head_scores.json").read_text())["deactivated_heads"].values()
    }
    assert off(trainer.model) == selected and () not in selected


def test_best_checkpoint_after_the_selection(tmp_path):
    trainer = train_with_best(tmp_path, 0.1, 0.2, 0.5, 0.4)
    assert trainer.state.best_global_step == 12
    assert off(trainer.model) != {()}
    saved = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "checkpoint-12")
    assert off(saved) == off(trainer.model)


# Gates


def run_by(criterion, folder, resume_from=None, **arguments):
    scorer = TaylorHeadScorer(warmup_epochs=2)
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=3, criterion=criterion))
    trainer = make_trainer(folder, [scorer], model=model, **arguments)
    trainer.train(resume_from_checkpoint=resume_from and str(folder / resume_from))
    return trainer, scorer


def test_heads_are_selected_by_gates(tmp_path):
    trainer, scorer = run_by("gate", tmp_path)
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert list(report["scores"]) == list(CRITERIA) and report["criterion"] == "gate"
    assert scorer._scorer.num_images == 32  # an epoch
    total = sum(torch.tensor(values) for values in report["scores"]["gate"].values())
    assert off(trainer.model) == {tuple(total.argsort()[:3].sort().values.tolist())}
    assert not any(len(m._forward_pre_hooks) for m in trainer.model.modules())  # outside the window nothing is left


@pytest.mark.slow
def test_resumed_gates_are_those_of_an_uninterrupted_run(tmp_path):
    """From the middle of the scoring window."""
    expected, _ = run_by("gate", tmp_path / "a")
    saving = {"save_strategy": "steps", "save_steps": 6}
    run_by("gate", tmp_path / "b", **saving)
    trainer, scorer = run_by("gate", tmp_path / "b", "checkpoint-6")
    assert scorer._scorer.num_images == 32
    scores = [json.loads((tmp_path / run / "head_scores.json").read_text())["scores"] for run in "ab"]
    assert scores[0] == scores[1]
    assert off(trainer.model) == off(expected.model)

    run_by("absolute", tmp_path / "c", **saving)
    with pytest.raises(ValueError, match="the 2 saved steps were scored without gates"):
        run_by("gate", tmp_path / "c", "checkpoint-6")


def test_clipping_and_accumulation_do_not_matter_for_gates(tmp_path):
    """Invariant 7 through Trainer, with a last step of fewer images as well. Nothing is learned."""
    scores = []
    settings = {"learning_rate": 0.0, "train_dataset": tiny.examples(29)}
    for name, arguments in (
        ("a", {"max_grad_norm": 0}),
        ("b", {"max_grad_norm": 1e-3}),
        ("c", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    ):
        run_by("gate", tmp_path / name, **settings, **arguments)
        scores.append(json.loads((tmp_path / name / "head_scores.json").read_text())["scores"])
    for criterion in ("gate", "gate_signed", "gate_squared"):
        assert scores[0][criterion] == scores[1][criterion]
        for projection, values in scores[0][criterion].items():
            torch.testing.assert_close(
                torch.tensor(scores[2][criterion][projection]), torch.tensor(values), rtol=1e-5, atol=1e-9
            )


def test_gates_of_a_compiled_model_are_refused(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, criterion="gate"))
    trainer = make_trainer(tmp_path, [TaylorHeadScorer()], model=model)
    trainer.args.torch_compile = True
    with pytest.raises(ValueError, match="torch_compile=True: .*train without torch_compile, or choose a criterion"):
        trainer.train()
