import gc
import json
import math
import re
import warnings
from collections import Counter

import backbones
import pytest
import reference
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SwinConfig, SwinForImageClassification

from peft_heads import HeadMaskedLoraConfig, HeadScorer, get_head_masks, set_head_masks
from peft_heads.backbones.renames import place_of
from peft_heads.heads import CRITERIA, head_statistics
from peft_heads.heads.protocol import head_layers


def make(backbone="vit", std=0.1, **config):
    model = get_peft_model(tiny.make(backbone), HeadMaskedLoraConfig(**{"ne": 1, **config}))
    tiny.randomize_lora(model, std=std)
    return model


def off(mask):
    return set((~mask).nonzero().flatten().tolist())


@pytest.mark.parametrize("lora", [{}, {"lora_bias": True}], ids=str)
def test_against_the_reference(backbone, lora):
    """Scores of a few real training steps are recomputed, number by number, from recorded gradients and weights."""
    model = make(backbone, **lora)
    scorer = HeadScorer(model, gates=True)
    params, grads = {}, {}

    def record():
        for name, layer in head_layers(model).items():
            rows = [p.detach().reshape(p.shape[0], -1) for p in layer.head_parameters("default")]
            slopes = [p.grad.reshape(p.shape[0], -1) for p in layer.head_parameters("default")]
            params.setdefault(name, []).append(torch.cat(rows, 1).tolist())
            grads.setdefault(name, []).append(torch.cat(slopes, 1).tolist())
        assert scorer.update()

    tiny.train(model, steps=3, after_backward=record)
    assert scorer.num_steps == 3
    for criterion in ("absolute", "positive", "negative", "grad_norm"):
        for name, score in scorer.scores(criterion).items():
            expected = reference.scores(criterion, params[name], grads[name], len(score))
            torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    for name, layer in head_layers(model).items():
        rows = torch.cat([p.detach().reshape(p.shape[0], -1) for p in layer.head_parameters("default")], 1)
        expected = reference.weight_norms(rows.tolist(), layer.head_layout["default"].num_heads)
        torch.testing.assert_close(scorer.scores("weight_norm")[name], torch.tensor(expected, dtype=torch.float64))
    assert set(scorer.all_scores()) == set(CRITERIA)


K_BIT = [{"adapter_bits": 1}, {"adapter_bits": 4, "lora_bias": True, "r": 4}]


def test_all_criteria_read_the_weights_once(monkeypatch):
    """Sharded weights are put together for it, which every process waits for."""
    model = make()
    scorer = HeadScorer(model, gates=True)
    tiny.train(model, steps=1, after_backward=scorer.update)
    each = {name: scorer.scores(name) for name in CRITERIA}
    read, values = [], scorer._gradients.values
    monkeypatch.setattr(scorer._gradients, "values", lambda now: read.append(now) or values(now))
    together = scorer.all_scores()
    assert read == [True]
    assert together.keys() == each.keys()
    for name, scores in each.items():
        assert all(torch.equal(together[name][module], score) for module, score in scores.items())


