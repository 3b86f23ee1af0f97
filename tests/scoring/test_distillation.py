from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.nn.functional import softmax
from transformers import TrainingArguments

from peft_heads import HeadMaskedLoraConfig, HeadScorer, set_head_masks
from peft_heads.scoring.distillation import Distillation, Teacher, check_distillation, distillation_loss


@pytest.fixture
def model():
    return make(dropout=0.1)


def make(dropout):
    config = HeadMaskedLoraConfig(ne=1, lora_dropout=dropout, mask_scope="head")
    model = get_peft_model(tiny.make("vit"), config)
    tiny.randomize_lora(model)
    return model


def predict(model):
    with torch.no_grad():
        return model.eval()(pixel_values=tiny.images()).logits


def change(model):
    """Switch heads off, and train on: adapter and classifier change."""
    set_head_masks(model, tiny.masks_off(model, 1, 2))
    tiny.train(model, steps=2)


# The teacher


def test_the_teacher_predicts_as_the_model_did_bit_for_bit(model):
    before = predict(model)
    teacher = Teacher.of(model, "default")
    assert torch.equal(teacher.logits(model.train(), pixel_values=tiny.images()), before)
    change(model)
    assert not torch.equal(predict(model), before)
    model.train()
    assert torch.equal(teacher.logits(model, pixel_values=tiny.images()), before)
    assert teacher.logits(model, tiny.images()).grad_fn is None
    with model.disable_adapter():  # whose classifier is not trained
        assert not torch.equal(predict(model), before)


def test_the_students_mode_and_random_numbers_stay(model):
    model.train()
    model.base_model.model.vit.embeddings.eval()  # someone keeps a part of it in evaluation mode
    modes = [module.training for module in model.modules()]
    teacher = Teacher.of(model, "default")
    state = torch.get_rng_state()
    teacher.logits(model, pixel_values=tiny.images())
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="not enough values"):
        teacher.logits(model, pixel_values=torch.zeros(1, 3, 5))
    assert [module.training for module in model.modules()] == modes


def test_a_saved_teacher_is_the_same(model):
    before = predict(model)
    saved = {name: tensor.clone() for name, tensor in Teacher.of(model, "default").tensors.items()}
    change(model)
    teacher = Teacher.of(model, "default")
    teacher.load(saved)
    assert torch.equal(teacher.logits(model, pixel_values=tiny.images()), before)
    first, *others = saved
    for wrong, message in (
        ({name: saved[name] for name in others}, f"for {first} it has none, not "),
        (saved | {first: torch.zeros(2, 2)}, rf"for {first} it has \(2, 2\), not "),
        (saved | {"more": torch.zeros(2)}, "this one does not train more"),
    ):
        with pytest.raises(ValueError, match="the saved teacher is that of another model: " + message):
            teacher.load(wrong)


# The loss


def test_the_loss_is_the_divergence_of_softened_predictions():
    logits, wanted = torch.randn(5, 3), torch.randn(5, 3)
    p, q = softmax(wanted / 4.0, dim=1), softmax(logits / 4.0, dim=1)
    expected = 16 * (p * (p / q).log()).sum(dim=1)
    torch.testing.assert_close(distillation_loss(logits, wanted, 4.0), expected.mean())
    torch.testing.assert_close(distillation_loss(logits, wanted, 4.0, num_items=20), expected.sum() / 20)


def losses(model, **inputs):
    """The loss of a pass, and those of its parts in the same dropout."""
    torch.manual_seed(0)
    return model(**tiny.batch(), **inputs).loss


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": torch.tensor(16)}])
def test_the_term_is_added_to_the_models_loss(model, items):
    before = predict(model)
    teacher = Teacher.of(model, "default")
    change(model)
    model.train()
    alone = losses(model, **items)
    torch.manual_seed(0)
    logits = model(**tiny.batch()).logits
    distillation = Distillation(model, teacher, weight=0.7, temperature=2.0)
    together = losses(model, **items)
    expected = 0.7 * distillation_loss(logits, before, 2.0, items.get("num_items_in_batch"))
    torch.testing.assert_close(together - alone, expected)
    assert expected > 1e-4
    distillation.close()
    assert torch.equal(losses(model, **items), alone)


