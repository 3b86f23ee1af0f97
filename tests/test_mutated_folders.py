"""Mutated adapter folders: each loads exactly, or is refused by one line of ours, quickly and with little memory."""

import json
import os
import resource
import shutil
import time
import warnings

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from peft_heads import (
    HeadMaskedLoraConfig,
    RLRRConfig,
    get_head_masks,
    load_image_classifier,
    pack_adapter,
    set_head_masks,
)
from peft_heads.cli.errors import raised_by_this_package
from peft_heads.convert.inspect import inspect_adapter


SECONDS, BYTES = 5, 2**30
LONG = "a" * 1001
# Each base folder: its configuration, and whether it is packed.
CONFIGS = {
    "masked": HeadMaskedLoraConfig(ne=1, r=2, rank_pattern={tiny.now("v_proj"): 3}),
    "silent heads": HeadMaskedLoraConfig(ne=1, r=2, mask_scope="head", lora_bias=True),
    "dora": HeadMaskedLoraConfig(ne=1, r=2, use_dora=True, granularity="layer"),
    "plain": HeadMaskedLoraConfig(ne=0, r=2, bias="all"),
    "bits": HeadMaskedLoraConfig(ne=1, r=2, adapter_bits=2, classifier_bits=1),
    "packed": HeadMaskedLoraConfig(ne=1, r=2, adapter_bits=1, classifier_bits=2),
    "rlrr": RLRRConfig(ne=1),
    "rlrr left": RLRRConfig(right=False, norms=False),
    "rlrr lora": RLRRConfig(r=2, rescale_weight=False),
}
DELETE = object()
# Wrong values for any field; then values of single fields that contradict the weights.
WRONG = (DELETE, None, "x", -1, 10**9, 0.5, [], {"a": "b"}, True)
OTHER = {
    "r": [1, 3, 2_000_000, 10**30, 0, float("nan")],
    "ne": [0, 2, 100, 1.5],
    "ratio": [0.0, 0.5, 2.0],
    "num_heads": [1, 3, 5, {"q_proj": 3}, {LONG: 2}, {"(": 2}],
    "mask_scope": ["adapter", "head"],
    "adapter_bits": [1, 2, 4, 8, 32, 3],
    "classifier_bits": [1, 2, 32],
    "use_dora": [True, False],
    "lora_bias": [True, False],
    "bias": ["none", "all", "lora_only"],
    "packed": [True, False],
    "fused_parts": ["qkv", "k"],
    "target_modules": [["nothing"], "(", LONG, [LONG], "all-linear", ["classifier"], tiny.now(["q_proj"])],
    "exclude_modules": [tiny.now(["v_proj"]), LONG],
    "modules_to_save": [["classifier", "pooler"], ["layernorm"], "classifier"],
    "layers_to_transform": [0, [0], [7], ["0"]],
    "rank_pattern": [{}, {".*": 9}, {tiny.now("v_proj"): 2_000_000}, {tiny.now("v_proj"): "3"}, {LONG: 1}],
    "alpha_pattern": [{".*": "x"}, {"(": 1}],
    "peft_type": ["LORA", "RLRR", "HEAD_MASKED_LORA", "NONE"],
    "auto_mapping": [
        {"base_model_class": name, "parent_library": "transformers"}
        for name in ("pipeline", "AutoTokenizer", "ViTConfig", "os", "Trainer", 5)
    ],
    "left": [True, False],
    "right": [True, False],
    "residual": [True, False],
    "rescale_weight": [True, False],
    "norms": [True, False],
    "patch_embedding": [True, False],
    "shift_without_bias": [True, False],
    "init": ["zero", "constant", "other"],
    "use_qalora": [True],
    "init_lora_weights": ["loftq", "other", False],
}
# These leave no trace in the tensors; only values of a wrong type are wrong.
UNSEEN = {"use_rslora", "lora_alpha", "alpha_pattern"}


