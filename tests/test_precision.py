"""Invariant 7 in half precision: autocast, loss scaling and its overflows, in a plain loop and through Trainer."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, HeadScorer, TaylorHeadScorer
from peft_heads.scoring import checks


GRADIENT_CRITERIA = ("absolute", "positive", "grad_norm")
OVERFLOWS = 2.0**22  # too much for these gradients in float16 (the largest number is 65504), for some steps


def make():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    tiny.randomize_lora(model)
    return model.train()


def scores_of(dtype=None, scale=None, clip=None, micro_batches=1, steps=3):
    """Run the plain loop of PyTorch's documentation, without learning, so that only the gradients differ."""
    model = make()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    scorer = HeadScorer(model)
    counted = []
    for step in range(steps):
        batch = tiny.batch(8, seed=step)
        for part in torch.arange(8).chunk(micro_batches):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = model(**{key: value[part] for key, value in batch.items()}).loss / micro_batches
            scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, clip)
        counted.append(scorer.update(loss_scale=scaler.get_scale()))
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert counted[-1] is (scaler.get_scale() == before)  # it halves its scale when it skips a step
        optimizer.zero_grad()
    return {criterion: scorer.scores(criterion) for criterion in GRADIENT_CRITERIA}, counted


def largest_difference(one, other):
    """Return the largest difference, relative to the largest score of the projection."""
    return max(
        float((one[c][name] - other[c][name]).abs().max() / one[c][name].abs().max()) for c in one for name in one[c]
    )


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_loss_scale_and_clipping_do_not_matter(clip):
    plain, _ = scores_of()
    scaled, counted = scores_of(scale=2.0**16, clip=clip)
    assert counted == [True] * 3
    assert largest_difference(plain, scaled) == 0  # a power of two


def test_fp16_with_a_loss_scaler():
    low, _ = scores_of(torch.float16, scale=2.0**8)
    high, _ = scores_of(torch.float16, scale=2.0**12, clip=1e-3)
    assert largest_difference(low, high) < 1e-4  # the lower scale loses precision at the lower end
    exact, _ = scores_of()
    assert 0 < largest_difference(exact, high) < 0.01  # float16 has three digits


def test_overflowing_steps_do_not_count():
    scores, counted = scores_of(torch.float16, scale=OVERFLOWS, steps=24)
    assert counted[0] is False and counted[-1] is True
    model = make()
    scorer = HeadScorer(model)
    for step in range(24):
        if not counted[step]:
            continue
        scale = OVERFLOWS / 2 ** counted[:step].count(False)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**tiny.batch(8, seed=step)).loss
        (loss * scale).backward()
        scorer.update(loss_scale=scale)
    for criterion in GRADIENT_CRITERIA:
        for name, expected in scorer.scores(criterion).items():
            assert torch.equal(scores[criterion][name], expected)


def test_bf16_autocast():
    exact, _ = scores_of()
    rounded, counted = scores_of(torch.bfloat16)
    assert counted == [True] * 3
    assert 0 < largest_difference(exact, rounded) < 0.05  # bfloat16 has two digits
    split, _ = scores_of(torch.bfloat16, micro_batches=8)
    assert largest_difference(rounded, split) < 0.05
    clipped, _ = scores_of(torch.bfloat16, clip=1e-3)
    assert largest_difference(rounded, clipped) == 0


def train(folder, scale=None, loss_factor=None, **arguments):
    """Train through Trainer. Its loss scaler needs a GPU, so its accelerator gets one that works on a CPU."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=arguments.pop("per_device_train_batch_size", 8),
        num_train_epochs=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        learning_rate=0.0,
        **arguments,
    )
    trainer = Trainer(
        make(),
        args,
        train_dataset=tiny.examples(),
        callbacks=[TaylorHeadScorer(warmup_epochs=2, window="all")],
    )
    if loss_factor is not None:
        trainer.compute_loss_func = lambda outputs, labels, **_: cross_entropy(outputs.logits, labels) * loss_factor
    if scale is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.train()
    report = json.loads((folder / "head_scores.json").read_text())
    scores = {c: {n: torch.tensor(s) for n, s in report["scores"][c].items()} for c in GRADIENT_CRITERIA}
    return scores, report["window"]


def test_trainer_with_a_loss_scaler(tmp_path):
    plain, _ = train(tmp_path / "plain")
    scaled, window = train(tmp_path / "scaled", scale=2.0**16, max_grad_norm=1e-3)
    assert window["steps_counted"] == 8
    assert largest_difference(plain, scaled) == 0


def test_trainer_skips_overflowing_steps(tmp_path):
    _, window = train(tmp_path / "scaled", scale=2.0**111, loss_factor=2.0**20)
    assert window["steps_skipped"] >= 2 and window["steps_counted"] + window["steps_skipped"] == 8


def test_trainer_in_bf16(tmp_path):
    exact, _ = train(tmp_path / "exact")
    rounded, window = train(tmp_path / "rounded", bf16=True)
    split, _ = train(tmp_path / "split", bf16=True, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert window["steps_counted"] == 8
    assert 0 < largest_difference(exact, rounded) < 0.05
    assert largest_difference(rounded, split) < 0.05


def test_fp16_with_deepspeed_is_refused(monkeypatch):
    plugin = SimpleNamespace(zero_stage=3)
    for fp16, precision in ((True, "no"), (False, "fp16")):  # by TrainingArguments, by Accelerate's launcher
        state = SimpleNamespace(
            distributed_type=DistributedType.DEEPSPEED, mixed_precision=precision, deepspeed_plugin=plugin
        )
        monkeypatch.setattr(checks, "AcceleratorState", lambda state=state: state)
        with pytest.raises(ValueError, match="fp16=True with DeepSpeed.*bf16=True"):
            checks.check_deepspeed(SimpleNamespace(fp16=fp16), HeadMaskedLoraConfig())
        with pytest.raises(ValueError, match="DoRA with ZeRO 3"):
            checks.check_deepspeed(SimpleNamespace(fp16=False), HeadMaskedLoraConfig(use_dora=True))


def test_a_step_counts_only_if_everything_is_finite():
    """The loss scaler also skips a step in which something other than the heads has overflowed."""
    model = make()
    scorer = HeadScorer(model)
    model(**tiny.batch()).loss.backward()
    next(p for n, p in model.named_parameters() if "classifier" in n and p.grad is not None).grad[0] = float("inf")
    assert scorer.update() is False and (scorer.num_steps, scorer.num_skipped) == (0, 1)
