"""What every method must do: every behaviour is tested for every row of one table of cases (method_cases.py).

What only one method can do is tested in `test_features.py` of its folder.
"""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import tiny
import torch
from method_cases import (
    CASES,
    METHODS,
    RLRR,
    assert_close,
    assert_heads_are_off,
    assert_same,
    behaviour,
    create,
    deactivate,
    deactivated,
    heads_off,
    logits,
    projections,
    rows_of,
    rows_of_method,
)
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from peft_heads import HeadScorer, get_head_masks, set_head_masks


TESTS = Path(__file__).parents[1]


def test_rows_name_behaviours():
    """The behaviours that a row refuses or lacks are names of tests."""
    files = [Path(__file__), *(TESTS / "tuners").glob("*/test_features.py")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    behaviours = set(re.findall(r"@behaviour\(.*\)\n(?:@.*\n)*def test_(\w+)", source))
    named = {name for case in CASES.values() for name in (*case.refuses, *case.never)}
    assert len(files) == 3 and named and named <= behaviours


# A new adapter


@behaviour(CASES)
def test_default_targets(case):
    """By default the adapter and the classifier are trained."""
    model = get_peft_model(tiny.make(case.backbone), case.config())
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    of_adapter = [name for name in trained if f".{case.method.prefix}" in name]
    classifier = [name for name in trained if "classifier.modules_to_save.default." in name]
    assert of_adapter and len(classifier) == 2 and len(trained) == len(of_adapter) + 2
    assert model.peft_config["default"].target_modules and model.peft_config["default"].modules_to_save
    if case.is_masked:
        assert list(get_head_masks(model)) == projections(case)
        assert all(mask.all() for mask in get_head_masks(model).values())


@behaviour(METHODS)
def test_new_adapter(case):
    """Before heads are selected, outputs, gradients and file are those of `ne=0`."""
    results = []
    for ne in (0, 1):
        torch.manual_seed(7)
        model = get_peft_model(tiny.make(case.backbone), case.varied(ne=ne).config())
        tiny.train(model)
        model(**tiny.batch()).loss.backward()
        grads = tiny.gradients(model)
        file = {key: tensor for key, tensor in get_peft_model_state_dict(model).items() if tensor.dtype != torch.bool}
        results.append({"logits": logits(model.eval())} | grads | file)
    without, with_masks = results
    assert without.keys() == with_masks.keys() and len(without) > 10
    for name, tensor in without.items():
        assert torch.equal(tensor, with_masks[name]), name


# Forward and backward


@behaviour(CASES)
def test_forward(case):
    model = create(case)
    assert heads_off(case, model) == deactivated(case)
    assert_same(case, logits(model), case.method.logits(case, model))
    assert (logits(model) - logits(tiny.make(case.backbone).eval())).abs().max() > 1e-3
    assert_heads_are_off(case, model)
    if case.is_masked:  # the masks have an effect
        unmasked = copy.deepcopy(model)
        set_head_masks(unmasked, {name: torch.ones_like(mask) for name, mask in get_head_masks(model).items()})
        assert not torch.allclose(logits(model), logits(unmasked), atol=1e-4)


@behaviour(CASES)
def test_gradients(case):
    """Gradients are compared in training mode, with the same random numbers for dropout."""
    model = create(case)
    expected = case.method.gradients(case, model)
    torch.manual_seed(5)
    model.train()(**tiny.batch()).loss.backward()
    for name, heads in heads_off(case, model).items():
        for param in model.get_base_model().get_submodule(name).head_parameters("default"):
            assert param.grad[rows_of(case, heads)].count_nonzero() == 0
            assert param.grad.count_nonzero() > 0
    grads = tiny.gradients(model)
    if expected is not None:
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert_same(case, grad, expected[name])


@behaviour(METHODS | rows_of_method(RLRR))
def test_autocast(case):
    """Gradients have full precision, and are close to those without autocast."""
    model, other = create(case), create(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**tiny.batch()).loss
    loss.backward()
    other(**tiny.batch()).loss.backward()
    exact = tiny.gradients(other)
    for name, grad in tiny.gradients(model).items():
        assert grad.dtype == torch.float32
        assert (grad - exact[name]).norm() <= 0.1 * exact[name].norm() + 1e-4, name


@behaviour(CASES)
def test_gradient_checkpointing(case):
    model = create(case)
    other = copy.deepcopy(model)
    base = other.get_base_model()
    if hasattr(base, "activation_checkpointing_enable"):  # transformers renames it in v6
        base.activation_checkpointing_enable()
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in other.modules())
    for each in (model, other):
        torch.manual_seed(5)  # dropout, drop path
        each.train()(**tiny.batch()).loss.backward()
    expected = tiny.gradients(model)
    for name, grad in tiny.gradients(other).items():
        assert torch.equal(grad, expected[name]), name


