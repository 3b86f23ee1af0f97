"""ONNX files: what they compute and hold, in ONNX Runtime alone; what is refused, with nothing written."""

import json
import os
import subprocess
import sys
import textwrap

import backbones
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageClassification

from peft_heads.cli.main import main
from peft_heads.convert import onnx as convert_onnx
from peft_heads.convert.merged import export_merged
from peft_heads.convert.onnx import export_onnx


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
SIZE = 32
FAMILIES = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**backbones.VIT, num_labels=3)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**backbones.VIT, num_labels=3)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        # images are smaller than those of the configuration, as with the published checkpoints
        transformers.Dinov2Config(**{**_without("intermediate_size"), "image_size": 64}, num_labels=3)
    ),
    "beit": lambda: transformers.BeitForImageClassification(
        transformers.BeitConfig(**backbones.VIT, use_relative_position_bias=True, num_labels=3)
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(**backbones.SWIN, patch_size=4, num_labels=3)
    ),
    "clip": lambda: transformers.CLIPForImageClassification(
        transformers.CLIPConfig(vision_config=backbones.VIT, text_config=backbones.TEXT, num_labels=3)
    ),
    "siglip": lambda: transformers.SiglipForImageClassification(
        transformers.SiglipConfig(vision_config=backbones.VIT, text_config=backbones.TEXT, num_labels=3)
    ),
}


def _without(name):
    return {key: value for key, value in backbones.VIT.items() if key != name}


def save(folder, name="vit"):
    """Save a tiny classifier, none of whose parameters is zero, with its image processor; return the folder."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for param in model.parameters():
        param.data += 0.2 * torch.randn_like(param)
    model.config.id2label = {0: "ant", 1: "bee", 2: "Käfer"}
    model.save_pretrained(folder)
    tiny.ViTProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def run(path, pixel_values):
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tmp_path):
    if name == "beit" and tiny.VERSION.major < 5:
        pytest.skip("the attention of BEiT is chosen when the model is built, and torch cannot export the fused one")
    folder = save(tmp_path / "model", name)
    written = export_onnx(folder, tmp_path / "model.onnx")
    assert written.files == [tmp_path / "model.onnx"] and sorted(os.listdir(tmp_path)) == ["model", "model.onnx"]
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(7, 3, SIZE, SIZE)
    for size in (1, 3, 7):
        with torch.no_grad():
            expected = model(images[:size]).logits
        np.testing.assert_allclose(run(written.path, images[:size]), expected, rtol=0, atol=2e-5)
    assert b"site-packages" not in written.path.read_bytes()  # no paths of the machine
    assert 0 < written.error < convert_onnx.TIMES_ROUNDING * written.rounding < 1e-4
    print(f"{name}: {written.error / written.rounding:.2f} times the rounding")


ALONE = """
import builtins, json, sys
blocked = ("peft_heads", "torch", "transformers")
real = builtins.__import__
def no_import(name, *args, **kwargs):
    if name.partition(".")[0] in blocked:
        raise ImportError(name)
    return real(name, *args, **kwargs)
