"""Packed adapters: the same logits, training that goes on, and how small they are."""

import copy
import json

import pytest
import tiny
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_heads import HeadMaskedLoraConfig, HeadScorer, get_head_masks, pack_adapter, set_head_masks
from peft_heads.cli.main import main
from peft_heads.functional.quantization import BITS
from peft_heads.heads.protocol import head_layers
from peft_heads.methods import pack_trained


pytestmark = pytest.mark.filterwarnings("ignore:these targets have no attention heads")
every_width = pytest.mark.parametrize("bits", BITS)
SETTINGS = {
    "plain": {},
    "head": {"mask_scope": "head"},
    "ne=0": {"ne": 0},
    "bias": {"lora_bias": True},
    "mlp": {"target_modules": tiny.now(["q_proj", "v_proj", "fc1"])},
    "separate": {"joint": False, "classifier_bits": 32},
    "classifier": {"adapter_bits": 32},
}


def make(backbone="vit", **options):
    options = {"adapter_bits": 1, "r": 4, "classifier_bits": 2, **options}
    model = get_peft_model(tiny.make(backbone), HeadMaskedLoraConfig(**options))
    tiny.randomize_lora(model, std=0.1)
    if model.peft_config["default"].masks_heads:
        set_head_masks(model, tiny.masks_off(model, 1))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.images()).logits


def load(folder, **kwargs):
    return PeftModel.from_pretrained(tiny.make("vit"), folder, **kwargs)


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def codes(model):
    quantizers = [(layer, layer.lora_quantizer["default"]) for layer in head_layers(model).values()]
    return [
        quantizer.decision(layer.lora_B["default"], **layer.heads_of_rows("default")).codes
        for layer, quantizer in quantizers
    ] + [quantizer.decision(layer.lora_A["default"]).codes for layer, quantizer in quantizers]


@every_width
@pytest.mark.parametrize("case", SETTINGS)
def test_logits_are_the_same_to_the_bit(case, bits, tmp_path):
    model = make(**{"adapter_bits": bits, **SETTINGS[case]})
    expected = logits(model)
    pack_adapter(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["packed"] is True
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(copy.deepcopy(loaded)), expected)
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    torch.testing.assert_close(logits(loaded), expected)  # unmerging rounds, as LoRA's does
    masks = get_head_masks(model)
    assert all(torch.equal(mask, masks[name]) for name, mask in get_head_masks(loaded).items())
    # saved again, it is the same file
    loaded.save_pretrained(tmp_path / "again")
    first, second = tensors(tmp_path), tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("backbone", ["swin"])
def test_stages_with_other_numbers_of_heads(backbone, tmp_path):
    model = make(backbone, ratio=0.5)
    expected = logits(model)
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.make(backbone), tmp_path)), expected)


def test_under_another_name_and_dtype(tmp_path):
    model = make()
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=0))
    other.load_adapter(tmp_path, "small")
    other.set_adapter("small")
    assert torch.equal(logits(other), logits(model))
    half = PeftModel.from_pretrained(tiny.make("vit").bfloat16(), tmp_path, autocast_adapter_dtype=False).eval()
    layer, expected = next(iter(head_layers(half).values())), next(iter(head_layers(model).values()))
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    # quantised from bfloat16 weights, codes would differ
    assert torch.equal(layer.quantized_up("default"), expected.quantized_up("default").bfloat16())


def test_low_cpu_mem_usage(tmp_path):
    model = make()
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, low_cpu_mem_usage=True)), logits(model))


@every_width
def test_training_goes_on_from_the_same_codes(bits, tmp_path):
    model = make(adapter_bits=bits)
    before = codes(model)
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, is_trainable=True)
    # the full-precision weights alone, in an adapter that was never packed
    plain = make(adapter_bits=bits)
    plain.load_state_dict(loaded.state_dict())
    assert all(layer.lora_A["default"].weight.unique().numel() <= 2**bits for layer in head_layers(loaded).values())
    for one, other in zip(codes(plain), before, strict=True):
        assert (one != other).float().mean() <= (0.05 if bits == 8 else 0)  # see `latents`
    tiny.train(model.train(), steps=2)
    tiny.train(loaded.train(), steps=2)
    for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)
    loaded.save_pretrained(tmp_path / "on")
    saved = tensors(tmp_path / "on")
    assert any(key.endswith("lora_A.weight") for key in saved) and not any("packed" in key for key in saved)
    assert json.loads((tmp_path / "on" / "adapter_config.json").read_text())["packed"] is False
    assert torch.equal(logits(load(tmp_path / "on")), logits(loaded))


def test_heads_selected_again_after_packing(tmp_path):
    model = make()
    pack_adapter(model)
    set_head_masks(model, tiny.masks_off(model, 1, 3))
    model.save_pretrained(tmp_path)
    assert not model.peft_config["default"].packed
    # untouched weights still use their stored mean and deviation, but not after loading
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=1e-6, atol=1e-7)