@behaviour(CASES)
def test_training(case, tmp_path):
    """After selection and more training the heads' update is exactly zero in memory, merged, and in the file."""
    model = create(case)
    optimizer, share = None, case.options.get("ratio")
    if case.is_masked:
        set_head_masks(model, {name: torch.ones_like(mask) for name, mask in get_head_masks(model).items()})
        scorer = HeadScorer(model)
        optimizer = tiny.train(model, steps=2, after_backward=scorer.update)
        scorer.apply(optimizer)
    off, before = heads_off(case, model), copy.deepcopy(model.state_dict())
    for name, heads in off.items():
        assert len(heads) == (int(share * len(get_head_masks(model)[name])) if share else case.options["ne"])
    if case.options.get("granularity") != "layer" and case.backbone == "vit":
        assert len({str(heads) for name, heads in off.items() if name.endswith(tiny.now("v_proj"))}) <= 1
    tiny.train(model, steps=3, optimizer=optimizer, seed=50)
    model.eval()
    assert heads_off(case, model) == off
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) or param.requires_grad, name  # frozen parameters have not changed
    assert any(not torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert_heads_are_off(case, model)
    for name, heads in off.items():
        layer = model.get_base_model().get_submodule(name)
        for param in layer.head_parameters("default"):
            assert param[rows_of(case, heads)].count_nonzero() == 0 and param.count_nonzero() > 0
        if case.options.get("mask_scope") != "head":
            assert layer.get_delta_weight("default")[rows_of(case, heads)].count_nonzero() == 0
    assert_same(case, logits(model), case.method.logits(case, model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make(case.backbone), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# Files


@behaviour(METHODS)
def test_file(case, tmp_path):
    """Keys carry the method's prefix; the file has the masks, and rows of deactivated heads are zero."""
    model = create(case)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    own = {key for key in file if f".{case.method.prefix}" in key}
    assert own and {key.rpartition(".")[0] for key in file.keys() - own} == {"base_model.model.classifier"}
    assert not any(".default" in key for key in file)
    masks = get_head_masks(model) if case.is_masked else {}
    saved = {key: mask for key, mask in file.items() if key.endswith("_head_mask.mask")}
    assert len(saved) == len(masks)
    names = {id(param): name for name, param in model.named_parameters()}
    for name, mask in masks.items():
        assert torch.equal(saved[f"base_model.model.{name}.{case.method.prefix}head_mask.mask"], mask)
        rows = rows_of(case, heads_off(case, model)[name])
        params = model.get_base_model().get_submodule(name).head_parameters("default")
        assert params and rows
        for param in params:
            tensor = file[names[id(param)].replace(".default", "")]
            assert tensor[rows].count_nonzero() == 0 and tensor.count_nonzero() > 0
            assert param[rows].count_nonzero() > 0  # saving does not change what is in memory


@behaviour(CASES)
def test_save_and_load(case, tmp_path):
    model = create(case)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny.make(case.backbone), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert heads_off(case, loaded) == heads_off(case, model)
    assert type(PeftConfig.from_pretrained(tmp_path)) is case.method.config


@behaviour(CASES)
def test_load_under_another_name(case, tmp_path):
    source = create(case)
    source.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        model = create(case, seed=1)
        before = logits(model)
        result = model.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.missing_keys
        assert torch.equal(logits(model), before)
        model.set_adapter("loaded")
        assert torch.equal(logits(model.eval()), logits(source))
        assert heads_off(case, model, "loaded") == heads_off(case, source)
        assert heads_off(case, model) == deactivated(case, 1)


@behaviour(METHODS)
def test_labels_and_card(case, tmp_path):
    """The card beside the weights names method and heads; labels are restored with the adapter."""
    model = create(case)
    names = {0: "cat", 1: "dog", 2: "eel"}
    model.get_base_model().config.id2label = names
    model.get_base_model().config.label2id = {label: index for index, label in names.items()}
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Settings" in card
    if case.is_masked:
        assert f"head 1 of 6 in all {len(projections(case))} projections" in card
    assert json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))["id2label"] == {
        str(index): label for index, label in names.items()
    }
    loaded = PeftModel.from_pretrained(tiny.make(case.backbone), tmp_path)
    assert loaded.get_base_model().config.id2label == names
    # labels follow the active adapter
    loaded.add_adapter("other", case.varied(modules_to_save=[]).config())
    loaded.set_adapter("other")
    assert loaded.get_base_model().config.id2label != names
    loaded.set_adapter("default")
    assert loaded.get_base_model().config.id2label == names
    with loaded.disable_adapter():
        assert loaded.get_base_model().config.id2label != names


def refused(folder, backbone, message):
    model = tiny.make(backbone)
    before = str(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert str(model) == before


@behaviour(METHODS)
def test_wrong_file(case, tmp_path):
    """Files of other models, and contradicting masks, are refused before the model is changed."""
    create(case).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    refused(tmp_path, "swin", re.escape(str(tmp_path)))
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith("_head_mask.mask")][-1:]:
        name = re.escape(key.removeprefix("base_model.model.").rpartition(f".{case.method.prefix}")[0])
        save_file(tensors | {key: tensors[key][:3].clone()}, path)
        refused(tmp_path, case.backbone, rf"{name} must be a bool tensor of shape \(6,\)")
        save_file(tensors | {key: ~tensors[key]}, path)
        refused(tmp_path, case.backbone, r"the mask deactivates heads \[0, 2, 3, 4, 5\]|in .* deactivates heads")
    damaged = {key: tensor for key, tensor in tensors.items() if f".{case.method.prefix}" not in key}
    assert damaged and len(damaged) < len(tensors)
    save_file(damaged, path)
    refused(tmp_path, case.backbone, re.escape(str(tmp_path)))


# Merging


@behaviour(CASES)
def test_merge_and_unmerge(case):
    for safe_merge in (False, True):
        model = create(case)
        layers = {name: model.get_base_model().get_submodule(name).base_layer for name in projections(case)}
        assert layers or not case.is_masked
        before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
        whole, expected = copy.deepcopy(model.state_dict()), case.method.logits(case, model)

        model.merge_adapter(safe_merge=safe_merge)
        assert_close(case, logits(model), expected)
        for name, heads in heads_off(case, model).items():
            rows = rows_of(case, heads)
            for key, tensor in layers[name].state_dict().items():
                kept = torch.zeros_like if case.options.get("mask_scope") == "head" else torch.clone
                assert torch.equal(tensor[rows], kept(before[name][key][rows]))

        model.unmerge_adapter()
        assert_close(case, logits(model), expected)
        assert model.state_dict().keys() == whole.keys()
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, whole[key]) if case.method.restores_exactly else True
            assert_close(case, tensor, whole[key])
        for name, heads in heads_off(case, model).items():
            for key, tensor in layers[name].state_dict().items():
                assert torch.equal(tensor[rows_of(case, heads)], before[name][key][rows_of(case, heads)])