def test_it_adds_nothing_in_evaluation_or_without_gradients(model):
    teacher = Teacher.of(model, "default")
    change(model)
    expected = model.eval()(**tiny.batch()).loss
    with torch.no_grad():
        model.train()
        in_training = losses(model)
    distillation = Distillation(model, teacher, weight=1.0, temperature=2.0)
    assert torch.equal(model.eval()(**tiny.batch()).loss, expected)
    with torch.no_grad():
        model.train()
        assert torch.equal(losses(model), in_training)
    distillation.close()


def test_gradients_reach_the_student_alone(model):
    teacher = Teacher.of(model, "default")
    change(model)
    model.train().zero_grad()
    distillation = Distillation(model, teacher, weight=1.0, temperature=2.0)
    with pytest.raises(ValueError, match="distillation has no effect: no gradient has reached the term"):
        distillation.check_step()
    model(**tiny.batch()).loss.backward()
    distillation.check_step()
    assert all(grad.isfinite().all() for grad in tiny.gradients(model).values())
    assert not any(tensor.requires_grad for tensor in teacher.tensors.values())
    distillation.close()


def test_a_loss_of_ones_own_is_noticed(model):
    distillation = Distillation(model, Teacher.of(model, "default"), weight=1.0, temperature=2.0)
    model.train()(**tiny.batch()).logits.sum().backward()
    with pytest.raises(ValueError, match="distillation has no effect"):
        distillation.check_step()
    with pytest.raises(ValueError, match="needs a model that returns loss and logits by name.*; got logits"):
        model(pixel_values=tiny.images())
    with pytest.raises(ValueError, match="; got tuple"):
        model(**tiny.batch(), return_dict=False)
    distillation.close()


def test_accumulation_does_not_matter():
    """The gradient of a batch of 4 images, split into 3 and 1 as Trainer splits it."""
    model = make(dropout=0.0)
    teacher = Teacher.of(model, "default")
    change(model)
    distillation = Distillation(model.train(), teacher, weight=1.0, temperature=2.0)
    whole = tiny.batch()
    model.zero_grad()
    model(**whole).loss.backward()
    expected = {name: grad.clone() for name, grad in tiny.gradients(model).items()}
    model.zero_grad()
    for part in (slice(0, 3), slice(3, 4)):
        images = {name: value[part] for name, value in whole.items()}
        model(**images, num_items_in_batch=torch.tensor(4)).loss.backward()
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    distillation.close()


def test_gates_do_not_hear_the_teacher():
    """It is asked within the student's pass, by hooks that came before those of the gates."""
    model = make(dropout=0.0)
    teacher = Teacher.of(model, "default")
    change(model)
    distillation = Distillation(model.train(), teacher, weight=1.0, temperature=2.0)
    whole, found = tiny.batch(), []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        scorer = HeadScorer(model, gates=True)
        for part in parts:
            (model(**{name: value[part] for name, value in whole.items()}).loss / len(parts)).backward()
        scorer.update()
        model.zero_grad()
        assert scorer.num_images == 4
        found.append(scorer.gates("neuron"))
        scorer.close()
    for name, sums in found[0].items():
        assert sums.any()
        torch.testing.assert_close(found[1][name], sums, rtol=1e-3, atol=1e-6)
    distillation.close()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1: Trainer then computes a loss of its own"),
        ({"torch_compile": True}, {}, "torch_compile=True"),
        ({}, {"adapter_bits": 4}, "adapter_bits or classifier_bits below 32"),
        ({}, {"classifier_bits": 8}, "adapter_bits or classifier_bits below 32"),
    ],
)
def test_refusals(tmp_path, arguments, config, message):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **arguments)
    with pytest.raises(ValueError, match=message):
        check_distillation(args, HeadMaskedLoraConfig(**config))


def test_data_parallel_is_refused():
    args = SimpleNamespace(label_smoothing_factor=0.0, torch_compile=False, n_gpu=2)
    with pytest.raises(ValueError, match="nn.DataParallel, which Trainer uses on 2 GPUs"):
        check_distillation(args, HeadMaskedLoraConfig())