def make_base():
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=8,
            image_size=8,
            patch_size=4,
            num_labels=3,
            id2label={0: "ant", 1: "bee", 2: "cat"},
        )
    )


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model.eval()(pixel_values=IMAGES).logits


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Look for base models that are no folders only in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make `{name: (folder of the adapter, its logits)}`, with the base model beside."""
    root = tmp_path_factory.mktemp("folders")
    make_base().save_pretrained(root / "base")
    tiny.ViTProcessor(size={"height": 8, "width": 8}).save_pretrained(root / "base")
    made = {}
    for index, (name, config) in enumerate(CONFIGS.items()):
        model = get_peft_model(ViTForImageClassification.from_pretrained(root / "base"), config)
        generator = torch.Generator().manual_seed(index)
        for key, param in model.named_parameters():
            if any(part in key for part in ("lora_", "rlrr_", "modules_to_save")) and "magnitude" not in key:
                param.data.normal_(std=0.5, generator=generator)
        if config.masks_heads:
            set_head_masks(model, {key: torch.arange(4) != 1 for key in get_head_masks(model)})
        if name == "packed":
            pack_adapter(model)
        model.save_pretrained(root / name)
        shutil.copy(root / "base" / "preprocessor_config.json", root / name)
        made[name] = root / name, logits(model)
    return made


def field_mutants():
    """Yield `(folder, field, value)`: a wrong value for every field of every configuration, and some by hand."""
    for name, config in CONFIGS.items():
        options = json.loads(json.dumps(config.to_dict(), default=sorted))
        for index, option in enumerate(options):
            # all wrong values for one folder of each method, otherwise one value for each field in rotation
            chosen = WRONG if name in ("masked", "rlrr") else (WRONG[index % len(WRONG)],)
            for value in (*chosen, *OTHER.get(option, ())):
                yield name, option, value


def set_field(folder, option, value):
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings.pop(option, None) if value is DELETE else settings.update({option: value})
    path.write_text(json.dumps(settings))


TENSORS = {
    "dropped": lambda tensors, key: tensors.pop(key),
    "renamed": lambda tensors, key: tensors.update({key.replace("weight", "wait") + "2": tensors.pop(key)}),
    "of another layer": lambda tensors, key: tensors.update({key.replace(".0.", ".7."): tensors[key].clone()}),
    "integers": lambda tensors, key: tensors.update({key: tensors[key].int()}),
    "bool": lambda tensors, key: tensors.update({key: tensors[key].bool()}),
    "bytes": lambda tensors, key: tensors.update({key: tensors[key].to(torch.uint8)}),
    "longer": lambda tensors, key: tensors.update({key: torch.cat([tensors[key], tensors[key][:1]])}),
    "flat": lambda tensors, key: tensors.update({key: tensors[key].flatten()}),
    "empty": lambda tensors, key: tensors.update({key: tensors[key][:0]}),
    "another dimension": lambda tensors, key: tensors.update({key: tensors[key][None]}),
    "a number": lambda tensors, key: tensors.update({key: tensors[key].flatten()[0].clone()}),
    "inverted": lambda tensors, key: tensors.update({key: ~tensors[key]} if tensors[key].dtype == torch.bool else {}),
}
ADDED = {
    "frozen weight": "base_model.model.{layer}mlp.fc1.weight",
    "frozen weight of a target": "base_model.model.{layer}attention.q_proj.base_layer.weight",
    "frozen bias of a target": "base_model.model.{layer}attention.q_proj.bias",
    "frozen norm": "base_model.model.vit.layernorm.weight",
    "another parameter": "base_model.model.{layer}attention.q_proj.lora_magnitude_vector",
    "bias": "base_model.model.{layer}attention.q_proj.lora_B.bias",
    "another method's": "base_model.model.{layer}attention.q_proj.rlrr_left",
    "another target": "base_model.model.{layer}mlp.fc2.lora_A.weight",
    "another head": "base_model.model.pooler.weight",
    "no module": "base_model.model.nothing.weight",
    "original module": "base_model.model.classifier.original_module.weight",
    "trained head by its inner name": "base_model.model.classifier.modules_to_save.default.weight",
    "factor by its inner name": "base_model.model.{layer}attention.q_proj.lora_A.default.weight",
}


def tensor_mutants():
    for name in CONFIGS:
        for kind in TENSORS:
            for part in (
                "A",
                "B",
                "left",
                "right",
                "shift",
                "scale",
                "magnitude",
                "mask",
                "packed",
                "settings",
                "classifier",
            ):
                yield name, kind, part
        for kind in ADDED:
            yield name, "added", kind


def change_tensors(folder, kind, part):
    """Change the tensors; return False if there is nothing to change."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if kind == "added":
        key = tiny.now(ADDED[part].format(layer="vit.layers.0."))
        tensors[key] = torch.ones(8, 8)
    else:
        key = next((key for key in tensors if f"_{part}" in key or f".{part}." in key), None)
        if key is None:
            return False
        TENSORS[kind](tensors, key)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})
    return True


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def replace_by(name, make):
    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