@behaviour(CASES)
def test_merge_two_adapters(case):
    """Adapters are merged one after the other; the first is unmerged last."""
    model = create(case, "default", "other")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    assert base
    expected = [case.method.logits(case, model, adapter) for adapter in ("default", "other")]
    model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    for name, tensor in base.items():
        assert_close(case, model.state_dict()[name], tensor)
    for adapter, value in zip(("default", "other"), expected, strict=True):
        model.set_adapter(adapter)
        assert_close(case, logits(model.eval()), value)


@behaviour(CASES)
def test_merge_and_unload(case, tmp_path):
    model = create(case)
    expected = case.method.logits(case, model)
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny.make(case.backbone))
    assert merged.state_dict().keys() == tiny.make(case.backbone).state_dict().keys()
    assert_close(case, logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))


@behaviour(CASES)
def test_unload(case):
    model = create(case)
    unloaded = model.unload()
    base = tiny.make(case.backbone).state_dict()
    for name, tensor in unloaded.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, base.pop(name))
    assert base and all(name.startswith("classifier") for name in base)


@behaviour(CASES)
def test_disable(case):
    model = create(case)
    expected, base = logits(model), logits(tiny.make(case.backbone).eval())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        if case.method.restores_exactly:
            assert torch.equal(logits(model), base)
        assert_close(case, logits(model), base)
    assert_close(case, logits(model), expected)


