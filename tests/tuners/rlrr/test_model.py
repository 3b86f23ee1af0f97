import copy
import json
import re

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft_heads import (
    HeadScorer,
    RLRRConfig,
    TaylorHeadScorer,
    get_head_masks,
    load_image_classifier,
    set_head_masks,
    set_image_processor,
)
from peft_heads.demo.model import load_demo_processor


VTAB_CLASSES = 49.5  # average over the tasks of VTAB-1K


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.images()).logits


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "rlrr_" in name:
            param.data += 0.2 * torch.randn(param.shape, generator=generator)


# How much is trained


def vit(**sizes):
    return ViTForImageClassification, ViTConfig(num_labels=2, **sizes)


@pytest.mark.parametrize(
    ("model", "width", "ours", "paper"),
    [
        (vit(), 768, 0.327, 0.33),
        (
            vit(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
            1024,
            0.817,
            0.82,
        ),
        (
            vit(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14),
            1280,
            1.338,
            1.33,
        ),
        (
            (SwinForImageClassification, SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])),
            1024,
            0.426,
            0.41,
        ),
    ],
    ids=["ViT-B/16", "ViT-L/16", "ViT-H/14", "Swin-B"],
)
def test_trained_parameters(model, width, ours, paper):
    """In millions, with the classifier of an average task, beside the paper's (Swin's fits one s_in on a fused qkv)."""
    model_class, config = model
    with torch.device("meta"):
        base = model_class(config)
    adapted = get_peft_model(base, RLRRConfig(), low_cpu_mem_usage=True)
    count = sum(p.numel() for n, p in adapted.named_parameters() if p.requires_grad and "rlrr_" in n)
    millions = (count + VTAB_CLASSES * (width + 1)) / 1e6
    assert round(millions, 3) == ours
    assert abs(millions - paper) < 0.02


def test_what_is_trained_per_block():
    """Counted by hand: out + in + out per matrix, two per channel of the norms and the patch embedding."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig(modules_to_save=[]))
    block = 4 * (24 + 24 + 24) + (32 + 24 + 32) + (24 + 32 + 24) + 2 * 2 * 24
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * block + 2 * 24 + 2 * 24


def test_the_variant_without_weight_is_lora():
    """`W' = W + S_out S_in` is stock LoRA of that rank with alpha = r and a bias."""
    targets = tiny.now(["q_proj", "v_proj", "fc1"])
    ours = get_peft_model(
        tiny.make("vit"), RLRRConfig(r=3, rescale_weight=False, target_modules=targets, modules_to_save=[])
    )
    randomize(ours)
    stock = get_peft_model(tiny.make("vit"), LoraConfig(r=3, lora_alpha=3, target_modules=targets, lora_bias=True))
    for name, layer in stock.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            mine = ours.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.data = mine.rlrr_right["default"].data
            layer.lora_B["default"].weight.data = mine.rlrr_left["default"].data
            layer.lora_B["default"].bias.data = mine.rlrr_shift["default"].data
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(ours.merge_and_unload()), logits(stock.merge_and_unload()), rtol=1e-5, atol=1e-6)


def test_a_trained_base_weight_has_a_gradient():
    """A weight that the user unfreezes is trained as well."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig())
    layer = next(m for m in model.modules() if hasattr(m, "rlrr_left") and "default" in m.rlrr_left)
    layer.base_layer.weight.requires_grad_(True)
    model(**tiny.batch()).loss.backward()
    assert layer.base_layer.weight.grad.any() and layer.rlrr_left["default"].grad.any()


def test_weight_decay_pulls_towards_the_pre_trained_model():
    """With zeros for all trained parameters the model is the checkpoint, whatever an optimizer exempts by name."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig())
    for name, param in model.named_parameters():
        if "rlrr_" in name:
            param.data.zero_()
    torch.testing.assert_close(logits(model), logits(tiny.make("vit")))


def test_hooks_of_the_frozen_layer_are_called():
    """They see the adapted layer's output, and their changes take effect."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig())
    randomize(model)
    expected, seen = logits(model), []
    layers = [m for m in model.modules() if hasattr(m, "rlrr_left") and not isinstance(m.base_layer, torch.nn.Conv2d)]
    assert {type(layer).__name__ for layer in layers} == {"RLRRLinear", "RLRRScale"}
    handles = [layer.base_layer.register_forward_hook(lambda m, args, out: seen.append(out)) for layer in layers]
    torch.testing.assert_close(logits(model), expected)
    assert len(seen) == len(layers)
    model(**tiny.batch()).loss.backward()
    grads = {name: grad.clone() for name, grad in tiny.gradients(model).items()}
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model(**tiny.batch()).loss.backward()
    for name, grad in tiny.gradients(model).items():
        torch.testing.assert_close(grad, grads[name], msg=name)
    heard = []
    handle = layers[0].base_layer.register_full_backward_hook(lambda m, of_input, of_output: heard.append(m))
    model(**tiny.batch()).loss.backward()
    assert heard == [layers[0].base_layer]
    handle.remove()
    layers[-1].base_layer.register_forward_hook(lambda m, args, out: 0 * out)
    assert not torch.allclose(logits(model), expected)