def half(name):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def settings_with(text):
    """Replace the last brace of the configuration by the text."""
    return lambda folder: (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().rstrip().removesuffix("}") + text
    )


CONFIG, WEIGHTS, LABELS, PROCESSOR = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "labels.json",
    "preprocessor_config.json",
)
DEEP = b'{"id2label": ' + 100_000 * b"[" + 100_000 * b"]" + b"}"
FILES = {
    **{
        f"no {name}": lambda folder, name=name: (folder / name).unlink()
        for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)
    },
    **{f"empty {name}": write(name, b"") for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)},
    **{f"half of {name}": half(name) for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)},
    **{f"no text in {name}": write(name, b"\xff\xfe\x00{}") for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)},
    **{f"a list in {name}": write(name, b"[1]") for name in (CONFIG, LABELS, PROCESSOR)},
    **{f"null in {name}": write(name, b"null") for name in (CONFIG, LABELS, PROCESSOR)},
    **{f"deep {name}": write(name, DEEP) for name in (CONFIG, LABELS, PROCESSOR)},
    **{f"folder {name}": replace_by(name, os.mkdir) for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)},
    **{f"pipe {name}": replace_by(name, os.mkfifo) for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)},
    **{
        f"device {name}": replace_by(name, lambda path: path.symlink_to("/dev/zero"))
        for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)
    },
    **{
        f"broken link {name}": replace_by(name, lambda path: path.symlink_to("nowhere"))
        for name in (CONFIG, WEIGHTS, LABELS, PROCESSOR)
    },
    "link to itself": replace_by(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "pipe beside": lambda folder: os.mkfifo(folder / "other.json"),
    "deep field": settings_with(', "alpha_pattern": ' + 100_000 * "[" + 100_000 * "]" + "}"),
    "huge number": settings_with(', "r": 1' + 5000 * "0" + "}"),
    "huge configuration": lambda folder: os.truncate(folder / CONFIG, 2**34),
    "huge labels": lambda folder: os.truncate(folder / LABELS, 2**34),
    "gap in labels": write(LABELS, b'{"id2label": {"0": "a", "1": "b", "3": "c"}}'),
    "two labels": write(LABELS, b'{"id2label": {"0": "a", "1": "b"}}'),
    "no labels": write(LABELS, b'{"id2label": {}}'),
    "labels of another kind": write(LABELS, b'{"id2label": {"0": ["a"], "-1": "b", "2": "c"}}'),
    "processor with code": write(
        PROCESSOR, b'{"auto_map": {"AutoImageProcessor": "code.P"}, "image_processor_type": "P"}'
    ),
    "processor of the wrong type": write(PROCESSOR, b'{"image_processor_type": 5}'),
    "no processor": write(PROCESSOR, b'{"image_processor_type": "AutoModel"}'),
    "header of 2**60 bytes": write(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
    "weights that are a zip": write(WEIGHTS, b"PK\x03\x04" + bytes(100)),
    "a .bin of code": lambda folder: (
        (folder / WEIGHTS).unlink(),
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR."),
    ),
    "a .bin": lambda folder: (
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin"),
        (folder / WEIGHTS).unlink(),
    ),
    "a .bin beside": lambda folder: (folder / "adapter_model.bin").write_bytes(b"what nobody reads"),
    "float64": lambda folder: save_file(
        {k: v.double() if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS).items()},
        folder / WEIGHTS,
    ),
    "another file beside": write("notes.txt", b"mine"),
    "folder beside": lambda folder: (folder / "checkpoint-1").mkdir(),
}
LOADS = {
    "no labels",
    f"broken link {LABELS}",
    f"broken link {PROCESSOR}",
    "a .bin",
    "a .bin beside",
    "float64",
    "another file beside",
    "folder beside",
    f"no {LABELS}",
    f"no {PROCESSOR}",
}


