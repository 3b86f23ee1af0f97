"""An image classifier as an ONNX file, checked against PyTorch, with its labels and preprocessing in it."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._compat.onnx import quiet_export
from ..adapter_folder.atomic import new_files
from ..adapter_folder.settings import read_settings
from ..image_classifier import fetch_adapter, load_checkpoint, processor_of
from ..inference.classifiers import is_checkpoint
from ..inference.onnx_file import INPUT, OUTPUT, SUFFIX, check_packages, metadata, open_session, run_session
from .int8 import KINDS, Int8Report, LabelledImages, compare, find_labelled, quantize
from .merged import load_whole_model, merge
from .source import check_type


if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch.onnx import ONNXProgram
    from transformers import PreTrainedModel

# Bytes of the weights in one file: protobuf's limit is 2 GiB, and the graph needs some of it. More lie beside.
ONE_FILE = 2_000_000_000
BATCH_SIZES = (1, 2, 5)
# Another order of the same sums: ONNX Runtime's error was 0.5 to 1.6 times PyTorch's where this was tried, and that of
# a wrong operator (GELU by its tanh formula) hundreds of times.
TIMES_ROUNDING = 10


@dataclass(frozen=True)
class OnnxExport:
    """A written ONNX file.

    Attributes:
        path: The file.
        files: The file, and the one beside it that holds the weights if they are too large for one.
        error: Largest difference of its float32 logits from PyTorch's in float64, over the batch sizes.
        rounding: The same of PyTorch's own float32 logits.
        int8: Comparison of the int8 file with the float32 one; None without `int8`.
    """

    path: Path
    files: list[Path]
    error: float
    rounding: float
    int8: Int8Report | None = None

    def lines(self) -> list[str]:
        """The report, as lines of text."""
        return [
            f"checked in batches of {', '.join(map(str, BATCH_SIZES))}: float32 logits differ from those in float64 by "
            f"{self.error:.1e} (PyTorch's by {self.rounding:.1e}; {TIMES_ROUNDING} times that would be refused)",
            *(self.int8.lines() if self.int8 else ()),
        ]


def export_onnx(
    source: str | os.PathLike,
    target: str | os.PathLike,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
    int8: str | None = None,
    calibration: str | os.PathLike | None = None,
    eval_dir: str | os.PathLike | None = None,
) -> OnnxExport:
    """Write an image classifier as an ONNX file: `pixel_values` (batch, C, H, W) in, `logits` (batch, classes) out.

    An adapter (ours or stock LoRA) is merged first. The metadata holds `id2label` and `image_processor` (JSON), and
    `peft_heads_version`. The file appears when it is complete and checked; with more than 2 GB of weights these lie in
    `FILE.onnx.data`, which belongs to it.

    Args:
        source: Adapter (folder or Hub repository), or folder of a merged or pruned checkpoint.
        target: The new file, FILE.onnx.
        base_model: Folder or repository of an adapter's base model; what the adapter names if None.
        overwrite: Whether files that are there are replaced.
        int8: "dynamic" (scales of the activations are computed for each batch) or "static" (they are fixed by
            calibration images) quantizes the linear layers; None writes float32.
        calibration: Folder of images for "static"; some hundred images like those of the task.
        eval_dir: Folder of images with one sub-folder per class, on which the int8 and the float32 file are compared.
            Without it they are compared on the calibration images.

    Raises:
        FileNotFoundError: There is no such source or folder of images.
        ValueError: A package is missing, the target exists, settings contradict each other, the source cannot be read,
            torch cannot export the model, or the exported file's outputs are other ones. Nothing is written then.
    """
    check_packages("onnx", "onnxscript", "onnxruntime")
    target = Path(os.path.abspath(target))
    beside = target.with_name(f"{target.name}.data")
    _check_target(target, beside, overwrite)
    images = _check_int8(int8, calibration, eval_dir)
    model, processor = _load(source, base_model)
    labels = find_labelled(images, model.config.id2label, strict=eval_dir is not None) if images else None
    with new_files(target, beside) as folder:
        file = folder / target.name if int8 is None else folder / "float32" / target.name
        file.parent.mkdir(exist_ok=True)
        report = _write_checked(model, processor, file)
        if int8 is not None:
            quantize(file, folder / target.name, int8, processor, calibration, ONE_FILE)
            report["int8"] = compare(file, folder / target.name, labels)
        _check_target(target, beside, overwrite)  # it may have come meanwhile
    return OnnxExport(target, [path for path in (target, beside) if path.exists()], **report)


def trace(model: PreTrainedModel, pixel_values: torch.Tensor) -> ONNXProgram:
    """The program of a model for batches of any size, with images of the size of `pixel_values`.

    Attention is written out ("eager", set in the model): torch cannot export every use of its fused kernel (Swin's and
    BEiT's position biases), and the graph has fewer nodes.

    Raises:
        ValueError: torch cannot export the model.
    """
    model.set_attn_implementation("eager")
    try:
        with quiet_export():
            return torch.onnx.export(
                _Logits(model).eval(),
                (pixel_values,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ValueError(
            f"torch {torch.__version__} cannot export a {type(model).__name__} to ONNX: {_reason(error)}"
        ) from error


class _Logits(nn.Module):
    """A model whose output is its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def _write_checked(model: PreTrainedModel, processor: Any, file: Path) -> dict[str, float]:
    """Write the float32 file; the fields of `OnnxExport` that the comparison yields. The model is float64 afterwards."""
    images = _random_images(processor)
    with torch.no_grad():
        own = model(pixel_values=images).logits.double()
    program = trace(model, images[:2])
    program.model.metadata_props.update(
        metadata(model.config.id2label, processor, importlib.metadata.version("peft-heads"))
    )
    # torch notes where everything was traced: longer than the graph, and with paths of this machine
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(file, external_data=size > ONE_FILE)
    del program  # it holds the weights
    session = open_session(file)
    with torch.no_grad():
        exact = model.double()(pixel_values=images.double()).logits
    error = _error(session, images, exact)
    rounding = max(float((own - exact).abs().max()), torch.finfo(torch.float32).eps * float(exact.abs().max()))
    if not error <= TIMES_ROUNDING * rounding:  # NaN, too
        raise ValueError(
            f"the exported {type(model).__name__} is not the model: in ONNX Runtime its logits differ from PyTorch's in "
            f"float64 by {error:.1e} (expected at most {TIMES_ROUNDING} times {rounding:.1e}, PyTorch's own rounding in "
            f"float32), in batches of {', '.join(map(str, BATCH_SIZES))} random images"
        )
    return {"error": error, "rounding": rounding}


def _random_images(processor: Any) -> torch.Tensor:
    """As many images as the largest batch has, of the size that the image processor makes of a square one."""
    from PIL import Image

    shape = processor([Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"].shape[1:]
    return torch.randn(max(BATCH_SIZES), *shape, generator=torch.Generator().manual_seed(0))


def _error(session: InferenceSession, images: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference of ONNX Runtime's logits from the exact ones, over the batch sizes."""
    batches = (torch.from_numpy(run_session(session, images[:size].numpy())) for size in BATCH_SIZES)
    errors = [(found - exact[: len(found)]).abs().max() for found in batches]
    return float(torch.stack(errors).max())


def _load(source: str | os.PathLike, base_model: str | os.PathLike | None) -> tuple[PreTrainedModel, Any]:
    """The model, an adapter merged into it, and its image processor."""
    folder, base = Path(source), Path(source)
    if is_checkpoint(folder):
        if base_model is not None:
            raise ValueError(f"{source} is a whole checkpoint: --base_model goes with an adapter")
        model = load_checkpoint(folder)
    else:
        folder, base = fetch_adapter(source), base_model
        check_type(folder, read_settings(folder))
        model = merge(load_whole_model(folder, base_model), folder)
    try:
        return model.eval(), processor_of(folder, base)
    except FileNotFoundError as error:
        raise ValueError(
            f"{source} has no image processor that can be read, whose settings belong in the file: copy the "
            "preprocessor_config.json of the checkpoint that was trained into the folder"
        ) from error


def _check_target(target: Path, beside: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise ValueError(f"{target} is a folder; expected a file, such as {target / 'model.onnx'}")
    if target.suffix != SUFFIX:
        raise ValueError(f"{target} must end in {SUFFIX}")
    there = next((path for path in (target, beside) if os.path.lexists(path)), None)
    if there is not None and not overwrite:
        raise ValueError(f"{there} exists already and nothing was changed; --overwrite replaces it")


def _check_int8(
    int8: str | None, calibration: str | os.PathLike | None, eval_dir: str | os.PathLike | None
) -> LabelledImages | None:
    """The images on which float32 and int8 are compared; None without int8, or without images."""
    if int8 not in (None, *KINDS):
        raise ValueError(f"int8={int8!r} is not one of {', '.join(KINDS)}")
    if (int8 == "static") != (calibration is not None):
        raise ValueError(
            f"--int8 static and --calibration FOLDER (of images like those of the task) go together; got int8={int8}, "
            f"calibration={calibration}"
        )
    if eval_dir is not None and int8 is None:
        raise ValueError("--eval_dir is for the comparison of int8 with float32: give --int8 as well")
    calibrated = None if calibration is None else LabelledImages.below(calibration, seen=True)
    return calibrated if eval_dir is None else LabelledImages.below(eval_dir)


def _reason(error: BaseException) -> str:
    """The first line of the error from which the others came."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
