"""When the codes of k-bit weights are computed, and what such weights do not allow."""

import copy
import subprocess
import sys

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from peft.utils import hotswap

from peft_heads import HeadMaskedLoraConfig, pack_adapter, set_head_masks
from peft_heads.heads.protocol import head_layers
from peft_heads.tuners.common import quantizer


K_BIT = {"adapter_bits": 2, "classifier_bits": 2}
# the function that modules which imported it before us still have
ORIGINAL_PREPARE = hotswap.prepare_model_for_compiled_hotswap.__wrapped__


def make(seed=0, rank=4, **options):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, r=rank, **(K_BIT | options)))
    generator = torch.Generator().manual_seed(seed)
    for param in trained(model):
        param.data.normal_(std=0.3, generator=generator)
    set_head_masks(model, tiny.masks_off(model, 2))
    return model.eval()


def trained(model):
    return [param for name, param in model.named_parameters() if "lora_" in name or "modules_to_save" in name]


def through_data(model, other):
    """Write weights as averages do, without changing a version counter."""
    for param, value in zip(trained(model), trained(other), strict=True):
        param.data.copy_(value)


def in_whole(model):
    with torch.no_grad():
        return model(tiny.images()).logits


def base_model(model):
    with torch.no_grad():
        return model.get_base_model()(tiny.images()).logits


def inference_mode(model):
    with torch.inference_mode():
        return model(tiny.images()).logits.clone()


def frozen(model):
    """Gradients are enabled, but no weight needs one."""
    for param in model.parameters():
        param.requires_grad_(False)
    return model(tiny.images()).logits


@pytest.mark.parametrize("run", [in_whole, base_model, inference_mode, frozen])
def test_weights_written_through_data_are_seen_without_gradients(run):
    model, other = make(), make(seed=1)
    before, expected = run(model), run(other)
    assert not torch.equal(before, expected)
    back = copy.deepcopy(model)
    through_data(model, other)
    assert torch.equal(run(model), expected)
    through_data(model, back)
    assert torch.equal(run(model), before)


def test_after_a_pass_that_did_not_reach_all_layers():
    """The codes that it has computed for the other layers are no longer valid."""
    model, other = make(), make(seed=1)
    layer = list(head_layers(model).values())[-1]

    def stop(*args):
        raise InterruptedError

    handle = layer.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        in_whole(model)
    handle.remove()
    layer.get_delta_weight("default")
    through_data(model, other)
    assert torch.equal(in_whole(model), in_whole(other))


def test_a_pass_without_gradients_leaves_the_training_as_it_was():
    """An average is evaluated, in the same mode, between a step and the next pass."""
    model, average = make().train(), make(seed=1)
    undisturbed = copy.deepcopy(model)
    for one in (undisturbed, model):
        optimizer = tiny.train(one, steps=1)
        if one is model:
            back = copy.deepcopy(model)
            through_data(model, average)
            assert torch.equal(in_whole(model.train()), in_whole(average.train()))
            through_data(model, back)
        tiny.train(one, steps=1, seed=5, optimizer=optimizer)
    for param, expected in zip(trained(model), trained(undisturbed), strict=True):
        assert torch.equal(param, expected)


def test_with_gradients_forget_is_what_it_takes():
    model, other = make(), make(seed=1)
    model(tiny.images()), other(tiny.images())
    through_data(model, other)
    model.forget_codes("default")
    assert torch.equal(model(tiny.images()).logits, other(tiny.images()).logits)


def test_a_packed_adapter_keeps_its_codes_until_its_weights_are_others(monkeypatch):
    model, other = make(), make(seed=1)
    pack_adapter(model)
    before = in_whole(model)
    with monkeypatch.context() as patch:
        patch.setattr(quantizer, "decide", lambda *args: pytest.fail("nothing is to be decided"))
        assert torch.equal(in_whole(model), before)
        assert torch.equal(base_model(model), before)
    packed = copy.deepcopy(model)
    through_data(model, other)
    assert torch.equal(in_whole(model), in_whole(other))
    assert torch.equal(in_whole(packed), before)


def test_the_optimizer_hook_waits_for_a_k_bit_adapter(monkeypatch):
    hooks = []
    monkeypatch.setattr(quantizer, "_step_hooks", [])
    monkeypatch.setattr(quantizer, "register_optimizer_step_post_hook", hooks.append)
    make(adapter_bits=32, classifier_bits=32)
    assert not hooks
    make()
    make()
    assert hooks == [quantizer._count_step]


@pytest.mark.slow
def test_importing_the_package_installs_no_optimizer_hook():
    script = "import peft_heads; from torch.optim.optimizer import _global_optimizer_post_hooks as h; print(len(h))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


# Hot-swapping pads with zeros, which have no code


def scalings(model):
    return [layer.scaling["default"] for layer in head_layers(model).values()]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_padding_is_refused_before_anything_is_changed(bits):
    model = make(adapter_bits=bits, modules_to_save=[], classifier_bits=32)
    before, expected = scalings(model), in_whole(model)
    message = rf"q_proj: adapter 'default' has {bits}-bit weights of rank 4, which cannot be padded to target_rank=8"
    for prepare in (hotswap.prepare_model_for_compiled_hotswap, ORIGINAL_PREPARE):
        with pytest.raises(ValueError, match=tiny.now(message)):
            prepare(model, target_rank=8, config=model.peft_config)
        if prepare is not ORIGINAL_PREPARE:
            assert all(now is old for now, old in zip(scalings(model), before, strict=True))
        assert model.peft_config["default"].r == 4
        assert torch.equal(in_whole(model), expected)


@pytest.mark.parametrize("target_rank", [None, 4])
def test_what_needs_no_padding_is_prepared(target_rank, tmp_path):
    options = {"modules_to_save": [], "classifier_bits": 32}
    model, other = make(**options), make(seed=1, lora_alpha=5, **options)
    other.save_pretrained(tmp_path)
    expected = in_whole(model)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
    assert torch.equal(in_whole(model), expected)
    hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(in_whole(model), in_whole(other))


@pytest.mark.parametrize("rank", [2, 8])
def test_another_rank_is_not_swapped_in(rank, tmp_path):
    options = {"modules_to_save": [], "classifier_bits": 32}
    make(seed=1, rank=rank, **options).save_pretrained(tmp_path)
    model = make(**options)
    before, expected = copy.deepcopy(model.state_dict()), in_whole(model)
    with pytest.raises(ValueError, match=r"lora_A.default.weight has 2 bits and shape \(4, 24\); .* cannot be padded"):
        hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(in_whole(model), expected)


def test_fewer_targets_are_swapped_in(tmp_path):
    """Zeros in place of a whole matrix have mean and deviation 0, and act as zeros."""
    options = {"modules_to_save": [], "classifier_bits": 32}
    other = get_peft_model(
        tiny.make("vit"), HeadMaskedLoraConfig(ne=1, r=4, target_modules=tiny.now(["v_proj"]), **(K_BIT | options))
    )
    tiny.randomize_lora(other)
    set_head_masks(
        other, {name: mask for name, mask in tiny.masks_off(other, 4).items() if name.endswith(tiny.now("v_proj"))}
    )
    other.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.make("vit"), tmp_path)
    expected = in_whole(model.eval())
    model = make(**options)
    hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
    assert torch.equal(in_whole(model), expected)
