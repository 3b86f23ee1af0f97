"""A registered criterion can do everything that ours can."""

import json

import pytest
import tiny
import torch
from peft import get_peft_model
from trainers import make_trainer, off

from peft_heads import HeadMaskedLoraConfig, HeadScorer, RLRRConfig, TaylorHeadScorer, register_criterion
from peft_heads.heads import CRITERIA
from peft_heads.scoring.search import head_model_init


@pytest.fixture(autouse=True)
def criterion(forget_criteria):
    """Register a score: the change of the loss on removal (-signed), relative to the size of the weights."""
    register_criterion("per_weight", lambda heads: heads.signed.abs() / (heads.weight_norm + 1e-6))


def make(**config):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(criterion="per_weight", **config))
    tiny.randomize_lora(model, std=0.1)
    return model


def test_the_heads_are_those_of_the_plain_definition():
    model = make(ne=2, granularity="layer", joint=False)
    scorer, gradients, rows = HeadScorer(model), {}, {}

    def record():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                gradients.setdefault(name, []).append(param.grad.double().reshape(6, -1))
                rows.setdefault(name, []).append(param.detach().double().reshape(6, -1))
        scorer.update()

    tiny.train(model, steps=3, after_backward=record)
    now = {name: param.detach().double().reshape(6, -1) for name, param in model.named_parameters() if name in rows}
    masks = scorer.select()
    assert len(masks) == len(rows) == 4
    for name, mask in masks.items():
        (key,) = [key for key in rows if f"{name}.lora_B" in key]
        signed = sum((p * g).sum(1) for p, g in zip(rows[key], gradients[key], strict=True)) / 3
        scores = signed.abs() / (now[key].norm(dim=1) + 1e-6)
        torch.testing.assert_close(scorer.scores()[name], scores, rtol=1e-5, atol=1e-12)
        assert (~mask).nonzero().flatten().tolist() == sorted(scores.argsort()[:2].tolist())
    assert str(scorer.select(criterion="absolute")) != str(masks)


def test_training_reports_it(tmp_path):
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], model=make(ne=2))
    trainer.train()
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert report["criterion"] == "per_weight" and list(report["scores"]) == [
        name for name in CRITERIA if not CRITERIA[name].needs_gates
    ]
    total = sum(torch.tensor(scores, dtype=torch.float64) for scores in report["scores"]["per_weight"].values())
    assert off(trainer.model) == {tuple(sorted(total.argsort()[:2].tolist()))}
    trainer.save_model()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["criterion"] == "per_weight"


def test_search_and_rlrr():
    config = RLRRConfig(ne=1, criterion="per_weight")
    model = head_model_init(lambda: tiny.make("vit"), config)({"ne": 2})
    assert model.peft_config["default"].criterion == "per_weight"
    scorer = HeadScorer(model)
    tiny.train(model, steps=1, after_backward=scorer.update)
    masks = scorer.select()
    total = sum(scorer.scores().values())
    assert {tuple((~mask).nonzero().flatten().tolist()) for mask in masks.values()} == {
        tuple(sorted(total.argsort()[:2].tolist()))
    }
    model = head_model_init(lambda: tiny.make("vit"))({"criterion": "per_weight"})
    assert model.peft_config["default"].criterion == "per_weight"


def test_one_that_fails_harms_its_own_users_alone(tmp_path):
    register_criterion("broken", lambda heads: heads.signed / 0)
    trainer = make_trainer(tmp_path, [TaylorHeadScorer(warmup_epochs=2)], model=make(ne=2))
    with pytest.warns(UserWarning, match="scores by 'broken' are left out of the report: ValueError.*not finite"):
        trainer.train()
    report = json.loads((tmp_path / "head_scores.json").read_text())
    assert list(report["scores"]) == [n for n in CRITERIA if n != "broken" and not CRITERIA[n].needs_gates]

    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, criterion="broken"))
    scorer = HeadScorer(model)
    tiny.train(model, steps=1, after_backward=scorer.update)
    for call in (scorer.scores, scorer.select, scorer.all_scores):
        with pytest.raises(ValueError, match="the broken scores of .* are not finite"):
            call()


def test_one_that_is_a_product_with_the_parameters_is_refused_at_step_1(tmp_path):
    register_criterion("product", lambda heads: heads.signed.abs(), is_taylor=True)
    for criterion, message in (("product", "the 'product' scores of step 1 alone"), ("per_weight", None)):
        model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, criterion=criterion))
        trainer = make_trainer(tmp_path, [TaylorHeadScorer(select_at=1)], model=model)
        if message:
            with pytest.raises(ValueError, match=message):
                trainer.train()
        else:
            with pytest.warns(UserWarning, match="the scores by 'per_weight' do not tell heads apart"):
                trainer.train()


def test_one_that_needs_no_gradients_selects_before_the_first_step():
    register_criterion("last", lambda heads: -torch.arange(heads.num_heads), needs_gradients=False)
    scorer = HeadScorer(make(ne=1))
    with pytest.raises(ValueError, match="no head can be scored by 'per_weight': no optimizer step was counted"):
        scorer.select()
    assert set(scorer.all_scores()) == {"weight_norm", "random", "front", "last"}
    assert all(mask.tolist() == [True] * 5 + [False] for mask in scorer.select(criterion="last").values())
