"""Models that Accelerate has offloaded, buffers included: weights and masks are on the meta device between calls."""

import copy

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_heads import HeadMaskedLoraConfig, RLRRConfig, get_head_masks, pack_adapter, set_head_masks


CPU = torch.device("cpu")
BLOCK = tiny.now("base_model.model.vit.layers.0")


def dispatch(model, folder):
    """Dispatch the model with only the first block offloaded."""

    def around(module, name):
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}".removeprefix(".")
            yield from around(child, full) if BLOCK.startswith(f"{full}.") else [full]

    blocks = {name: "disk" if name == BLOCK else "cpu" for name in around(model, "")}
    return dispatch_model(model, blocks, main_device="cpu", offload_dir=folder, offload_buffers=True)


WAYS = {
    "cpu": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "cpu, without buffers": lambda model, folder: cpu_offload(model, CPU),
    "disk": lambda model, folder: disk_offload(model, str(folder), CPU, offload_buffers=True),
    "a block": dispatch,
}
METHODS = {
    "lora": lambda: HeadMaskedLoraConfig(ne=1),
    "head scope": lambda: HeadMaskedLoraConfig(ne=1, mask_scope="head"),
    "dora": lambda: HeadMaskedLoraConfig(ne=1, use_dora=True),
    "k-bit": lambda: HeadMaskedLoraConfig(ne=1, adapter_bits=2, classifier_bits=2),
    "rlrr": lambda: RLRRConfig(ne=1),
}


def make(method):
    model = get_peft_model(tiny.make("vit"), METHODS[method]())
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        if param.requires_grad:
            param.data.normal_(std=0.3, generator=generator)
    set_head_masks(model, tiny.masks_off(model, 2))
    return model.eval()


def masks(model):
    return {name: mask.tolist() for name, mask in get_head_masks(model).items()}


@pytest.mark.parametrize(("method", "way"), [*[("lora", way) for way in WAYS], ("head scope", "cpu")])
def test_forward(method, way, tmp_path):
    model = make(method)
    expected = model(tiny.images()).logits
    offloaded = WAYS[way](copy.deepcopy(model), tmp_path)
    for _ in range(2):
        assert torch.equal(offloaded(tiny.images()).logits, expected)
    with torch.no_grad():
        assert torch.equal(offloaded(tiny.images()).logits, expected)
    assert masks(offloaded) == masks(model)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("dora", "DoraLinearVariant computes with the frozen weight itself.* load the model without offloading"),
        ("k-bit", "is on the meta device .not loaded, or offloaded.; load the model without offloading, or use"),
        ("rlrr", "RLRR computes with the frozen weight itself.* load the model without offloading"),
    ],
)
def test_forward_of_what_computes_with_weights_that_are_not_there(method, message, tmp_path):
    offloaded = WAYS["a block"](make(method), tmp_path)
    with pytest.raises(ValueError, match=message):
        offloaded(tiny.images())


@pytest.mark.parametrize(("method", "way"), [*[(method, "a block") for method in METHODS], ("lora", "cpu")])
def test_saving(method, way, tmp_path):
    model = make(method)
    if method == "k-bit":
        pack_adapter(model)
    model.save_pretrained(tmp_path / "before")
    offloaded = WAYS[way](copy.deepcopy(model), tmp_path / "offloaded")
    assert masks(offloaded) == masks(model)
    offloaded.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "after").eval()
    assert torch.equal(loaded(tiny.images()).logits, model(tiny.images()).logits)


@pytest.mark.parametrize("method", ["lora", "rlrr"])
def test_masks_that_are_offloaded_are_not_changed(method, tmp_path):
    offloaded = WAYS["a block"](make(method), tmp_path)
    before = masks(offloaded)
    with pytest.raises(ValueError, match=r"masks of adapter 'default' are offloaded .*; set them before the model"):
        set_head_masks(offloaded, {name: ~mask for name, mask in get_head_masks(offloaded).items()})
    assert masks(offloaded) == before


def test_masks_of_a_merged_adapter_are_not_changed_in_part():
    model = make("lora")
    before = masks(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_head_mask")]
    layers[-1].merge()
    with pytest.raises(ValueError, match="'default' is merged"):
        set_head_masks(model, {name: ~mask for name, mask in get_head_masks(model).items()})
    assert masks(model) == before


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_merging(way, tmp_path):
    model = make("lora")
    expected = model(tiny.images()).logits
    merged = WAYS[way](model, tmp_path).merge_and_unload()
    torch.testing.assert_close(merged(tiny.images()).logits, expected, rtol=1e-4, atol=1e-5)


def test_weights_without_a_value_are_not_saved(tmp_path):
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="lora_A.default.weight is on the meta device: it has no value yet"):
        model.save_pretrained(tmp_path)