@pytest.mark.parametrize("patch_embedding", [True, False])
def test_an_image_by_itself(patch_embedding):
    """An image without a batch dimension works, as in torch.nn.Conv2d."""
    model = get_peft_model(
        tiny.make("vit"), RLRRConfig(patch_embedding=patch_embedding, target_modules=["projection"])
    )
    randomize(model)
    layer = next(module for module in model.modules() if hasattr(module, "rlrr_left"))
    assert type(layer).__name__ == ("RLRRScale" if patch_embedding else "RLRRConv2d")
    image = torch.randn(3, 8, 8)
    torch.testing.assert_close(layer(image), layer(image[None])[0])
    layer(image).sum().backward()
    assert layer.rlrr_shift["default"].grad is not None


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("target", ["fc1", "projection"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_tracing(target, gradients):
    """Traces of exporters hold no autograd function, with or without `no_grad`."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig(target_modules=tiny.now([target]), patch_embedding=False))
    randomize(model)
    layer = next(module for module in model.modules() if hasattr(module, "rlrr_left"))
    x = torch.randn(2, layer.in_features) if target == "fc1" else torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(layer, x)
        torch.testing.assert_close(traced(2 * x), layer(2 * x))
    assert "PythonOp" not in str(traced.graph)


def test_safe_merge_changes_nothing_if_it_would_write_nan():
    model = get_peft_model(tiny.make("vit"), RLRRConfig(target_modules=tiny.now(["fc1"])))
    layer = next(module for module in model.modules() if hasattr(module, "rlrr_left"))
    layer.rlrr_left["default"].data[3] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weight"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    model.merge_adapter()
    assert layer.base_layer.weight[3].isnan().all()


def test_unmerging_what_is_not_merged():
    model = get_peft_model(tiny.make("vit"), RLRRConfig(target_modules=tiny.now(["fc1"])))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_weights_that_are_not_there():
    """ZeRO 3 and offloading pass the weights only to the frozen layer."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig())
    layer = model.get_base_model().get_submodule(tiny.now("vit.layers.0.mlp.fc1"))
    layer.base_layer.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO 3 of DeepSpeed keeps in parts; use ZeRO 1 or 2"):
        logits(model)
    layer.base_layer.to("meta")
    with pytest.raises(ValueError, match="load the model without offloading"):
        logits(model)


# Files


def test_files_beside_the_weights(tmp_path):
    tiny.make("vit", num_labels=5).save_pretrained(tmp_path / "base")
    names = {0: "cat", 1: "dog", 2: "eel"}
    base = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", id2label=names, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, RLRRConfig(ne=1))
    randomize(model)
    set_head_masks(model, tiny.masks_off(model, 4))
    processor = load_demo_processor()
    processor.size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    set_image_processor(model, processor)
    model.save_pretrained(tmp_path / "adapter")

    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "# RLRR adapter for" in card and "Residual low-rank rescaling of the weights of" in card
    assert "head 4 of 6 in all 4 projections" in card and "| `rescale_weight` | True |" in card
    assert re.search(r"tags:\n(- .*\n)*- rlrr\n", card) and "LoRA" not in card
    assert json.loads((tmp_path / "adapter" / "labels.json").read_text())["id2label"]["1"] == "dog"
    loaded, _ = load_image_classifier(tmp_path / "adapter")
    assert loaded.config.id2label == names and torch.equal(logits(loaded), logits(model))
    by_peft = PeftModel.from_pretrained(tiny.make("vit", num_labels=5), tmp_path / "adapter")  # of another size
    assert by_peft.config.id2label == names and torch.equal(logits(by_peft).isfinite(), logits(model).isfinite())
    # labels follow the active adapter
    loaded.add_adapter("other", RLRRConfig(modules_to_save=[]))
    loaded.set_adapter("other")
    assert len(loaded.config.id2label) == 3
    with loaded.disable_adapter():
        pass


def test_a_card_without_heads(tmp_path):
    model = get_peft_model(tiny.make("vit"), RLRRConfig())
    model.save_pretrained(tmp_path)
    assert "None: with `ne=0` this is plain RLRR." in (tmp_path / "README.md").read_text()
    model = get_peft_model(tiny.make("vit"), RLRRConfig(ne=1))
    with pytest.warns(UserWarning, match="none has been selected: it is plain RLRR so far"):
        model.save_pretrained(tmp_path)


def edit(folder, **changes):
    tensors = load_file(folder / "adapter_model.safetensors")
    for suffix, value in changes.items():
        key = next(key for key in tensors if key.endswith(suffix))
        tensors[key] = value(tensors[key])
        if tensors[key] is None:
            del tensors[key]
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rlrr_left": torch.ones_like},
            r"contradicts itself: in .* deactivates heads \[2\] of .*; the deactivated rows of rlrr_left must be zero, but",
        ),
        (
            {"rlrr_shift": torch.ones_like},
            "the deactivated rows of rlrr_shift must be zero, but 4 of 4 entries are not",
        ),
    ],
)
def test_edited_files(changes, message, tmp_path):
    model = get_peft_model(tiny.make("vit"), RLRRConfig(ne=1, target_modules=tiny.now(["q_proj", "v_proj"])))
    randomize(model)
    set_head_masks(model, tiny.masks_off(model, 2))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    left = next(value for key, value in saved.items() if key.endswith("rlrr_left"))
    assert not left[8:12].any() and left[:8].all()  # zeros are written over any values
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)


