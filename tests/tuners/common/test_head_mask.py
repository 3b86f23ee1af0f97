"""The mask has two senses: True = deactivated in the model's buffer, True = active in files and for users."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from peft.utils import hotswap
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import ViTForImageClassification

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, get_head_masks, pack_adapter, set_head_masks
from peft_heads.heads import HeadLayout, ProjectionLayout
from peft_heads.tuners.common.head_mask import HeadMask, rows_in_file


METHODS = {
    "lora": lambda **options: HeadMaskedLoraConfig(ne=1, **options),
    "lora, head scope": lambda **options: HeadMaskedLoraConfig(ne=1, mask_scope="head", **options),
    "rlrr": lambda **options: RLRRConfig(ne=1, **options),
}
KEY = "base_model.model.vit.layers.0.attention.v_proj.{}_head_mask"
PACKED_KEY = "base_model.model.vit.layers.0.attention.v_proj.lora_packed"


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def make(method, seed=0, off=2, **options):
    """Make a model whose adapter has an effect, with one head off in every projection."""
    model = get_peft_model(tiny.make("vit"), METHODS[method](**options))
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.normal_(std=0.3, generator=generator)
    if off is not None:
        set_head_masks(model, tiny.masks_off(model, off))
    return model.eval()


def key(method, end):
    return tiny.now(KEY.format("rlrr" if method == "rlrr" else "lora")) + end


def logits(model):
    with torch.no_grad():
        return model(tiny.images()).logits


def masks(model, adapter_name="default"):
    return {name: mask.tolist() for name, mask in get_head_masks(model, adapter_name).items()}


def as_before(state_dict):
    """Return a state dict in the form of earlier versions of this package."""
    return {
        key.removesuffix(".off") + ".mask" if key.endswith("_head_mask.default.off") else key: (
            ~value if key.endswith("_head_mask.default.off") else value
        )
        for key, value in state_dict.items()
    }


def test_both_senses(method, tmp_path):
    model = make(method)
    in_model = model.state_dict()[key(method, ".default.off")]
    assert in_model.tolist() == [False, False, True, False, False, False]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved[key(method, ".mask")].tolist() == [True, True, False, True, True, True]
    assert saved[key(method, ".mask")].dtype == torch.bool
    assert not any(name.endswith(".off") for name in saved)
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path).eval()
    assert masks(loaded) == masks(model)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.state_dict()[key(method, ".default.off")], in_model)


def test_both_senses_of_a_packed_adapter(tmp_path):
    model = make("lora", adapter_bits=2, modules_to_save=[])
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("head_mask" in name for name in saved)
    assert saved[tiny.now(PACKED_KEY)][4].item() == 0b111011  # True = active, from the least significant bit on
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path).eval()
    assert masks(loaded) == masks(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("assign", [False, True])
def test_an_old_state_dict_is_converted(method, assign):
    model, old = make(method), as_before(make(method, seed=1, off=4).state_dict())
    expected = make(method, seed=1, off=4)
    before = {name: value.clone() for name, value in old.items()}
    assert not any(model.load_state_dict(old, strict=True, assign=assign))
    assert masks(model) == masks(expected)
    assert torch.equal(logits(model), logits(expected))
    assert all(torch.equal(value, before[name]) for name, value in old.items())  # the user's dict stays as it was


def test_an_old_state_dict_of_the_mask_alone():
    mask = HeadMask(3)
    mask.load_state_dict({"mask": torch.tensor([True, False, True])})
    assert mask.off.tolist() == [False, True, False]


@pytest.mark.parametrize(
    "edit",
    [
        lambda old, name: old.update({name: old[name].float()}),  # an average of old masks
        lambda old, name: old.update({name.removesuffix("mask") + "off": old[name]}),  # both, of the same values
    ],
)
def test_an_old_state_dict_that_cannot_be_read_is_refused(edit):
    model = make("lora")
    old = as_before(model.state_dict())
    edit(old, key("lora", ".default.mask"))
    with pytest.raises(RuntimeError, match=r"head_mask\.default\.mask \(True = active\) must be a bool tensor that"):
        model.load_state_dict(old)
    assert masks(model) == masks(make("lora"))


def test_a_mask_in_a_file_that_is_not_bool(method, tmp_path):
    make(method).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[key(method, ".mask")] = tensors[key(method, ".mask")].float()
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the head mask of \S+ must be a bool tensor of shape \(6,\)"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)


# Averages


def average_of_state_dicts(average, model, decay=0.5):
    for averaged, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        averaged.copy_(decay * averaged + (1 - decay) * value)


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("way", ["AveragedModel", "state dicts"])
def test_an_exponential_average_keeps_a_head_off(method, way, decay, tmp_path):
    model = make(method, off=None)
    if way == "AveragedModel":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        update = average.update_parameters
    else:
        average = copy.deepcopy(model)
        update = lambda model: average_of_state_dicts(average, model, decay)  # noqa: E731
    for step in range(6):
        if step == 2:
            set_head_masks(model, tiny.masks_off(model, 2))
        update(model)
    assert masks(average) == masks(model) == masks(make(method))
    averaged = getattr(average, "module", average)
    averaged.save_pretrained(tmp_path)
    assert masks(PeftModel.from_pretrained(tiny.make("vit"), tmp_path)) == masks(model)


def test_an_average_that_leaves_bool_buffers_alone_is_given_the_masks(method):
    """ema_pytorch, for instance, averages only floating-point values."""
    model = make(method, off=None)
    average = copy.deepcopy(model)
    set_head_masks(model, tiny.masks_off(model, 2))
    for averaged, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if averaged.is_floating_point():
            averaged.lerp_(value, 0.5)
    assert masks(average) == masks(make(method, off=None))
    set_head_masks(average, get_head_masks(model))
    assert masks(average) == masks(model)


def test_averages_of_equal_weight(method):
    model = make(method, off=None)
    of_parameters, of_buffers = AveragedModel(model), AveragedModel(model, use_buffers=True)
    for average in (of_parameters, of_buffers):
        average.update_parameters(model)
    set_head_masks(model, tiny.masks_off(model, 2))
    of_parameters.update_parameters(model)
    assert masks(of_parameters) == masks(model)
    with pytest.raises(RuntimeError, match="[Bb]ool"):  # torch's, at any bool buffer
        of_buffers.update_parameters(model)
    set_head_masks(of_buffers, get_head_masks(model))
    assert masks(of_buffers) == masks(model)


# Ways into a model that bypass the tuner


def test_weights_that_are_swapped_in(tmp_path):
    """A caller with a file's tensors may call `hotswap_adapter_from_state_dict` directly."""
    model, other = make("lora", modules_to_save=[]), make("lora", seed=1, off=4, modules_to_save=[])
    other.save_pretrained(tmp_path)
    tensors = _insert_adapter_name_into_state_dict(
        load_file(tmp_path / "adapter_model.safetensors"), adapter_name="default", parameter_prefix="lora_"
    )
    hotswap.hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert masks(model) == masks(other)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_load_adapter_of_transformers(method, adapter_name, tmp_path):
    model = make(method, modules_to_save=[])
    model.save_pretrained(tmp_path)
    loaded = tiny.make("vit")
    loaded.load_adapter(str(tmp_path), adapter_name=adapter_name)
    assert masks(loaded, adapter_name) == masks(model)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_from_pretrained_of_transformers(method, tmp_path):
    model = make(method)
    tiny.make("vit").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "adapter").eval()
    assert masks(loaded) == masks(model)
    assert torch.equal(logits(loaded), logits(model))


PROJECTION = ProjectionLayout(6, (HeadLayout("query", num_heads=3, head_dim=2),))


def test_rows_of_a_packed_file():
    rows = rows_in_file(PROJECTION, "the adapter's layer", (6, 4), torch.tensor([True, False, True]))
    assert rows.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("layout", "num_heads", "num_rows", "message"),
    [
        (None, 3, 6, "it has 3 heads in 6 rows, but the adapter's layer has none"),
        (PROJECTION, 2, 6, "it has 2 heads in 6 rows, but the adapter's layer has 3 in 6 rows"),
        (PROJECTION, 3, 12, "it has 3 heads in 12 rows, but the adapter's layer has 3 in 6 rows"),
    ],
)
def test_a_packed_file_of_other_heads(layout, num_heads, num_rows, message):
    with pytest.raises(ValueError, match=message):
        rows_in_file(layout, "the adapter's layer", (num_rows, 4), torch.ones(num_heads, dtype=torch.bool))