def test_another_state_dict_is_not_passed_over():
    """The codes do not belong to averaged weights, for instance."""
    model = make()
    pack_adapter(model)
    state = {key: value * 1.5 if "lora_A" in key else value for key, value in model.state_dict().items()}
    given = get_peft_model_state_dict(model, state_dict=state)
    assert torch.equal(*(next(v for k, v in d.items() if "lora_A" in k) for d in (given, state)))


def test_a_save_of_other_weights_leaves_the_adapter_packed(tmp_path):
    model = make()
    pack_adapter(model)
    state = {key: value * 1.5 if "lora_A" in key else value for key, value in model.state_dict().items()}
    for name, kwargs, packed in (("other", {"state_dict": state}, False), ("own", {}, True)):
        model.save_pretrained(tmp_path / name, **kwargs)
        assert any("packed" in key for key in tensors(tmp_path / name)) is packed
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["packed"] is packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_and_back(tmp_path, dtype):
    model = make(adapter_bits=8)
    pack_adapter(model)
    before = [
        x
        for layer in head_layers(model).values()
        for x in (layer.quantized_down("default"), layer.quantized_up("default"))
    ]
    model.to(dtype).to(torch.float32).eval()
    after = [
        x
        for layer in head_layers(model).values()
        for x in (layer.quantized_down("default"), layer.quantized_up("default"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.save_pretrained(tmp_path)
    assert any("packed" in key for key in tensors(tmp_path))


def test_a_configuration_that_serves_again(tmp_path):
    model = make()
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    config = model.peft_config["default"]
    for again in (config, copy.deepcopy(config)):
        other = get_peft_model(tiny.make("vit"), again)
        assert not again.packed
        logits(other)
    model.add_adapter("two", copy.deepcopy(config))
    model.set_adapter("two")
    logits(model)


def test_entries_that_are_not_finite():
    model = make()
    layer = next(iter(head_layers(model).values()))
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lora_A.default.weight has entries that are not finite"):
        pack_adapter(model)
    assert not model.peft_config["default"].packed


def test_scores_of_a_packed_adapter(tmp_path):
    model = make()
    tiny.train(model.train(), steps=1)
    scores = []
    for packed in (False, True):
        if packed:
            pack_adapter(model)
        scorer = HeadScorer(model)
        model.zero_grad()
        model(**tiny.batch()).loss.backward()
        scorer.update()
        scores.append(scorer.scores("absolute"))
        scorer.close()
    assert scores[0] and all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled():
    model = make(adapter_bits=8)
    expected = logits(model)
    pack_adapter(model)
    for layer in head_layers(model).values():  # codes that the weights alone would not have
        packed = layer.lora_B["default"].packed_weight
        layer.lora_B["default"].packed_weight = packed._replace(mean=packed.mean + 1)
        layer.lora_quantizer["default"].forget()
    changed = logits(model)
    assert not torch.allclose(changed, expected)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(tiny.images()).logits, changed)
    torch._dynamo.reset()


def test_checkpoints_hold_the_weights_behind(tmp_path):
    """A run that started from a packed file and was killed continues from its checkpoint undisturbed."""
    model = make()
    pack_adapter(model)
    model.save_pretrained(tmp_path / "packed")

    def train(folder, **kwargs):
        model = load(tmp_path / "packed", is_trainable=True)
        args = TrainingArguments(
            folder, max_steps=4, save_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2
        )
        Trainer(model, args, train_dataset=tiny.examples()).train(**kwargs)
        return model

    whole = train(tmp_path / "a")
    assert not any("packed" in key for key in tensors(tmp_path / "a" / "checkpoint-2"))
    resumed = train(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


# Files


@pytest.mark.parametrize(("ne", "limit"), [(3, 129_024 + 4_500), (6, int(0.11 * 2**20))])
def test_bytes_of_vit_base(ne, limit, tmp_path):
    """ViT-B/16, q and v, r = 32, 1 bit take 24 x (32 * 768 + 32 * 64 * (12 - ne)) / 8 bytes, and little more."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=10))
    config = HeadMaskedLoraConfig(ne=ne, adapter_bits=1, r=32)
    model = get_peft_model(base, config).to_empty(device="cpu")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                param.normal_()
    set_head_masks(model, {name: torch.arange(12) >= ne for name in get_head_masks(model)})
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    head = sum(tensor.nbytes for key, tensor in tensors(tmp_path).items() if "classifier" in key)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size - head
    assert 24 * (32 * 768 + 32 * 64 * (12 - ne)) / 8 < size <= limit


def saved(tmp_path, **options):
    model = make(**options)
    pack_adapter(model)
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(tensors(folder)), path)


def first(content):
    return next(key for key in content if key.endswith("lora_packed"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {first(t): t[first(t)][:-1].clone()},
            "q_proj.lora_packed of the adapter file cannot be unpacked",
        ),
        (lambda t: t | {first(t): torch.cat([t[first(t)], t[first(t)][:1]])}, "1 bytes more than 2 matrices take"),
        # the mask: 5 of 6 heads become 3 of 6
        (lambda t: t | {first(t): t[first(t)].clone().index_fill_(0, torch.tensor([4]), 7)}, "bytes more than"),
        # the number of heads
        (lambda t: t | {first(t): t[first(t)].clone().index_fill_(0, torch.tensor([2]), 4)}, "4 heads in 24 rows"),
        (lambda t: t | {"base_model.model.classifier.weight": torch.zeros(9, dtype=torch.uint8)}, "classifier"),
    ],
)
def test_damaged_files(change, message, tmp_path):
    folder = saved(tmp_path)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message.replace("q_proj", tiny.now("q_proj"))):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter_bits": 2}, r"packed with 1 bits and shapes \[\(4, 24\), \(24, 4\)\], but .* created with 2 bits"),
        ({"r": 8}, r"created with 1 bits and shapes \[\(8, 24\), \(24, 8\)\]"),
        ({"adapter_bits": 32}, "created with 32 bits"),
        ({"classifier_bits": 32}, "is packed, but the adapter's head is in full precision"),
    ],
)
def test_files_of_other_settings(settings, message, tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_without_its_codes(tmp_path):
    """transformers 5 loads adapters by its own code, which fills missing tensors with random numbers."""
    folder = saved(tmp_path, modules_to_save=[], classifier_bits=32)
    model = tiny.make("vit")
    model.load_adapter(str(folder))
    if tiny.VERSION < Version("5"):  # by PEFT's, which finds the codes
        assert torch.equal(logits(model), logits(load(folder)))
        return
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="packed, but no codes have been loaded: transformers' own load_adapter"):
            one(tiny.images())


def test_nothing_to_pack():
    model = make(adapter_bits=32, classifier_bits=32)
    with pytest.raises(ValueError, match=r"'default' \(HEAD_MASKED_LORA\) has no k-bit weights to pack"):
        pack_adapter(model)
    with pytest.raises(ValueError, match="no adapter 'other'; the model has default"):
        pack_adapter(model, "other")


def test_hotswap_is_refused(tmp_path):
    model = make(modules_to_save=[], classifier_bits=32)
    pack_adapter(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the new adapter is packed; use load_adapter"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


def test_a_file_in_full_precision_over_a_packed_adapter(tmp_path):
    model = make(modules_to_save=[], classifier_bits=32)
    model.save_pretrained(tmp_path / "full")
    expected = logits(model)
    tiny.randomize_lora(model, seed=5)
    pack_adapter(model)
    assert not torch.equal(logits(model), expected)
    model.load_adapter(tmp_path / "full", "default")
    assert not model.peft_config["default"].packed
    assert torch.equal(logits(model), expected)


def test_export(tmp_path, capsys):
    tiny.make("vit").save_pretrained(tmp_path / "base")
    model = make()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("Mine.\n")
    expected = logits(model)
    assert main(["export", str(tmp_path / "adapter"), "--to", "packed", str(tmp_path / "small")]) == 0
    assert "adapter_model.safetensors" in capsys.readouterr().out
    assert torch.equal(logits(load(tmp_path / "small")), expected)
    assert any("packed" in key for key in tensors(tmp_path / "small"))
    assert "Mine." in (tmp_path / "small" / "README.md").read_text()
    assert {p.name for p in (tmp_path / "small").iterdir()} == {p.name for p in (tmp_path / "adapter").iterdir()}
    assert main(["export", str(tmp_path / "adapter"), "--to", "packed", str(tmp_path / "small")]) == 2
    assert "exists already" in capsys.readouterr().err
    # there is nothing to do, and nothing is lost
    assert main(["export", str(tmp_path / "small"), "--to", "packed", str(tmp_path / "again")]) == 0
    first, second = tensors(tmp_path / "small"), tensors(tmp_path / "again")
    assert all(torch.equal(first[key], second[key]) for key in first)
    full = make(adapter_bits=32, classifier_bits=32)
    full.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    full.save_pretrained(tmp_path / "full")
    assert main(["export", str(tmp_path / "full"), "--to", "packed", str(tmp_path / "none")]) == 2
    assert "no k-bit weights to pack" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_all_k_bit_adapters_of_a_model(tmp_path):
    """Full-precision adapters do not change, nor does a model without adapters."""
    model = make()
    model.add_adapter("full", HeadMaskedLoraConfig(ne=1))
    model.add_adapter("other", HeadMaskedLoraConfig(ne=1, adapter_bits=4))
    pack_trained(model)
    assert {name: config.packed for name, config in model.peft_config.items()} == {
        "default": True,
        "full": False,
        "other": True,
    }
    pack_trained(tiny.make("vit"))
