import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from peft_heads import HeadMaskedLoraConfig, get_head_masks, set_head_masks
from peft_heads.heads.protocol import describe_masks, head_layers


@pytest.fixture
def model():
    return get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))


def test_names_are_those_of_the_base_model(model):
    names = list(tiny.masks_off(model))
    assert list(get_head_masks(model)) == names
    assert list(head_layers(torch.nn.Sequential(model)[0])) == names
    assert list(head_layers(model.base_model.model)) == names
    assert list(head_layers(torch.nn.ModuleDict({"module": model}))) == names  # DistributedDataParallel's name
    assert list(head_layers(torch.compile(model))) == names


def test_set_and_get(model):
    masks = tiny.masks_off(model, 1, 3)
    set_head_masks(model, masks)
    assert str(get_head_masks(model)) == str(masks)
    get_head_masks(model)[tiny.now("vit.layers.0.attention.q_proj")][:] = False  # a copy
    assert str(get_head_masks(model)) == str(masks)
    name = tiny.now("vit.layers.1.attention.v_proj")
    set_head_masks(model, {name: torch.ones(6, dtype=torch.bool)})  # the others keep theirs
    assert get_head_masks(model)[name].all()
    assert not get_head_masks(model)[tiny.now("vit.layers.1.attention.q_proj")].all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(5, dtype=torch.bool),
            tiny.now(r"v_proj must be a bool tensor of shape \(6,\).*got torch.bool \(5,\)"),
        ),
        (torch.ones(6), r"got torch.float32 \(6,\)"),
        ([True] * 6, "got list"),
        (torch.ones(6, 1, dtype=torch.bool), r"got torch.bool \(6, 1\)"),
    ],
)
def test_wrong_masks_change_nothing(model, mask, message):
    masks = tiny.masks_off(model, 1)
    masks[tiny.now("vit.layers.1.attention.v_proj")] = mask
    with pytest.raises(ValueError, match=message):
        set_head_masks(model, masks)
    assert all(m.all() for m in get_head_masks(model).values())


def test_unknown_names(model):
    with pytest.raises(ValueError, match=tiny.now(r"no heads in a module 'nope'; it has: vit\.layers\.0")):
        set_head_masks(model, {"nope": torch.ones(6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"adapter 'other' .*adapters with heads: default"):
        get_head_masks(model, "other")
    with pytest.raises(ValueError, match="it has no head-masked adapter"):
        get_head_masks(get_peft_model(tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"]))))


def test_ne_0_carries_no_masks():
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0))
    assert all(m.all() for m in get_head_masks(model).values())
    with pytest.raises(ValueError, match="created with ne=0"):
        set_head_masks(model, tiny.masks_off(model, 1))


def test_merged_masks_are_not_changed(model):
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged; call unmerge_adapter"):
        set_head_masks(model, tiny.masks_off(model, 1))


def test_deepcopy_has_masks_of_its_own(model):
    other = copy.deepcopy(model)
    set_head_masks(other, tiny.masks_off(other, 1))
    assert all(m.all() for m in get_head_masks(model).values())


def test_describe_masks(model):
    assert describe_masks(get_head_masks(model)) == "none"
    assert describe_masks(tiny.masks_off(model, 0, 5)) == "heads 0, 5 of 6 in all 4 projections"