builtins.__import__ = no_import
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
found = session.get_modelmeta().custom_metadata_map
labels, how = json.loads(found["id2label"]), json.loads(found["image_processor"])
image = Image.open(sys.argv[2]).convert("RGB")
image = image.resize((how["size"]["width"], how["size"]["height"]), how["resample"])
pixels = np.asarray(image, np.float32) * how["rescale_factor"]
pixels = (pixels - np.float32(how["image_mean"])) / np.float32(how["image_std"])
logits = session.run(["logits"], {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
shares = np.exp(logits - logits.max())
print(json.dumps({labels[str(i)]: float(share) for i, share in enumerate(shares / shares.sum())}))
assert not [name for name in blocked if name in sys.modules] and found["peft_heads_version"]
"""


@pytest.mark.slow
def test_onnx_runtime_alone(tmp_path, capsys):
    """The metadata suffices, in a process that can import neither this package nor torch nor transformers."""
    save(tmp_path / "model")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", str(tmp_path / "model.onnx")]) == 0
    printed = capsys.readouterr()
    size = (tmp_path / "model.onnx").stat().st_size
    assert f"{size:>13,} bytes  model.onnx\nchecked in batches of 1, 2, 5: float32 logits differ" in printed.out
    assert printed.err == ""
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    words = [sys.executable, "-c", textwrap.dedent(ALONE), str(tmp_path / "model.onnx"), str(tmp_path / "a.png")]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    words = ["predict", str(tmp_path / "model"), str(tmp_path / "a.png"), "--top_k=9", "--format=json", "--device=cpu"]
    assert main(words) == 0
    expected = json.loads(capsys.readouterr().out)[0]["predictions"]
    assert {x["label"] for x in expected} == found.keys() == {"ant", "bee", "Käfer"}
    for x in expected:
        assert found[x["label"]] == pytest.approx(x["probability"], abs=1e-4)


@pytest.mark.slow
def test_a_second_file_for_much(tmp_path, monkeypatch):
    """Above the limit there are two files, which are replaced together; below it an old second one goes."""
    folder, target = save(tmp_path / "model"), tmp_path / "out" / "model.onnx"
    monkeypatch.setattr(convert_onnx, "ONE_FILE", 10_000)
    written = export_onnx(folder, target)
    assert written.files == [target, target.with_name("model.onnx.data")]
    assert sorted(os.listdir(target.parent)) == ["model.onnx", "model.onnx.data"]
    # small tensors stay in the first
    assert written.files[1].stat().st_size > 0.8 * (folder / "model.safetensors").stat().st_size
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = run(target, images)
    written.files[1].rename(tmp_path / "away")
    with pytest.raises(Exception, match="model.onnx.data"):
        run(target, images)
    target.unlink()
    (tmp_path / "away").rename(written.files[1])
    with pytest.raises(ValueError, match="model.onnx.data exists already"):
        export_onnx(folder, target)
    monkeypatch.setattr(convert_onnx, "ONE_FILE", 2**40)
    assert export_onnx(folder, target, overwrite=True).files == [target]
    assert os.listdir(target.parent) == ["model.onnx"]
    np.testing.assert_allclose(run(target, images), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_another_model_is_refused(tmp_path, monkeypatch, capsys):
    """GELU by its tanh formula, which is nearly the same, is an error; the old file stays."""
    folder, target = save(tmp_path / "model"), tmp_path / "model.onnx"
    target.write_text("old")
    trace = convert_onnx.trace

    def wrong(model, pixel_values):
        for module in model.modules():
            if hasattr(module, "intermediate_act_fn") or hasattr(module, "activation_fn"):
                name = "intermediate_act_fn" if hasattr(module, "intermediate_act_fn") else "activation_fn"
                exact = getattr(module, name)
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
                changed.append((module, name, exact))
        program = trace(model, pixel_values)
        for module, name, exact in changed:
            setattr(module, name, exact)
        return program

    changed = []
    monkeypatch.setattr(convert_onnx, "trace", wrong)
    capsys.readouterr()
    assert main(["export", str(folder), "--to", "onnx", str(target), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert changed and error.count("\n") == 1
    assert "the exported ViTForImageClassification is not the model: in ONNX Runtime its logits differ" in error
    assert target.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["model", "model.onnx"]


@pytest.mark.slow
def test_what_torch_cannot_export(tmp_path, monkeypatch):
    folder = save(tmp_path / "model")

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits if pixel_values.sum() > 0 else None

    monkeypatch.setattr(convert_onnx._Logits, "forward", forward)
    with pytest.raises(
        ValueError, match="torch .* cannot export a ViTForImageClassification to ONNX: GuardOnData"
    ) as caught:
        export_onnx(folder, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["model"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("onnx") / "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "{tmp}"], "{tmp} is a folder; expected a file, such as {tmp}/model.onnx"),
        (["{model}", "{tmp}/a.bin"], "{tmp}/a.bin must end in .onnx"),
        (["{model}", "{tmp}/there.onnx"], "{tmp}/there.onnx exists already and nothing was changed; --overwrite"),
        (["{model}", "{tmp}/a.onnx", "--int8=static"], "--int8 static and --calibration FOLDER"),
        (["{model}", "{tmp}/a.onnx", "--calibration={tmp}"], "--int8 static and --calibration FOLDER"),
        (["{model}", "{tmp}/a.onnx", "--int8=static", "--calibration={tmp}/no"], "no folder of images {tmp}/no"),
        (["{model}", "{tmp}/a.onnx", "--int8=static", "--calibration={tmp}/none"], "{tmp}/none holds no images"),
        (["{model}", "{tmp}/a.onnx", "--eval_dir={tmp}"], "--eval_dir is for the comparison of int8"),
        (
            ["{model}", "{tmp}/a.onnx", "--int8=dynamic", "--eval_dir={tmp}/images"],
            "expected one folder per class (ant, bee, Käfer) with its images in it; images lie in images",
        ),
        (["{model}", "{tmp}/a.onnx", "--base_model=x"], "{model} is a whole checkpoint: --base_model goes with"),
        (["{tmp}/none", "{tmp}/a.onnx"], "{tmp}/none holds neither an adapter (adapter_config.json) nor a checkpoint"),
        (["{tmp}/there.onnx", "{tmp}/a.onnx"], "{tmp}/there.onnx is a file; expected the folder of an adapter"),
        (["{tmp}/missing", "{tmp}/a.onnx"], "no adapter '{tmp}/missing'"),
        (["{tmp}/bare", "{tmp}/a.onnx"], "{tmp}/bare has no image processor that can be read"),
    ],
)
def test_refused(words, message, model, tmp_path, capsys):
    (tmp_path / "there.onnx").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    if "{tmp}/bare" in words:
        AutoModelForImageClassification.from_pretrained(model).save_pretrained(tmp_path / "bare")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(model=model, tmp=tmp_path) for word in words]
    capsys.readouterr()
    assert main(["export", words[0], "--to", "onnx", *words[1:]]) == 2
    error = capsys.readouterr().err
    assert message.format(model=model, tmp=tmp_path) in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_packages(model, tmp_path, monkeypatch):
    from peft_heads.inference import onnx_file

    found = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_file.importlib.util, "find_spec", lambda name: None if name in ("onnx", "onnxruntime") else found(name)
    )
    with pytest.raises(ValueError, match=r"this needs onnx, onnxruntime: pip install 'peft-heads\[onnx\]'"):
        export_onnx(model, tmp_path / "a.onnx")


def test_options_of_onnx_alone(tmp_path, capsys):
    assert main(["export", "x", "--to", "merged", str(tmp_path / "a"), "--int8=dynamic"]) == 2
    assert "--int8 goes with --to onnx, not with --to merged" in capsys.readouterr().err


def test_no_export_of_an_incomplete_checkpoint(model, tmp_path):
    whole = AutoModelForImageClassification.from_pretrained(model)
    whole.base_model.save_pretrained(tmp_path / "headless")
    with pytest.raises(
        ValueError, match="no complete image classifier: classifier.bias, classifier.weight are missing"
    ):
        export_onnx(tmp_path / "headless", tmp_path / "a.onnx")


def test_merged_refuses_a_checkpoint(model, tmp_path):
    """Only ONNX is made of checkpoints."""
    with pytest.raises(ValueError, match="holds no adapter"):
        export_merged(model, tmp_path / "merged")
