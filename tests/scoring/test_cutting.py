"""Several cuts, of heads and of neurons, through Trainer."""

import copy
import itertools
import json
import logging
import types

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from trainers import make_trainer
from transformers import TrainerCallback

from peft_heads import (
    HeadMaskedLoraConfig,
    HeadScorer,
    RLRRConfig,
    TaylorHeadScorer,
    get_head_masks,
    get_neuron_masks,
    set_head_masks,
)
from peft_heads.heads.neurons import neuron_layers
from peft_heads.heads.protocol import head_layers
from peft_heads.scoring.cuts import units_after


CUTS = {"select_at": 4, "cuts": 3, "last_cut": 10}  # after the steps 4, 7, 10 of 16


def number_off(masks):
    return {int((~mask).sum()) for mask in masks.values()}


class Watch(TrainerCallback):
    """Notes, after each step, the masks and how many steps have been scored."""

    def __init__(self, scorer):
        self.scorer, self.heads, self.neurons, self.counted = scorer, [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.heads.append(get_head_masks(kwargs["model"]))
        self.neurons.append(get_neuron_masks(kwargs["model"]))
        self.counted.append(self.scorer._scorer.num_steps)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run to a target speed in three cuts, with a teacher."""
    folder = tmp_path_factory.mktemp("run")
    scorer = TaylorHeadScorer(**CUTS, distill=0.5)
    watch = Watch(scorer)
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(target_speed=2.0, lora_dropout=0.1))
    trainer = make_trainer(folder, [scorer, watch], model=model, save_strategy="steps", save_steps=2)
    logger, records = logging.getLogger("peft_heads.scoring"), []
    handler = logging.Handler()
    handler.emit, level = records.append, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    trainer.train()
    logger.removeHandler(handler)
    logger.setLevel(level)
    messages = [record.getMessage() for record in records]
    return types.SimpleNamespace(
        folder=folder, scorer=scorer, watch=watch, model=model, trainer=trainer, messages=messages
    )


def test_units_go_by_the_schedule_and_stay_off(run):
    remain = run.scorer.progress["remain"]
    heads, neurons = 6 - remain["num_heads"], 32 - remain["num_neurons"]
    assert heads > 0 and neurons > 0 and remain["speed"] >= 2
    cuts = [sum(step >= cut for cut in (4, 7, 10)) for step in range(1, 17)]
    assert [number_off(masks) for masks in run.watch.heads] == [{units_after(heads, cut, 3)} for cut in cuts]
    assert [number_off(masks) for masks in run.watch.neurons] == [{units_after(neurons, cut, 3)} for cut in cuts]
    for history in (run.watch.heads, run.watch.neurons):
        for before, after in itertools.pairwise(history):
            assert not any((after[name] & ~mask).any() for name, mask in before.items())


def test_each_cut_is_decided_by_the_steps_since_the_one_before(run):
    """After a cut the statistics begin anew."""
    assert run.watch.counted == [1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0]
    window = json.loads((run.folder / "head_scores.json").read_text())["window"]
    assert window == {"first_step": 8, "last_step": 10, "steps_counted": 3, "steps_skipped": 0}


def test_the_numbers_are_chosen_once_and_said(run):
    remain = run.scorer.progress["remain"]
    chosen = (
        f"target_speed=2: the nearest reachable cut is {remain['speed']:.3g} x with heads={remain['num_heads']}, neu"
    )
    assert [chosen in message for message in run.messages].count(True) == 1
    report = json.loads((run.folder / "head_scores.json").read_text())
    assert (
        report["chosen"] == remain and report["speed"] == remain["speed"] and report["cut"] == {"number": 3, "of": 3}
    )
    assert set(report["neurons"]) == set(get_neuron_masks(run.model))
    assert all(n == {"deactivated": 32 - remain["num_neurons"], "of": 32} for n in report["neurons"].values())
    assert set(report["masks"]) == set(get_head_masks(run.model))


def test_every_cut_is_logged(run):
    entries = [entry for entry in run.trainer.state.log_history if "cut" in entry]
    assert [(entry["cut"], entry["step"]) for entry in entries] == [(1, 4), (2, 7), (3, 10)]
    for entry in entries:
        assert {entry["heads_off"]} == number_off(run.watch.heads[entry["step"] - 1])
        assert {entry["neurons_off"]} == number_off(run.watch.neurons[entry["step"] - 1])
    speeds = [entry["speed"] for entry in entries]
    assert 1 < speeds[0] < speeds[1] < speeds[2] and speeds[2] == pytest.approx(
        run.scorer.progress["remain"]["speed"], abs=1e-4
    )


def test_rows_and_moments_of_units_that_are_off_are_zero(run):
    """Six steps after the last cut."""
    optimizer, zeros = run.trainer.optimizer, 0
    for layers in (head_layers(run.model), neuron_layers(run.model)):
        for layer in layers.values():
            off = layer.deactivated_rows("default")
            for param in layer.head_parameters("default"):
                state = {key: x for key, x in optimizer.state[param].items() if x.shape == param.shape}
                assert len(state) == 2
                for tensor in (param, *state.values()):
                    assert not tensor[off].any() and tensor[~off].any()
                    zeros += 1
    assert zeros == 3 * 6


def test_the_forward_pass_is_that_of_a_model_without_the_units(run):
    merged = copy.deepcopy(run.model).merge_and_unload().eval()
    for name, mask in get_neuron_masks(run.model).items():
        layer = merged.get_submodule(name)
        assert not layer.weight[~mask].any() and not layer.bias[~mask].any() and layer.weight[mask].any()
        second = merged.get_submodule(name[: -len("fc1")] + "fc2" if not tiny.OLD_NAMES else second_layer(name))
        second.weight.data[:, ~mask] = 1e6  # whatever comes after nothing
    with torch.no_grad():
        expected = merged(pixel_values=tiny.images()).logits
        torch.testing.assert_close(run.model.eval()(pixel_values=tiny.images()).logits, expected, rtol=1e-5, atol=1e-5)


def second_layer(name):
    return name.replace("intermediate.dense", "output.dense")


def test_the_teacher_lies_in_the_checkpoints_from_the_first_cut_on(run):
    has = {int(p.name[11:]): (p / "teacher.safetensors").is_file() for p in run.folder.glob("checkpoint-*")}
    assert has == {step: step >= 4 for step in range(2, 17, 2)}
    teacher = load_file(run.folder / "checkpoint-16" / "teacher.safetensors")
    masks = [tensor for name, tensor in teacher.items() if name.endswith(".off")]
    assert len(masks) == 6 and not any(mask.any() for mask in masks)  # everything is on
    assert not any("base_layer" in name for name in teacher)


def test_nothing_of_the_teacher_stays_on_the_model(run):
    assert not run.model._forward_hooks and not run.model._forward_pre_hooks


# Heads alone


# By the reverse of "absolute" a head that is off has the highest score, zero; it stays off all the same.
@pytest.mark.parametrize("config", [HeadMaskedLoraConfig(ne=3, criterion="most_responsive"), RLRRConfig(ne=3)])
def test_heads_alone(tmp_path, config):
    scorer = TaylorHeadScorer(select_at=2, cuts=2, last_cut=0.25)  # step 4 of 16
    model = get_peft_model(tiny.make("vit"), config)
    trainer = make_trainer(tmp_path, [scorer], model=model, max_steps=5)
    with pytest.raises(ValueError, match="2 cuts from step 2 to step 2 are more than the 1 steps there; make fewer"):
        trainer.train()
    scorer.last_cut = 4
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "deactivated_heads" in entry]
    assert [(e["step"], e["heads_off"], e["neurons_off"]) for e in entries] == [(2, 2, 0), (4, 3, 0)]
    assert number_off(get_head_masks(model)) == {3} and scorer.neuron_masks == {}
    assert "speed" not in entries[0]  # an adapter's mask makes nothing faster


# At the beginning


def test_a_speed_that_cannot_be_reached(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(target_speed=6.0))
    steps = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    trainer = make_trainer(
        tmp_path, [TaylorHeadScorer(select_at=4, distill=1.0, teacher="start"), Steps()], model=model
    )
    with pytest.raises(ValueError, match=r"target_speed=6 cannot be reached, at most 4.68; choose") as error:
        trainer.train()
    assert len(str(error.value).splitlines()) == 9 and not steps
    assert not model._forward_hooks  # no teacher stays behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cuts": 0}, "cuts is the number of times that units are switched off, an integer of at least 1; got 0"),
        ({"cuts": 2.0}, "got 2.0"),
        ({"last_cut": 0.5}, "last_cut=0.5 needs several cuts"),
        ({"cuts": 2, "last_cut": 1.5}, "last_cut is a share of the steps"),
        ({"distill": -1.0}, "distill is the weight of the teacher's term in the loss, at least 0; got -1.0"),
        ({"distill": float("nan")}, "got nan"),
        ({"distill_temperature": 0.0}, "distill_temperature must be positive; got 0.0"),
        ({"teacher": "end"}, "teacher must be one of cut, start; got 'end'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaylorHeadScorer(**arguments)


def test_units_that_are_off_from_the_start_are_kept(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=2))
    set_head_masks(model, tiny.masks_off(model, 1))
    scorer = TaylorHeadScorer(select_at=2, cuts=2, last_cut=4)
    trainer = make_trainer(tmp_path, [scorer], model=model, max_steps=5)
    with pytest.warns(
        UserWarning, match="has deactivated heads already and keeps them: head 1 of 6.* Nothing is scored"
    ):
        trainer.train()
    assert number_off(get_head_masks(model)) == {1} and scorer.progress["selected_at"] is None


def test_training_that_ends_between_cuts(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=3))
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(select_at=2, cuts=2, last_cut=4), Stop()], model=model)
    with pytest.warns(
        UserWarning, match="ended at step 3, before the selection at step 4: fewer units are off than pl"
    ):
        trainer.train()
    HeadScorer(model).close()  # the adapter is free


# A plain loop


def test_a_plain_loop_prunes_neurons_as_well():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=2, neuron_ratio=0.25))
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    scores = scorer.neuron_scores()
    scorer.apply()
    assert number_off(get_head_masks(model)) == {2}
    for name, mask in get_neuron_masks(model).items():
        assert (~mask).nonzero().flatten().tolist() == sorted(scores[name].argsort(stable=True)[:8].tolist())


def test_a_plain_loop_to_a_target_speed():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(target_speed=2.0))
    scorer = HeadScorer(model)
    with pytest.raises(ValueError, match="no optimizer step with gates was counted"):
        scorer.apply()
    tiny.train(model, after_backward=scorer.update)
    scorer.apply()
    assert number_off(get_head_masks(model)) == {6 - scorer.cut.num_heads}
    assert number_off(get_neuron_masks(model)) == {32 - scorer.cut.num_neurons} and scorer.cut.speed >= 2


def test_a_plain_loop_in_several_cuts():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, mask_scope="head"))
    scorer = HeadScorer(model)
    optimizer = tiny.train(model, after_backward=scorer.update)
    first = scorer.apply(optimizer, scorer.select(ne=1), deepen=True)
    assert scorer.num_steps == 0 and not scorer.recording
    scorer.start()
    tiny.train(model, after_backward=scorer.update, optimizer=optimizer)
    other = {name: mask.roll(1) for name, mask in first.items()}
    with pytest.raises(
        ValueError, match=r"deepen=True leaves off what is off, .* would switch unit \d of .* on again"
    ):
        scorer.apply(optimizer, other, deepen=True)
    assert all(torch.equal(mask, first[name]) for name, mask in get_head_masks(model).items())
    second = scorer.apply(optimizer, {name: mask & mask.roll(1) for name, mask in first.items()}, deepen=True)
    assert number_off(second) == {2}


# Interrupted and resumed (invariant 6)


def trained(folder, resume=None, **arguments):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(target_speed=2.0, lora_dropout=0.1))
    scorer = TaylorHeadScorer(**CUTS, distill=0.5, **arguments)
    trainer = make_trainer(folder, [scorer], model=model, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=resume)
    return model, scorer


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["cut", "start"])
@pytest.mark.parametrize("step", [2, 4, 6, 9, 12])
def test_a_resumed_run_is_as_an_undisturbed_one(tmp_path, step, teacher):
    """From checkpoints before the first cut, just after it, between the cuts, and after the last one."""
    expected, _ = trained(tmp_path, teacher=teacher)
    resumed, scorer = trained(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), teacher=teacher)
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    assert scorer.progress["cuts_made"] == 3 and scorer.progress["selected_at"] == 4


@pytest.mark.slow
def test_what_a_resumed_run_must_not_change(tmp_path):
    trained(tmp_path)
    checkpoint = tmp_path / "checkpoint-6"
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(target_speed=2.0, lora_dropout=0.1))

    def resume(folder=tmp_path, **arguments):
        scorer = TaylorHeadScorer(**{**CUTS, "distill": 0.5, **arguments})
        make_trainer(folder, [scorer], model=model).train(resume_from_checkpoint=str(checkpoint))

    with pytest.raises(
        ValueError, match="made 1 of 3 cuts, planned after the steps 4, 7, 10, but this run plans 4, 8, 12"
    ):
        resume(last_cut=12)
    content = (checkpoint / "teacher.safetensors").read_bytes()
    (checkpoint / "teacher.safetensors").write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=r"checkpoint-6/teacher.safetensors is not the teacher of the checkpoint"):
        resume()
    (checkpoint / "teacher.safetensors").unlink()
    with pytest.raises(
        ValueError, match="teacher.safetensors is missing, by which the checkpoint of step 6 was distil"
    ):
        resume()
    resume(distill=0.0, folder=tmp_path / "other")
    assert number_off(get_head_masks(model)) != {0}