def test_masks_of_another_model(tmp_path):
    names = tiny.now(["q_proj", "v_proj"])
    model = get_peft_model(tiny.make("swin"), RLRRConfig(ne=1, target_modules=names, modules_to_save=[]))
    with pytest.warns(UserWarning, match="none has been selected"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its masks are those of swin\..*adapter of another model\?"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path)


def test_a_mask_that_has_no_place(tmp_path):
    model = get_peft_model(tiny.make("vit"), RLRRConfig(ne=1))
    set_head_masks(model, tiny.masks_off(model, 2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="carries no mask there: it was created with ne=0"):
        PeftModel.from_pretrained(tiny.make("vit"), tmp_path, config=RLRRConfig())


# Several adapters


def test_adapters_that_cannot_be_combined():
    model = get_peft_model(tiny.make("vit"), RLRRConfig(modules_to_save=[]))
    model.add_adapter("rank 2", RLRRConfig(r=2, modules_to_save=[]))
    model.add_adapter("with head", RLRRConfig())
    model.add_adapter("another head", RLRRConfig())
    for adapters, message in (
        (["default", "nobody"], "Adapter nobody does not exist"),
        (["default", "rank 2"], "adapters with different r cannot be combined: {'default': 1, 'rank 2': 2}"),
        (["with head", "another head"], "same module with modules_to_save: .*classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(adapters, [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="one weight per adapter"):
        model.add_weighted_adapter(["default"], [1.0, 1.0], "sum")
    for weight in ("1", float("nan"), torch.ones(2)):
        with pytest.raises(ValueError, match="weights must be finite numbers"):
            model.add_weighted_adapter(["default"], [weight], "sum")
    assert "sum" not in model.peft_config


def test_a_sum_of_one_is_the_adapter(tmp_path):
    """This includes norms, whose changes are summed; and the sum can be saved."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig(modules_to_save=[], ne=1))
    randomize(model)
    set_head_masks(model, tiny.masks_off(model, 2))
    expected = logits(model)
    model.add_weighted_adapter(["default"], torch.ones(1), "same")
    model.set_adapter("same")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["same"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.make("vit"), tmp_path / "same")), expected)


def test_a_sum_has_all_modules_of_its_summands_and_the_one_trained_head():
    names = tiny.now(["q_proj", "v_proj"])
    one = RLRRConfig(target_modules=names[:1], modules_to_save=[], exclude_modules=tiny.now(["0.attention.q_proj"]))
    model = get_peft_model(tiny.make("vit"), one)
    model.add_adapter("other", RLRRConfig(target_modules=names[1:]))
    randomize(model)
    head = model.get_base_model().classifier.modules_to_save["other"]
    head.weight.data.normal_()
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    summed = {name for name, p in model.named_parameters() if ".sum" in name}
    assert len([name for name in summed if "rlrr_left" in name]) == 1 + 2
    assert torch.equal(model.get_base_model().classifier.modules_to_save["sum"].weight, head.weight)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)
    model.set_adapter("sum")
    assert all(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)


def test_unknown_adapter_in_a_mixed_batch():
    model = get_peft_model(tiny.make("vit"), RLRRConfig()).eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(tiny.images(), adapter_names=["nobody"] * 4)
    model.add_adapter("headless", RLRRConfig(modules_to_save=[]))
    with pytest.raises(ValueError, match=r"all train classifier, but 'headless' does not \(those that do: default\)"):
        model(tiny.images(), adapter_names=["default", "headless"] * 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(tiny.images(), adapter_names=["default"] * 4)


def test_disabled_adapters_are_disabled_in_a_mixed_batch_as_well():
    model = get_peft_model(tiny.make("vit"), RLRRConfig(modules_to_save=[])).eval()
    model.add_adapter("other", RLRRConfig(modules_to_save=[]))
    model.base_model.disable_adapter_layers()
    with torch.no_grad():
        mixed = model(tiny.images(), adapter_names=["default", "other"] * 2).logits
    assert torch.equal(mixed, logits(tiny.make("vit")))


def test_a_second_adapter_on_half_precision_is_not_trained():
    model = get_peft_model(tiny.make("vit").to(torch.bfloat16), RLRRConfig())
    model.add_adapter("other", RLRRConfig())
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained and not any(".other" in name for name in trained)


def test_other_heads_are_kept_apart():
    model = get_peft_model(tiny.make("vit"), RLRRConfig(ne=1))
    with pytest.raises(ValueError, match="created with ne=0"):
        model.add_adapter("plain", RLRRConfig())
        set_head_masks(model, tiny.masks_off(model, 2), "plain")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        set_head_masks(model, tiny.masks_off(model, 2))


# Trainer


def rows_off(model):
    return {name: (~mask).nonzero().flatten().tolist() for name, mask in get_head_masks(model).items()}


def test_taylor_scores_and_resume(tmp_path):
    """Deactivated rows no longer move after the selection, and a resumed run ends where the whole one does."""

    def trainer(folder):
        torch.manual_seed(0)
        model = get_peft_model(tiny.make("vit"), RLRRConfig(ne=2, init="zero"))
        args = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=8,
            num_train_epochs=3,
            learning_rate=1e-2,
            weight_decay=0.1,
            save_strategy="steps",
            save_steps=2,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            label_names=["labels"],
        )
        return Trainer(model, args, train_dataset=tiny.examples(), callbacks=[TaylorHeadScorer(select_at=6)])

    whole = trainer("whole")
    whole.train()
    off = rows_off(whole.model)
    assert len({str(heads) for heads in off.values()}) == 1 and len(off) == 4
    assert all(len(heads) == 2 for heads in off.values())
    for name, heads in off.items():
        layer = whole.model.get_base_model().get_submodule(name)
        rows = [4 * head + i for head in heads for i in range(4)]
        for param in layer.head_parameters("default"):
            assert not param[rows].any() and param.any()
            states = [s for s in whole.optimizer.state[param].values() if s.shape == param.shape]
            assert len(states) == 2 and not any(state[rows].any() for state in states)
    report = json.loads((tmp_path / "whole" / "head_scores.json").read_text())
    assert report["deactivated_heads"] == off
    for step in (4, 8):  # before and after the selection
        resumed = trainer(f"resumed {step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert rows_off(resumed.model) == off
        assert torch.equal(logits(resumed.model), logits(whole.model))


def test_the_score_is_what_the_protocol_says():
    """The score is p·g over a head's rows of S_out and entries of f, with gradients from autograd."""
    model = get_peft_model(tiny.make("vit"), RLRRConfig(ne=1))
    randomize(model)
    scorer = HeadScorer(model)
    model(**tiny.batch()).loss.backward()
    scorer.update()
    scores = scorer.scores("positive")
    assert set(scores) == set(tiny.masks_off(model))
    for name, score in scores.items():
        layer = model.get_base_model().get_submodule(name)
        products = [
            (p.detach() * p.grad).double().reshape(24, -1).sum(1)
            for p in (layer.rlrr_left["default"], layer.rlrr_shift["default"])
        ]
        torch.testing.assert_close(score, sum(products).reshape(6, 4).sum(1))


def test_scores_are_the_gates_derivatives():
    """With a gate of 1 on a head's S_out and f, the derivative of the loss is the score."""
    model = get_peft_model(tiny.make("vit").double(), RLRRConfig(ne=1, init="normal")).eval()
    randomize(model)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny.batch().items()}
    scorer = HeadScorer(model)
    model(**batch).loss.backward()
    scorer.update()
    name, scores = next(iter(scorer.scores("positive").items()))
    scorer.close()
    layer = model.get_base_model().get_submodule(name)
    head, step = slice(8, 12), 1e-4
    losses = []
    for gate in (1 + step, 1 - step):
        other = copy.deepcopy(layer.state_dict())
        with torch.no_grad():
            for param in layer.head_parameters("default"):
                param[head] *= gate
            losses.append(model(**batch).loss.item())
        layer.load_state_dict(other)
    assert scores[2].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3)
