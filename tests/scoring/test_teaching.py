"""Distillation through Trainer."""

import gc

import pytest
import tiny
import torch
from peft import get_peft_model
from trainers import make_trainer
from transformers import Trainer, TrainerCallback

from peft_heads import HeadMaskedLoraConfig, TaylorHeadScorer
from peft_heads.scoring.distillation import distillation_loss


def make_model(**settings):
    torch.manual_seed(0)
    settings = {"ne": 2, "mask_scope": "head", "lora_dropout": 0.1, **settings}
    return get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(**settings))


class Losses(TrainerCallback):
    """Notes the loss that the model returns for fixed images, after each step, in training and in evaluation."""

    def __init__(self):
        self.training, self.evaluation, self.logits = [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        model, random = kwargs["model"], torch.get_rng_state()
        for mode, losses in ((True, self.training), (False, self.evaluation)):
            torch.manual_seed(0)
            output = model.train(mode)(**tiny.batch())
            losses.append(output.loss.item())
        self.logits.append(output.logits.detach())
        torch.set_rng_state(random)
        model.train()


def run(folder, model=None, **arguments):
    losses = Losses()
    scorer = TaylorHeadScorer(select_at=2, window="all", **arguments)
    trainer = make_trainer(folder, [scorer, losses], model=model or make_model(lora_dropout=0.0), max_steps=4)
    trainer.train()
    return losses, trainer


def test_the_term_comes_with_the_first_cut(tmp_path):
    """Before it both runs are the same, bit for bit; after it the loss is farther by the distance from the teacher."""
    without, _ = run(tmp_path / "a")
    losses, trainer = run(tmp_path / "b", distill=0.5, distill_temperature=3.0)
    assert losses.training[0] == without.training[0] == losses.evaluation[0]
    (scorer,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, TaylorHeadScorer))
    teacher = scorer._teaching._teacher
    wanted = teacher.logits(trainer.model, pixel_values=tiny.images())
    for step in (1, 2, 3):
        distance = 0.5 * distillation_loss(losses.logits[step], wanted, 3.0).item()
        assert losses.training[step] - losses.evaluation[step] == pytest.approx(distance, abs=1e-6) and distance > 1e-7
    assert losses.evaluation[1] == without.evaluation[1]  # the cut itself
    assert losses.evaluation[2:] != without.evaluation[2:]


def test_a_teacher_from_the_start(tmp_path):
    without, _ = run(tmp_path / "a")
    losses, _ = run(tmp_path / "b", distill=0.5, teacher="start")
    # of the first step the gradient is zero: the model is its own teacher
    assert losses.training[0] > losses.evaluation[0] and losses.evaluation[0] == pytest.approx(
        without.evaluation[0], abs=1e-6
    )
    assert losses.evaluation[1] != without.evaluation[1]


def test_label_smoothing_is_refused_before_any_step(tmp_path):
    losses = Losses()
    scorer = TaylorHeadScorer(select_at=2, distill=1.0)
    trainer = make_trainer(tmp_path, [scorer, losses], model=make_model(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1: Trainer then computes a loss of its own"):
        trainer.train()
    assert not losses.training


def test_a_loss_of_ones_own_is_noticed_after_the_first_distilled_step(tmp_path):
    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(**inputs).logits.square().mean()

    losses = Losses()
    scorer = TaylorHeadScorer(select_at=2, window="all", distill=1.0)
    plain = make_trainer(tmp_path, [], model=make_model())
    trainer = OwnLoss(plain.model, plain.args, train_dataset=plain.train_dataset, callbacks=[scorer, losses])
    with pytest.raises(ValueError, match="distillation has no effect: no gradient has reached the term"):
        trainer.train()
    assert len(losses.training) == 2  # the cut, and not one step after it


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_later_run_does_not_meet_the_teacher_of_one_that_broke_off(tmp_path):
    model = make_model()
    broken = TaylorHeadScorer(select_at=2, window="all", distill=1.0)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "a", [broken, Break()], model=model).train()
    assert len(model._forward_hooks) == 1
    with pytest.warns(UserWarning, match="has deactivated heads already"):
        make_trainer(tmp_path / "b", [TaylorHeadScorer(select_at=2)], model=model, max_steps=3).train()
    assert not model._forward_hooks


@pytest.mark.slow
def test_a_run_that_broke_off_can_be_closed_or_forgotten(tmp_path):
    for way in ("closed", "forgotten"):
        model = make_model()
        scorer = TaylorHeadScorer(select_at=2, window="all", distill=1.0)
        trainer = make_trainer(tmp_path, [scorer, Break()], model=model)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        torch.manual_seed(0)
        before = model.train()(**tiny.batch()).loss.item()
        if way == "closed":
            scorer.close()
        del scorer, trainer
        gc.collect()
        torch.manual_seed(0)
        assert model(**tiny.batch()).loss.item() < before


@pytest.mark.slow
def test_resuming_past_the_copy_without_a_teacher(tmp_path):
    trainer = make_trainer(
        tmp_path,
        [TaylorHeadScorer(select_at=2, window="all")],
        model=make_model(),
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    for step, arguments in ((3, {}), (1, {"teacher": "start"})):
        scorer = TaylorHeadScorer(select_at=2, window="all", distill=1.0, **arguments)
        later = make_trainer(tmp_path, [scorer], model=make_model(), max_steps=4)
        with pytest.raises(
            ValueError, match=f"resumes at step {step}, past the moment at which the teacher is copied"
        ):
            later.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    scorer = TaylorHeadScorer(select_at=2, window="all", distill=1.0)
    later = make_trainer(tmp_path, [scorer], model=make_model(), max_steps=4)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
def test_auto_find_batch_size_keeps_the_teacher(tmp_path):
    class OutOfMemory(TrainerCallback):
        def __init__(self):
            self.raised = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6 and not self.raised:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    scorer = TaylorHeadScorer(select_at=4, distill=1.0, cuts=2, last_cut=0.5)
    trainer = make_trainer(tmp_path, [scorer, OutOfMemory()], model=make_model(), auto_find_batch_size=True)
    model = trainer.model
    trainer.train()
    assert scorer.progress["selected_at"] == 0 and scorer.progress["cuts_made"] == 2
    assert scorer.masks and all(int((~mask).sum()) == 2 for mask in scorer.masks.values())
    assert not any(tensor.any() for name, tensor in scorer._teaching._teacher.tensors.items() if name.endswith(".off"))
    assert not model._forward_hooks