@pytest.mark.parametrize("lora", [{}, {"lora_bias": True}, *K_BIT], ids=str)
def test_signed_score_is_the_derivative_with_respect_to_a_gate(backbone, lora):
    """In a whole model each head's delta is multiplied by a gate of 1; the score is the derivative by the gate."""
    model = make(backbone, **lora).double().eval()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in tiny.batch().items()}
    scorer = HeadScorer(model)
    model(**batch).loss.backward()
    scorer.update()

    gates = {}
    for name, layer in head_layers(model).items():
        gates[name] = torch.ones(layer.head_layout["default"].num_heads, dtype=torch.float64, requires_grad=True)

        def gated(x, layer=layer, adapted=layer.forward, gate=gates[name]):
            frozen = layer.base_layer(x)
            return frozen + (adapted(x) - frozen) * layer.head_layout["default"].parts[0].expand(gate)

        layer.forward = gated
    model(**batch).loss.backward()
    for name, score in scorer.scores("positive").items():
        assert score.abs().max() > 1e-9
        # gradients are recorded in float32
        torch.testing.assert_close(score, gates[name].grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bits", [1, 8])
def test_k_bit_scores_are_those_of_the_quantised_weights(bits):
    """They are compared with those of stock LoRA whose parameters are the quantised weights."""
    model = make(adapter_bits=bits, r=4)
    scorer = HeadScorer(model, gates=True)
    plain = make(ne=1, r=4)
    plain.load_state_dict(model.state_dict())
    for layer, other in zip(head_layers(model).values(), head_layers(plain).values(), strict=True):
        other.lora_A["default"].weight.data = layer.quantized_down("default").detach()
        other.lora_B["default"].weight.data = layer.quantized_up("default").detach()
    expected = HeadScorer(plain, gates=True)
    for each, its_scorer in ((model, scorer), (plain, expected)):
        for seed in range(2):  # two micro-batches
            each(**tiny.batch(seed=seed)).loss.backward()
        its_scorer.update()
    for criterion in CRITERIA:
        for name, score in expected.scores(criterion).items():
            torch.testing.assert_close(scorer.scores(criterion)[name], score, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("ne", [1, 3])
@pytest.mark.parametrize("granularity", ["global", "layer"])
@pytest.mark.parametrize("joint", [True, False])
def test_selection_against_the_reference(ne, granularity, joint):
    model = make()
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    masks = scorer.select(ne=ne, granularity=granularity, joint=joint)

    def place(name):  # the layer, and the part
        _, (layer,), role = place_of(name)
        return layer, role

    scores = {place(name): score.tolist() for name, score in scorer.scores().items()}
    expected = reference.deactivated(scores, ne=ne, granularity=granularity, joint=joint)
    assert {place(name): off(mask) for name, mask in masks.items()} == expected


def test_swin_b_at_a_quarter_gives_1_2_4_8():
    config = SwinConfig(
        embed_dim=32, depths=[1, 1, 2, 1], num_heads=[4, 8, 16, 32], image_size=32, patch_size=2, window_size=2
    )
    model = get_peft_model(SwinForImageClassification(config), HeadMaskedLoraConfig(ratio=0.25))
    tiny.randomize_lora(model, std=0.1)
    scorer = HeadScorer(model)
    model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    scorer.update()
    masks = scorer.apply()
    counts = {len(mask): len(off(mask)) for mask in masks.values()}
    assert counts == {4: 1, 8: 2, 16: 4, 32: 8}
    by_heads = {}
    for mask in masks.values():
        by_heads.setdefault(len(mask), set()).add(tuple(mask.tolist()))
    assert all(len(distinct) == 1 for distinct in by_heads.values())  # the same heads in all layers of a stage


def test_apply_sets_masks_zeroes_rows_and_stops_listening():
    model = make()
    scorer = HeadScorer(model)
    optimizer = tiny.train(model, after_backward=scorer.update)
    expected = scorer.select()
    masks = scorer.apply(optimizer)
    assert str(masks) == str(expected) == str(get_head_masks(model))
    assert not scorer.recording
    for name, layer in head_layers(model).items():
        rows = ~layer.active_rows("default")
        weight = layer.lora_B["default"].weight
        assert len(off(masks[name])) == 1
        assert weight[rows].count_nonzero() == 0 and weight[~rows].count_nonzero() > 0
        moments = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
        assert len(moments) == 2
        for value in moments:
            assert value[rows].count_nonzero() == 0 and value[~rows].count_nonzero() > 0
    HeadScorer(model)  # the first has let go


def test_one_warm_up_serves_every_variant():
    model = make()
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    assert {len(off(m)) for m in scorer.select(ne=3).values()} == {3}
    assert {len(off(m)) for m in scorer.select(ratio=0.5).values()} == {3}
    assert {tuple(off(m)) for m in scorer.select(criterion="front").values()} == {(0,)}
    assert str(scorer.select(criterion="random")) == str(scorer.select(criterion="random"))
    seeds = {}
    for scorer.config.mask_seed in range(5):
        seeds[scorer.config.mask_seed] = str(scorer.select(criterion="random"))
    assert len(set(seeds.values())) > 1
    name, mask = scorer.select(ne=2).popitem()
    masks = scorer.apply(masks={name: mask})  # the others do not change, and are named as well
    assert {n: len(off(m)) for n, m in masks.items()} == {n: 2 * (n == name) for n in scorer.layouts}
    assert str(get_head_masks(model)) == str(masks)


def test_apply_refuses_wrong_masks():
    model = make()
    scorer = HeadScorer(model)
    name = tiny.now("vit.layers.0.attention.q_proj")
    with pytest.raises(ValueError, match="has no heads in a module 'nope'; it has: vit"):
        scorer.apply(masks={name: torch.zeros(6, dtype=torch.bool), "nope": torch.zeros(6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"shape \(6,\)"):
        scorer.apply(masks={name: torch.zeros(5, dtype=torch.bool)})
    assert all(mask.all() for mask in get_head_masks(model).values())


def test_ne_0_never_masks():
    model = make(ne=0)
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    assert scorer.scores()[tiny.now("vit.layers.0.attention.q_proj")].abs().sum() > 0  # may be looked at
    assert all(mask.all() for mask in scorer.apply().values())


def test_masks_of_an_already_masked_adapter_are_kept():
    model = make()
    set_head_masks(model, tiny.masks_off(model, 4))
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    with pytest.warns(UserWarning, match="deactivated heads already and keeps them .head 4 of 6 in all 4 projections"):
        masks = scorer.apply()
    assert str(masks) == str(tiny.masks_off(model, 4)) == str(get_head_masks(model))


def test_groups_too_small_for_another_ne_warn():
    model = make("swin")
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    with pytest.warns(UserWarning, match="ne=2: 1 group"):
        masks = scorer.select(ne=2)
    assert {len(mask): len(off(mask)) for mask in masks.values()} == {2: 0, 4: 2}


def test_non_finite_gradients_are_skipped_and_counted():
    model = make()
    scorer = HeadScorer(model)
    model(**tiny.batch()).loss.backward()
    assert scorer.update()
    expected = scorer.scores()
    for value in (float("nan"), float("inf")):
        (model(**tiny.batch()).loss * value).backward()
        assert not scorer.update()
    assert (scorer.num_steps, scorer.num_skipped) == (1, 2)
    assert str(scorer.scores()) == str(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_skips_the_step(value, dtype):
    """The number may be in anything trained beside the heads; a process may hold no rows of a sharded parameter."""
    model = make()
    model.beside = torch.nn.Parameter(torch.zeros(40, dtype=dtype))
    model.empty = torch.nn.Parameter(torch.zeros(0, 4))
    scorer = HeadScorer(model)
    for number in (torch.finfo(dtype).max, value):
        model(**tiny.batch()).loss.backward()
        model.beside.grad, model.empty.grad = torch.zeros_like(model.beside), torch.zeros_like(model.empty)
        model.beside.grad[33] = number
        assert scorer.update() is math.isfinite(number)
    assert (scorer.num_steps, scorer.num_skipped) == (1, 1)


class Calls(TorchDispatchMode):
    """A mode that counts the calls of PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# how many shapes the rows of their heads have; hiera's first layer has one head
SHAPES = {"vit": 1, "swin": 1, "fused vit": 1, "fused swin": 2, "hiera": 1}


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("lora", [{}, {"lora_bias": True}, *K_BIT], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_computes_projections_together_and_waits_for_none(family, lora, dtype):
    """The statistics equal those of each projection alone, bit for bit, in one call for each shape."""
    model = get_peft_model(
        backbones.FAMILIES[family].make(), HeadMaskedLoraConfig(ne=0, **lora), autocast_adapter_dtype=False
    ).to(dtype)
    tiny.randomize_lora(model, std=0.1)
    inputs = {
        k: x.to(dtype) if x.is_floating_point() else x for k, x in backbones.inputs(model.base_model.model).items()
    }
    scorer, expected = HeadScorer(model), {}
    for _ in range(2):
        heard = {}
        for _ in range(2):
            (backbones.output(model, **inputs) - torch.rand(())).square().sum().backward()
        for name, layer in scorer.layers.items():
            scored = layer.scored_parameters("default")
            params = layer.head_parameters("default")
            values = [one.tensor().detach().reshape(len(one.param), -1) for one in scored]
            grads = [scorer._gradients._grads[param].reshape(len(param), -1) / 3 for param in params]
            for part, layout in layer.head_layout["default"].named_parts(name).items():
                heard[part] = head_statistics(
                    layout.rows(torch.cat(values, dim=1)), layout.rows(torch.cat(grads, dim=1)), layout
                )
        with Calls() as calls:
            assert scorer.update(loss_scale=3)
        assert calls.names["sqrt"] == SHAPES[family]  # of grad_norm
        assert not calls.names["_local_scalar_dense"] and not calls.names["is_nonzero"]
        expected = {name: expected[name] + step for name, step in heard.items()} if expected else heard
    assert scorer.state_dict()["sums"] == {name: sums.tolist() for name, sums in expected.items()}
    assert all(sums.abs().min() > 0 for sums in expected.values())


def test_nothing_but_non_finite_gradients_is_an_error():
    model = make()
    scorer = HeadScorer(model)
    (model(**tiny.batch()).loss * float("nan")).backward()
    scorer.update()
    with pytest.raises(ValueError, match="the gradients of all 1 steps were not finite"):
        scorer.apply()
    assert all(mask.all() for mask in get_head_masks(model).values())
    scorer.select(criterion="front")  # needs no gradients


def test_no_step_is_an_error():
    scorer = HeadScorer(make())
    with pytest.raises(ValueError, match="no optimizer step was counted; call update"):
        scorer.select()


def test_update_without_a_gradient():
    model = make()
    scorer = HeadScorer(model)
    where = tiny.now(r"vit\.layers\.\*\.attention\.q_proj, vit\.layers\.\*\.attention\.v_proj")
    with pytest.raises(RuntimeError, match=f"no gradient has reached adapter 'default'.*projections \\({where}\\)"):
        scorer.update()
    scorer.stop()
    with pytest.raises(RuntimeError, match="not recording; call start"):
        scorer.update()


def test_only_one_scorer():
    model = make()
    first = HeadScorer(model)
    with pytest.raises(ValueError, match="another scorer is attached to adapter 'default'"):
        HeadScorer(model)
    first.close()
    second = HeadScorer(model)
    del second  # a scorer that is no longer referenced does not interfere
    gc.collect()
    HeadScorer(model)


def test_two_adapters_two_scorers():
    model = make()
    model.add_adapter("other", HeadMaskedLoraConfig(ne=1, modules_to_save=[]))
    scorer = HeadScorer(model)
    with pytest.raises(ValueError, match="adapter 'other' cannot be scored: its parameters in .* are frozen"):
        HeadScorer(model, "other")
    assert scorer.recording


def test_models_without_heads():
    with pytest.raises(ValueError, match="it has no head-masked adapter.*HeadMaskedLoraConfig"):
        HeadScorer(get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"]))))
    with pytest.raises(ValueError, match="it has no head-masked adapter"):
        HeadScorer(tiny.make("vit"))


def test_frozen_adapter(tmp_path):
    model = make()
    set_head_masks(model, tiny.masks_off(model, 1))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="frozen; load the adapter with is_trainable=True"):
        HeadScorer(PeftModel.from_pretrained(tiny.make("vit"), tmp_path))


def test_state_goes_through_json_exactly():
    model = make()
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    state = json.loads(json.dumps(scorer.state_dict()))
    expected = scorer.all_scores()
    scorer.close()
    other = HeadScorer(model)
    other.load_state_dict(state)
    assert str(other.all_scores()) == str(expected)
    for name, score in expected["absolute"].items():
        assert torch.equal(other.scores("absolute")[name], score)


def test_state_of_another_model():
    model, other = make(), make("swin")
    scorer = HeadScorer(model)
    tiny.train(model, after_backward=scorer.update)
    with pytest.raises(ValueError, match="those of another model"):
        HeadScorer(other).load_state_dict(scorer.state_dict())


def test_listening_changes_no_gradient():
    plain, scored = make(), make()
    HeadScorer(scored)
    for model in (plain, scored):
        model(**tiny.batch()).loss.backward()
    expected = tiny.gradients(plain)
    for name, grad in tiny.gradients(scored).items():
        assert torch.equal(grad, expected[name]), name


def test_fused_and_foreach_optimizer_state_is_cleared_through_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    scorer = HeadScorer(model)
    accelerator.backward(model(**tiny.batch()).loss)
    scorer.update()
    optimizer.step()
    optimizer.zero_grad()
    scorer.apply(optimizer)
    for layer in head_layers(model).values():
        state = optimizer.state[layer.lora_B["default"].weight]
        assert state["exp_avg"][~layer.active_rows("default")].count_nonzero() == 0


def test_flattened_parameters_are_refused():
    """FSDP1 flattens parameters, but needs an accelerator; the test flattens them by hand."""
    model = make()
    layer = head_layers(model)[tiny.now("vit.layers.1.attention.v_proj")]
    layer.lora_B["default"].weight = torch.nn.Parameter(torch.zeros(96))
    with pytest.raises(ValueError, match=tiny.now(r"v_proj has the shape \(96,\) instead of \(24, …\).*use FSDP2")):
        HeadScorer(model)
    assert not any(p._backward_hooks for p in model.parameters())  # nothing was left behind


def test_step_after_the_optimizer():
    """DeepSpeed's engine steps before Trainer calls the callbacks; the values must be those of the backward pass."""
    scores = []
    for late in (False, True):
        model = make()
        scorer = HeadScorer(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
        model(**tiny.batch()).loss.backward()
        for call in (optimizer.step, scorer.update) if late else (scorer.update, optimizer.step):
            call()
        scores.append(scorer.scores("absolute"))
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


# Scores without information


@pytest.fixture
def caught():
    """Collect our warnings, which are errors otherwise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)  # those between the hosts
        yield caught


def step(model, scorer, factor=1.0, **options):
    (model(**tiny.batch()).loss * factor).backward()
    assert scorer.update(**options)
    model.zero_grad()


@pytest.mark.parametrize(
    ("std", "factor", "loss_scale"),
    [(0.0, 1.0, 1.0), (0.1, 0.0, 1.0), (0.1, 1.0, math.inf)],
    ids=["first step", "zero gradients", "infinite loss scale"],
)
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if CRITERIA[name].is_taylor])
def test_scores_of_zero_are_told(caught, std, factor, loss_scale, criterion):
    model = make(std=std, criterion=criterion, ne=2)
    scorer = HeadScorer(model)
    for _ in range(2):
        step(model, scorer, factor, loss_scale=loss_scale)
    assert scorer.is_degenerate()
    masks = scorer.apply()
    assert {tuple(off(mask)) for mask in masks.values()} == {(0, 1)}  # invariant 6
    (warning,) = caught
    where = tiny.now(r"vit\.layers\.\*\.attention\.q_proj, vit\.layers\.\*\.attention\.v_proj")
    assert re.search(f"by '{criterion}'.*all 6 heads is 0 in {where}, and heads 0, 1 will be", str(warning.message))


def test_equal_scores_other_than_zero_are_told(caught):
    model = make(criterion="weight_norm")
    for layer in head_layers(model).values():
        layer.lora_B["default"].weight.data.fill_(0.5)
    masks = HeadScorer(model).select()
    assert {tuple(off(mask)) for mask in masks.values()} == {(0,)}
    (warning,) = caught
    assert "by 'weight_norm' do not tell heads apart" in str(warning.message)
    assert re.search(r"all 6 heads is \d+\.\d+ in", str(warning.message))


def test_weight_norms_of_a_new_adapter_are_told():
    scorer = HeadScorer(make(std=0, criterion="weight_norm"))
    with pytest.warns(UserWarning, match="by 'weight_norm' do not tell heads apart"):
        scorer.select()


@pytest.mark.parametrize("criterion", ["front", "random", "grad_norm"])
def test_criteria_that_tell_heads_apart_at_the_first_step(criterion):
    model = make(std=0, criterion=criterion)
    scorer = HeadScorer(model)
    step(model, scorer)
    assert not scorer.is_degenerate()
    scorer.apply()  # warnings are errors


@pytest.mark.parametrize(("granularity", "joint"), [("global", True), ("layer", True), ("layer", False)])
def test_the_group_is_named(caught, granularity, joint):
    """If only some projections of a group are zero, the others distinguish its heads."""
    model = make(granularity=granularity, joint=joint)
    name = tiny.now("vit.layers.1.attention.q_proj")
    head_layers(model)[name].lora_B["default"].weight.data.zero_()
    scorer = HeadScorer(model)
    step(model, scorer)
    scorer.select()
    if joint:
        assert not caught and not scorer.is_degenerate()
    else:
        (warning,) = caught
        assert f"all 6 heads is 0 in {name}, and head 0 will be" in str(warning.message) and scorer.is_degenerate()


def test_ne_0_is_never_degenerate():
    model = make(std=0, ne=0)
    scorer = HeadScorer(model)
    step(model, scorer)
    assert not scorer.is_degenerate()
    scorer.apply()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "statistics"])
def test_scores_that_are_not_finite_set_no_mask(value, where):
    model = make(criterion="weight_norm" if where == "weights" else "absolute")
    scorer = HeadScorer(model)
    step(model, scorer)
    if where == "weights":
        next(iter(head_layers(model).values())).lora_B["default"].weight.data[5] = value
    else:
        scorer._sums[:, 3] = value
    with pytest.raises(ValueError, match=tiny.now(r"scores of vit\.layers\.0\.attention\.q_proj are not finite")):
        scorer.apply()
    assert all(mask.all() for mask in get_head_masks(model).values())


def skip_layer(model, index):
    """Make the loss independent of a layer's output, like that of the predictor in V-JEPA 2's classifier."""
    backbone = model.get_base_model().vit
    layer = (backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer)[index]
    forward = layer.forward

    def skipped(hidden_states, *args, **kwargs):
        output = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    layer.forward = skipped


@pytest.mark.parametrize("criterion", ["absolute", "front"])
def test_projections_without_gradient_are_named_at_selection(caught, criterion):
    model = make(criterion=criterion)
    skip_layer(model, 1)
    scorer = HeadScorer(model)
    step(model, scorer)
    step(model, scorer)
    masks = scorer.apply()
    (warning,) = caught
    names = [name for name in masks if ".1." in name]
    assert len(names) == 2 and f"no gradient has reached {', '.join(names)} in the 2 step(s)" in str(warning.message)
    assert "exclude_modules" in str(warning.message)


def test_without_a_gradient_each_projection_is_named_once(caught):
    """A selection layer by layer cannot use these projections either."""
    model = make(granularity="layer")
    skip_layer(model, 1)
    scorer = HeadScorer(model)
    step(model, scorer)
    scorer.apply()
    (warning,) = caught
    assert "do not tell heads apart" in str(warning.message) and ".0." not in str(warning.message)


def test_what_only_some_steps_reach_is_not_named(caught):
    model = make()
    scorer = HeadScorer(model)
    step(model, scorer)
    skip_layer(model, 1)
    step(model, scorer)
    scorer.select()
    assert not caught


def test_the_window_without_gradient_goes_through_a_checkpoint(caught):
    model = make()
    skip_layer(model, 1)
    scorer = HeadScorer(model)
    step(model, scorer)
    state = json.loads(json.dumps(scorer.state_dict()))
    scorer.close()
    other = HeadScorer(model)
    other.load_state_dict(state)
    assert [".1." in name for name in other.without_gradient()] == [True, True]
