"""Gates on heads and neurons: against finite differences, and alike however a batch is split and a model is run."""

import gc
import json
import weakref

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from peft_heads import HeadMaskedLoraConfig, HeadScorer
from peft_heads.backbones.structure import find_backbone
from peft_heads.heads import CRITERIA
from peft_heads.heads.neuron_scores import NEURON_CRITERIA


KINDS = ("head", "neuron")


def make(backbone="vit", **config):
    model = get_peft_model(tiny.make(backbone), HeadMaskedLoraConfig(**{"ne": 1, **config}))
    tiny.randomize_lora(model, std=0.1)
    return model.eval()  # without dropout and drop paths; gates do not ask for the mode


def double(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def halves(batch, parts):
    size = len(batch["labels"]) // parts
    return [{key: value[i * size : (i + 1) * size] for key, value in batch.items()} for i in range(parts)]


def sums(scorer):
    return {(kind, name): values for kind in KINDS for name, values in scorer.gates(kind).items()}


def gathered(model, micro_batches=None, batch=None, loss_scale=1.0, **options):
    """The sums after one step, whose loss is the mean over the micro-batches."""
    scorer = HeadScorer(model, gates=True, **options)
    micro_batches = micro_batches or [tiny.batch(8) if batch is None else batch]
    for micro_batch in micro_batches:
        (model(**micro_batch).loss * loss_scale / len(micro_batches)).backward()
    assert scorer.update(loss_scale)
    assert scorer.num_images == sum(len(each["labels"]) for each in micro_batches)
    scorer.close()
    model.zero_grad()
    return sums(scorer)


def assert_same(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys() and expected
    for name, values in expected.items():
        scale = values.abs().amax(dim=1, keepdim=True)
        assert (scale > 0).all()
        assert ((actual[name] - values).abs() <= rtol * scale).all(), name


def loss_with_scaled_unit(model, module, units, unit, factor, image):
    """The loss of one image when the output of one unit is multiplied by a factor."""
    scale = torch.ones(units, dtype=torch.float64)
    scale[unit] = factor

    def multiply(module, args):
        return (args[0] * scale.repeat_interleave(args[0].shape[-1] // units), *args[1:])

    handle = module.register_forward_pre_hook(multiply)
    with torch.no_grad():
        loss = model(**image).loss.item()
    handle.remove()
    return loss


def test_against_finite_differences(backbone):
    """Each image's derivative by a factor on a head's or a neuron's output, in a model in float64."""
    model = make(backbone).double()
    batch = double(tiny.batch(3))
    scorer = HeadScorer(model, gates=True)
    model(**batch).loss.backward()
    scorer.update()
    heads, neurons = scorer.attention_gates(), scorer.gates("neuron")
    blocks = find_backbone(model).blocks
    assert len(heads) == len(neurons) == len(blocks)
    eps = 1e-4
    for block, of_heads, of_neurons in zip(blocks, heads.values(), neurons.values(), strict=True):
        for name, found in ((block.out, of_heads), (block.mlp_layers[1], of_neurons)):
            module, units = model.get_submodule(name), found.shape[1]
            for unit in range(0, units, 1 if units < 10 else 11):
                slopes = []
                for image in halves(batch, 3):
                    up, down = (loss_with_scaled_unit(model, module, units, unit, 1 + e, image) for e in (eps, -eps))
                    slopes.append((up - down) / (2 * eps))
                expected = [sum(map(abs, slopes)), sum(slopes), sum(g * g for g in slopes)]
                torch.testing.assert_close(
                    found[:, unit], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9
                )


def test_the_forward_pass_stays_the_same_to_the_bit(backbone):
    model, batch = make(backbone), tiny.batch()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                expected = model(**batch)
            scorer = HeadScorer(model, gates=True)
            result = model(**batch)
            scorer.close()
        assert torch.equal(result.logits, expected.logits) and torch.equal(result.loss, expected.loss)
    grads = []
    for gates in (False, True):
        scorer = HeadScorer(model, gates=gates)
        model(**batch).loss.backward()
        scorer.close()
        grads.append({name: grad.clone() for name, grad in tiny.gradients(model).items()})
        model.zero_grad()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_do_not_matter(backbone, parts):
    """Invariant 7; a Swin's windows lie side by side in its attention layers."""
    model = make(backbone)
    assert_same(gathered(model, halves(tiny.batch(8), parts)), gathered(model))


def test_micro_batches_of_different_sizes():
    """A step's loss is the mean over them; or, where Trainer counts the items of the step, over all images."""
    model, batch = make(), tiny.batch(8)
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(6), slice(6, 8))]
    expected = gathered(model)
    assert_same(gathered(model, parts), expected)
    scorer = HeadScorer(model, gates=True)
    for part in parts:
        items = {} if tiny.OLD_NAMES else {"num_items_in_batch": torch.tensor(8)}
        loss = model(**part, **items).loss
        (loss * len(part["labels"]) / 8 if tiny.OLD_NAMES else loss).backward()
    scorer.update()
    if not tiny.OLD_NAMES:
        assert_same(sums(scorer), expected)


@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
def test_clipping_and_loss_scale_do_not_matter(scale):
    model = make()
    expected = gathered(model)
    scorer = HeadScorer(model, gates=True)
    (model(**tiny.batch(8)).loss * scale).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e-3)
    scorer.update(loss_scale=scale)
    assert_same(sums(scorer), expected, rtol=0 if scale == 2.0**16 else 1e-5)


def checkpointed(backbone, reentrant):
    model = make(backbone)
    base = model.get_base_model()
    newer = hasattr(base, "activation_checkpointing_enable")
    enable = base.activation_checkpointing_enable if newer else base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.train()  # checkpoints are for training, but these numbers shall not be random
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or "DropPath" in type(module).__name__:
            module.eval()
    return model


def with_gradients(batch):
    """Reentrant checkpoints want inputs that require gradients."""
    return {**batch, "pixel_values": batch["pixel_values"].requires_grad_()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_does_not_matter(backbone, reentrant):
    expected = gathered(make(backbone), halves(tiny.batch(8), 2))
    model = checkpointed(backbone, reentrant)
    assert_same(gathered(model, halves(with_gradients(tiny.batch(8)), 2)), expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_several_forward_passes_before_one_backward_pass(reentrant):
    """Each has its own images, and its loss is a mean over them."""
    model = make() if reentrant is None else checkpointed("vit", reentrant)
    one, other = with_gradients(tiny.batch(3)), with_gradients(tiny.batch(5, seed=1))
    expected = [gathered(model, [each]) for each in (one, other)]
    scorer = HeadScorer(model, gates=True)
    (model(**one).loss + model(**other).loss).backward()
    scorer.update()
    assert scorer.num_images == 8
    assert_same(sums(scorer), {name: expected[0][name] + expected[1][name] for name in expected[0]})


def test_backward_passes_through_one_graph_add_up():
    model, batch = make(), tiny.batch()
    expected = gathered(model, batch=batch)
    scorer = HeadScorer(model, gates=True)
    loss = model(**batch).loss / 2
    loss.backward(retain_graph=True)
    loss.backward()
    scorer.update()
    assert scorer.num_images == 4  # two passes, each with half of the loss
    assert_same(sums(scorer), {name: v * torch.tensor([[2], [2], [4]]) for name, v in expected.items()})


def test_the_loss_may_be_computed_outside():
    model, batch = make(), tiny.batch(8)
    expected = gathered(model, halves(batch, 2))
    scorer = HeadScorer(model, gates=True)
    for part in halves(batch, 2):
        output = model(part["pixel_values"], return_dict=False)
        (cross_entropy(output[0], part["labels"]) / 2).backward()
    scorer.update()
    assert_same(sums(scorer), expected)


def test_forward_passes_without_backward_are_not_counted_and_leave_nothing():
    model, batch = make(), tiny.batch(8)
    expected = gathered(model)
    scorer = HeadScorer(model, gates=True)
    with torch.no_grad():
        model(**tiny.batch(3, seed=5))
    graph, kept = [], []
    handle = model.get_submodule(find_backbone(model).blocks[0].out).register_forward_hook(
        lambda m, args, output: kept.append(weakref.ref(args[0])) or graph.append(weakref.ref(output))
    )
    model(**tiny.batch(3, seed=6))
    handle.remove()
    gc.collect()
    assert [ref() for ref in kept + graph] == [None, None] and not scorer._gates._heard
    model(**batch).loss.backward()
    with torch.inference_mode():
        model(**tiny.batch(2, seed=7))
    scorer.update()
    assert scorer.num_images == 8
    assert_same(sums(scorer), expected, rtol=0)
    with pytest.raises(RuntimeError, match="no gradient has reached adapter"):
        scorer.update()


def test_frozen_early_blocks_have_gates_too():
    """The inputs of their modules need no gradient without the gates: they get those of an adapter that adds zero."""
    frozen, full = make(layers_to_transform=[1]), make()
    early, _ = find_backbone(full).blocks
    with torch.no_grad():
        for name in (early.query, early.value):
            full.get_submodule(name).lora_B["default"].weight.zero_()
    frozen.load_state_dict({k: v for k, v in full.state_dict().items() if k in frozen.state_dict()}, strict=False)
    module = frozen.get_submodule(early.out)
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(args[0].requires_grad))
    frozen(**tiny.batch())
    assert seen == [False]
    expected, actual = attention_gates(full), attention_gates(frozen)
    assert_same({("head", n): v for n, v in actual.items()}, {("head", n): v for n, v in expected.items()})


def attention_gates(model):
    scorer = HeadScorer(model, gates=True)
    model(**tiny.batch(8)).loss.backward()
    scorer.update()
    scorer.close()
    return scorer.attention_gates()


def test_units_that_are_off_have_gates_of_zero():
    model = make()
    block = find_backbone(model).blocks[0]
    value, first = (model.get_submodule(name).base_layer for name in (block.value, block.value))
    first = model.get_submodule(block.mlp_layers[0])
    with torch.no_grad():
        for tensor in (value.weight, value.bias, model.get_submodule(block.value).lora_B["default"].weight):
            tensor[4:8] = 0  # the second of the heads, of four channels
        first.weight[5], first.bias[5] = 0, 0
    found = gathered(model)
    heads, neurons = (next(v for (kind, _), v in found.items() if kind == each) for each in KINDS)
    assert (heads == 0).all(0).nonzero().flatten().tolist() == [1]
    assert (neurons == 0).all(0).nonzero().flatten().tolist() == [5]


def test_steps_that_are_not_finite_do_not_count():
    model = make()
    scorer = HeadScorer(model, gates=True)
    (model(**tiny.batch(8)).loss * torch.inf).backward()
    assert not scorer.update() and scorer.num_images == 0
    model.zero_grad()
    model(**tiny.batch(8)).loss.backward()
    assert scorer.update() and (scorer.num_steps, scorer.num_skipped, scorer.num_images) == (1, 1, 8)
    scorer.close()
    assert_same(sums(scorer), gathered(model), rtol=0)


def test_a_gate_that_is_not_finite_skips_the_step_for_all_statistics(monkeypatch):
    model = make()
    scorer = HeadScorer(model, gates=True)
    model(**tiny.batch(8)).loss.backward()
    next(iter(next(iter(scorer._gates._heard.values())).values())).grad[0, 0] = torch.inf
    assert not scorer.update() and (scorer.num_steps, scorer.num_skipped, scorer.num_images) == (0, 1, 0)


def test_half_precision():
    exact = gathered(make())
    model = make()
    scorer = HeadScorer(model, gates=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**tiny.batch(8)).loss
    loss.backward()
    scorer.update()
    assert_same(sums(scorer), exact, rtol=0.1)  # bfloat16 has two digits
    model = make().bfloat16()
    batch = tiny.batch(8)
    found = gathered(model, batch={**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    assert_same(found, exact, rtol=0.2)


# Names, scores, and where gates are gathered


def test_names_and_scores(backbone):
    model = make(backbone)
    scorer = HeadScorer(model, gates=True)
    for seed in range(2):
        model(**tiny.batch(4, seed=seed)).loss.backward()
        scorer.update()
    assert scorer.num_images == 8
    assert list(scorer.gates("head")) == list(scorer.layouts)
    for name, values in scorer.gates("head").items():
        block = next(block for block in scorer.attention_gates() if name.startswith(f"{block}."))
        assert torch.equal(values, scorer.attention_gates()[block])
        for row, criterion in enumerate(("gate", "gate_signed", "gate_squared")):
            assert torch.equal(scorer.scores(criterion)[name], values[row] / 8)
    assert list(scorer.all_scores()) == list(CRITERIA)
    names = [block.mlp_layers[0].removeprefix("base_model.model.") for block in find_backbone(model).blocks]
    for criterion in NEURON_CRITERIA:
        scores = scorer.neuron_scores(criterion)
        assert list(scores) == names
        for name, values in scores.items():
            layer = model.base_model.model.get_submodule(name)
            assert values.dtype == torch.float64 and values.shape == (layer.out_features,)
            if criterion == "weight_norm":
                torch.testing.assert_close(values, layer.weight.detach().double().norm(dim=1))
            if criterion == "most_responsive":
                assert torch.equal(values, -scorer.gates("neuron")[name][0] / 8)
    assert str(scorer.neuron_scores()) == str(scorer.neuron_scores("gate"))


def test_selection_by_gates():
    """Heads of an attention layer have one gate, so that q and v choose alike, together or alone."""
    model = make(criterion="gate", ne=2, granularity="layer")
    scorer = HeadScorer(model)
    model(**tiny.batch(8)).loss.backward()
    scorer.update()
    for joint in (True, False):
        for name, mask in scorer.select(joint=joint).items():
            gate = scorer.gates("head")[name][0]
            assert torch.equal((~mask).nonzero().flatten(), gate.argsort()[:2].sort().values)


def test_the_norm_of_a_neuron_is_that_of_its_row_with_the_update():
    with pytest.warns(UserWarning, match="have no attention heads and get a plain LoRA layer"):
        model = make(target_modules=tiny.now(["q_proj", "v_proj", "mlp.fc1"]))
    scorer = HeadScorer(model)
    norms = scorer.neuron_scores("weight_norm")
    for name, norm in norms.items():
        layer = model.base_model.model.get_submodule(name)
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(norm, weight.detach().double().norm(dim=1))
        assert (norm - layer.base_layer.weight.detach().double().norm(dim=1)).abs().max() > 1e-3
    model.merge_adapter()
    for name, norm in scorer.neuron_scores("weight_norm").items():
        torch.testing.assert_close(norm, norms[name], rtol=1e-5, atol=1e-6)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_hooks_are_there_only_while_gates_are_gathered():
    model = make()
    model(**tiny.batch())  # removes the hooks of newly made adapter layers
    before = hooks(model)
    scorer = HeadScorer(model)
    assert hooks(model) == before and "gates" not in scorer.state_dict()
    scorer.close()
    scorer = HeadScorer(model, gates=True, recording=False)
    assert hooks(model) == before
    scorer.start()
    assert hooks(model) > before
    scorer.stop()
    assert hooks(model) == before
    scorer.start()
    loss = model(**tiny.batch()).loss
    scorer.close()
    assert hooks(model) == before
    loss.backward()  # of a forward pass that had gates
    assert not scorer._gates.listening and not scorer._gates._heard


def test_a_scorer_that_is_dropped_puts_no_more_gates():
    model = make()
    scorer = weakref.ref(HeadScorer(model, gates=True))
    gc.collect()
    assert scorer() is None
    module = model.get_submodule(find_backbone(model).blocks[0].out)
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(args[0].grad_fn))
    model(**tiny.batch())
    assert "_Gated" not in type(seen[0]).__name__


@pytest.mark.parametrize(
    ("criterion", "extra", "gathers"),
    [
        ("absolute", {}, False),
        ("gate", {}, True),
        ("gate_squared", {}, True),
        ("absolute", {"neuron_ratio": 0.5, "neuron_criterion": "gate"}, True),
        ("absolute", {"neuron_ratio": 0.5, "neuron_criterion": "random"}, False),
        ("absolute", {"neuron_ratio": None, "neuron_criterion": "gate"}, False),
        ("random", {"target_speed": 2.0, "neuron_criterion": "random"}, True),
    ],
)
def test_where_gates_are_gathered(criterion, extra, gathers):
    model = make(criterion=criterion)
    for name, value in extra.items():
        setattr(model.peft_config["default"], name, value)
    scorer = HeadScorer(model)
    model(**tiny.batch()).loss.backward()
    scorer.update()
    assert scorer.num_images == (4 if gathers else 0)
    scorer.close()
    assert HeadScorer(model, gates=False).state_dict().keys() == {"num_steps", "num_skipped", "sums"}


def test_what_needs_gates_says_so():
    model = make()
    scorer = HeadScorer(model)
    model(**tiny.batch()).loss.backward()
    scorer.update()
    for call in (
        lambda: scorer.scores("gate"),
        lambda: scorer.neuron_scores("gate"),
        lambda: scorer.neuron_scores(),
        lambda: scorer.gates("neuron"),
        scorer.attention_gates,
    ):
        with pytest.raises(ValueError, match="not gathered: .*criterion='gate'.*HeadScorer.model, gates=True"):
            call()
    assert set(scorer.all_scores()) == {name for name in CRITERIA if not CRITERIA[name].needs_gates}
    scorer.close()
    with pytest.raises(ValueError, match="no optimizer step with gates was counted"):
        HeadScorer(model, gates=True).gates("neuron")
    with pytest.raises(ValueError, match="kind must be one of head, neuron; got 'unit'"):
        scorer.gates("unit")


def test_heads_without_a_place_for_gates(monkeypatch):
    model = make(num_heads=3)
    with pytest.raises(ValueError, match=r"the heads of vit.*have no gates: .*choose a criterion"):
        HeadScorer(make(num_heads=3, criterion="gate"))
    scorer = HeadScorer(model, gates=True)  # its neurons have
    model(**tiny.batch()).loss.backward()
    scorer.update()
    assert "gate" not in scorer.all_scores() and scorer.gates("neuron")
    with pytest.raises(ValueError, match="have no gates"):
        scorer.scores("gate")


def test_a_tensor_that_is_no_batch_of_images():
    model = make()
    block = find_backbone(model).blocks[1]
    HeadScorer(model, gates=True)
    model.get_submodule(block.out).register_forward_pre_hook(lambda m, args: (args[0][:-1],), prepend=True)
    scorer = HeadScorer(model, gates=True)
    with pytest.raises(ValueError, match=r"\(3, 17, 24\), and the model was called with 4 images"):
        model(**tiny.batch())
    scorer.close()


def test_state_goes_through_json_exactly():
    model = make()
    scorer = HeadScorer(model, gates=True)
    assert json.loads(json.dumps(scorer.state_dict()))["gates"]["num_images"] == 0
    for seed in range(3):
        model(**tiny.batch(seed=seed)).loss.backward()
        scorer.update()
        model.zero_grad()
        if seed == 1:
            state = json.loads(json.dumps(scorer.state_dict()))
    scorer.close()
    other = HeadScorer(model, gates=True)
    other.load_state_dict(state)
    model(**tiny.batch(seed=2)).loss.backward()
    other.update()
    assert other.num_images == 12
    assert_same(sums(other), sums(scorer), rtol=0)
    other.close()
    plain = HeadScorer(model)
    plain.load_state_dict(state)  # more than it asks for
    assert plain.num_steps == 2


def test_states_that_do_not_fit():
    model, other = make(), make("swin")
    scorer = HeadScorer(model)
    model(**tiny.batch()).loss.backward()
    scorer.update()
    state = scorer.state_dict()
    scorer.close()
    scorer = HeadScorer(model, gates=True)
    with pytest.raises(ValueError, match="the 1 saved steps were scored without gates"):
        scorer.load_state_dict(state)
    model(**tiny.batch()).loss.backward()
    scorer.update()
    gates = scorer.state_dict()["gates"]
    scorer = HeadScorer(other, gates=True)
    with pytest.raises(ValueError, match="the saved gates are those of another model"):
        scorer.load_state_dict({"num_steps": 0, "num_skipped": 0, "sums": {}, "gates": gates})