def outcome(function, folder):
    """Return the result or the error; fail if it took too much time or memory, or if the error is not ours."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        return function(folder)
    except (ValueError, FileNotFoundError) as error:
        assert raised_by_this_package(error), repr(error)
        assert "\n" not in str(error) and str(folder) in str(error), str(error)
        return error
    finally:
        assert time.monotonic() - begin < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def load(folder):
    return logits(load_image_classifier(folder)[0])


def mutant(folders, tmp_path, name, change):
    """Load and inspect a changed copy (the same logits, or one line); return the outcome, None if unchanged."""
    folder = shutil.copytree(folders[name][0], tmp_path / "adapter")
    try:
        if change(folder) is False:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = outcome(load, folder)
            outcome(inspect_adapter, folder)
        if isinstance(loaded, torch.Tensor):
            assert torch.equal(loaded, folders[name][1]), (loaded - folders[name][1]).abs().max()
        return loaded
    finally:
        shutil.rmtree(folder)


def run_all(folders, tmp_path, mutants, change, step):
    """Try every `step`-th mutant; return a list of what went wrong."""
    faults, loaded, refused = [], 0, 0
    for number, (name, *details) in enumerate(mutants):
        if number % step:
            continue
        try:
            result = mutant(folders, tmp_path, name, lambda folder, details=details: change(folder, *details))
        except Exception as error:
            faults.append(f"{name} {[str(x)[:40] for x in details]}: {type(error).__name__}: {str(error)[:300]}")
            continue
        loaded += isinstance(result, torch.Tensor)
        refused += isinstance(result, Exception)
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
    return loaded, refused


def leaves_no_trace(name, option, value):
    """Whether the file could have been saved with the changed field, so that the change cannot be noticed.

    The file of a plain adapter records no settings, like all files of earlier versions, so a claim of few bits is
    believed. A packed file with the mask scope "adapter" records none either, to save bytes.
    """
    if option == "mask_scope" and name == "packed":
        return value == "head"
    if option in ("adapter_bits", "classifier_bits"):
        return name == "plain" and value in (1, 2, 4, 8) and value is not True
    return option in UNSEEN and not isinstance(value, (str, list))


def seen_fields():
    return [m for m in field_mutants() if not leaves_no_trace(*m)]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 13])
def test_fields(folders, tmp_path, step):
    loaded, refused = run_all(folders, tmp_path, seen_fields(), set_field, step)
    assert loaded > 20 and refused > 20


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_tensors(folders, tmp_path, step):
    _, refused = run_all(folders, tmp_path, tensor_mutants(), change_tensors, step)
    assert refused > 40


@pytest.mark.parametrize("kind", FILES)
def test_files(folders, tmp_path, kind):
    result = mutant(folders, tmp_path, "masked", FILES[kind])
    assert isinstance(result, torch.Tensor if kind in LOADS else Exception)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_nobody_has_changed(folders, tmp_path, name):
    assert isinstance(mutant(folders, tmp_path, name, lambda folder: None), torch.Tensor)
    model = PeftModel.from_pretrained(make_base(), folders[name][0])
    assert torch.equal(logits(model), folders[name][1])