# Several adapters


@behaviour(CASES)
def test_switch(case):
    model = create(case, "default", "other")
    assert heads_off(case, model) == deactivated(case, 0)
    assert heads_off(case, model, "other") == deactivated(case, 1)
    expected = {adapter: case.method.logits(case, model, adapter) for adapter in ("default", "other")}
    assert not torch.allclose(expected["default"], expected["other"], atol=1e-4)
    for adapter in ("other", "default", "other"):
        model.set_adapter(adapter)
        assert_same(case, logits(model.eval()), expected[adapter])
        trained = [name for name, param in model.named_parameters() if param.requires_grad]
        assert trained and all(f".{adapter}" in name for name in trained)


@behaviour(CASES)
def test_delete(case):
    model = create(case, "default", "other")
    expected = case.method.logits(case, model)
    model.delete_adapter("other")
    assert_same(case, logits(model), expected)
    assert not any("other" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="no attention head of the model belongs to adapter 'other'"):
        get_head_masks(model, "other")
    model.add_adapter("other", case.config())  # the name is free again, and nothing of the old mask remains
    if case.is_masked:
        assert all(mask.all() for mask in get_head_masks(model, "other").values())
    assert_same(case, logits(model.eval()), expected)


@behaviour(CASES)
def test_mixed_batch(case):
    model = create(case, "default", "other")
    expected = {adapter: case.method.logits(case, model, adapter) for adapter in ("default", "other")}
    with model.disable_adapter():
        expected["__base__"] = logits(model)
    names, before = ["other", "__base__", "default", "other"], logits(model)
    mixed = logits(model, adapter_names=names)
    assert torch.equal(logits(model), before)  # nothing of it stays
    for index, name in enumerate(names):
        assert_close(case, mixed[index], expected[name][index])


# Copies


@behaviour(CASES)
def test_copy_and_pickle(case):
    model = create(case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        assert heads_off(case, other) == heads_off(case, model)
        deactivate(case, other, seed=1)
        assert heads_off(case, model) == deactivated(case)  # nothing is shared
        assert_same(case, logits(other), case.method.logits(case, other))


@behaviour(CASES)
def test_state_dict(case):
    """Trainer and accelerate save everything in it, masks included."""
    model, other = create(case), create(case, seed=1)
    buffers = dict(other.named_buffers())
    assert len(buffers) >= len(projections(case))
    deactivate(case, other, seed=2)
    assert all(buffer is buffers[name] for name, buffer in other.named_buffers())  # set in place, as DDP needs it
    other.load_state_dict(model.state_dict())
    assert heads_off(case, other) == heads_off(case, model)
    assert torch.equal(logits(other), logits(model))


@behaviour(CASES)
def test_inject(case):
    """`inject_adapter_in_model` works without a PeftModel around the model."""
    source = create(case)
    config = copy.deepcopy(source.peft_config["default"])
    keys = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(source).items()}
    for low_cpu_mem_usage in (False, True):
        model = inject_adapter_in_model(config, tiny.make(case.backbone), low_cpu_mem_usage=low_cpu_mem_usage)
        result = set_peft_model_state_dict(model, keys, low_cpu_mem_usage=low_cpu_mem_usage)
        # MonteCLoRA makes its buffers later then
        assert low_cpu_mem_usage or not result.unexpected_keys
        assert heads_off(case, model) == heads_off(case, source)
        assert torch.equal(logits(model.eval()), logits(source))
