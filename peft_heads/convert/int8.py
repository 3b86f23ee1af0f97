"""An ONNX file with 8 bits for its linear layers, by ONNX Runtime's quantization, and its comparison with float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._compat.onnx import forget_shapes_of_weights, quiet_quantization
from ..inference.classifiers import open_classifier
from ..inference.onnx_file import INPUT
from ..inference.predictions import find_images, label_of, read_batches
from ..metrics.timing import Ratio, interleaved, ratio


KINDS = ("dynamic", "static")
# Products with weights. The patch embedding (a convolution) is a small share of the work; so are the products of
# activations in the attention, which suffer most.
LINEAR = ["MatMul", "Gemm"]
BATCH_SIZES, ROUNDS = (1, 8), 10


@dataclass(frozen=True)
class LabelledImages:
    """Image files, and the class of each where the folders are named after the classes.

    Attributes:
        folder: Folder in which they lie.
        files: Their paths.
        seen: Whether the int8 file is calibrated on them.
        classes: Class index of each image; None if it is not known.
    """

    folder: str
    files: list[str]
    seen: bool = False
    classes: list[int] | None = None

    @classmethod
    def below(cls, folder: str | os.PathLike, seen: bool = False) -> LabelledImages:
        """The images at any depth in a folder; the errors are those of `find_images`."""
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"there is no folder of images {os.fspath(folder)}")
        return cls(os.fspath(folder), find_images([folder]), seen)


@dataclass(frozen=True)
class Int8Report:
    """An int8 file beside the float32 one.

    Attributes:
        bytes: Sizes of the float32 and the int8 file.
        speed: For each batch size, how many times as fast the int8 file is.
        images: Images on which the two were compared; None if there were none.
        accuracy: Share of right predictions of float32 and int8; None where the classes are not known.
        agreement: Share of the images for which both predict the same class; None without images.
    """

    bytes: tuple[int, int]
    speed: dict[int, Ratio]
    images: LabelledImages | None = None
    accuracy: tuple[float, float] | None = None
    agreement: float | None = None

    def lines(self) -> list[str]:
        """The report, as lines of text."""
        lines = [
            "                 float32          int8",
            "bytes      {:>13,} {:>13,}".format(*self.bytes),
        ]
        if self.accuracy:  # on the images of the next line
            lines.append("accuracy   {:>12.2%}  {:>12.2%}".format(*self.accuracy))
        if self.images:
            which = f"{len(self.images.files):,} images in {self.images.folder}"
            which += " (those of the calibration)" if self.images.seen else ""
            lines.append(f"same class for {self.agreement:.2%} of the {which}")
        else:
            lines.append("accuracy not measured: give labelled images, --eval_dir FOLDER (FOLDER/CLASS/IMAGE)")
        lines += [
            f"int8 is {speed.median:.2f} times as fast here in batches of {size} ({speed.span})"
            for size, speed in self.speed.items()
        ]
        return lines


def find_labelled(images: LabelledImages, id2label: dict[int, str], strict: bool) -> LabelledImages:
    """The images with their classes, by the names of their folders.

    Args:
        strict: Whether a folder that is no class is an error; otherwise no class is known.

    Raises:
        ValueError: A folder is named after none of the classes.
    """
    index = {label: number for number, label in id2label.items()}
    names = [label_of(file) for file in images.files]
    unknown = sorted(set(names) - index.keys())
    if unknown and strict:
        raise ValueError(
            f"--eval_dir {images.folder}: expected one folder per class ({_some(list(index))}) with its images in it; "
            f"images lie in {_some(unknown)}"
        )
    return images if unknown else replace(images, classes=[index[name] for name in names])


def quantize(
    source: Path, target: Path, kind: str, image_processor: Any, calibration: str | os.PathLike | None, one_file: int
) -> None:
    """Write the int8 version of a float32 ONNX file, whose metadata it keeps. `source` is a temporary file.

    Weights are symmetric with a scale for each output channel; activations have a scale and a zero point for each
    tensor, of each batch ("dynamic") or for good ("static"). Weights use 7 bits of the 8: a processor without the
    instructions for int8 (VNNI) adds pairs of products in 16 bits, which could overflow, so that the predictions
    would depend on the machine.

    Args:
        calibration: Folder of images, for "static".
        one_file: Bytes of weights above which they lie in a second file.

    Raises:
        ValueError: An image cannot be read.
    """
    import onnx
    from onnxruntime import quantization

    settings = {
        "op_types_to_quantize": LINEAR,
        "per_channel": True,
        "reduce_range": True,
        "weight_type": quantization.QuantType.QInt8,
        # the file may be too large for one until it is quantized
        "use_external_data_format": True,
        # outputs stay float32, which costs nothing: what follows them (GELU, softmax, sums) is computed so
        "extra_options": {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": LINEAR},
    }
    whole = target.parent / "int8" / target.name
    whole.parent.mkdir()
    forget_shapes_of_weights(source)
    with quiet_quantization():
        if kind == "dynamic":
            quantization.quantize_dynamic(source, whole, **settings)
        else:
            reader = _calibration_reader(read_batches(image_processor, find_images([calibration]), 8))
            quantization.quantize_static(source, whole, reader, **settings)
    model = onnx.load(whole)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save_model(model, target, save_as_external_data=size > one_file, location=f"{target.name}.data")


def compare(float32: Path, int8: Path, images: LabelledImages | None) -> Int8Report:
    """Compare predictions, sizes and speed of two exported files; both run in turns on all cores.

    Raises:
        ValueError: An image cannot be read, or the int8 file yields numbers that are not finite.
    """
    files = (float32, int8)
    sides = dict(zip(("float32", "int8"), map(open_classifier, files), strict=True))
    channels = sides["int8"].session.get_inputs()[0].shape[1:]
    speed = {}
    for size in BATCH_SIZES:
        batch = torch.randn(size, *channels, generator=torch.Generator().manual_seed(0))
        if not sides["int8"].logits(batch).isfinite().all():
            raise ValueError("the int8 file's logits are not finite, with random images: export float32")
        times = interleaved({name: lambda s=side: s.logits(batch) for name, side in sides.items()}, ROUNDS)  # noqa: B023
        speed[size] = ratio(times["float32"], times["int8"])
    sizes = tuple(sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) for path in files)
    report = Int8Report(sizes, speed, images)
    if images is None:
        return report
    found = {name: [] for name in sides}
    for _, batch in read_batches(sides["float32"].image_processor, images.files, 8):
        for name, side in sides.items():
            found[name].append(side.logits(batch).argmax(dim=-1))
    predicted = [torch.cat(found[name]) for name in ("float32", "int8")]
    accuracy = None
    if images.classes is not None:
        right = torch.tensor(images.classes)
        accuracy = tuple(float((side == right).double().mean()) for side in predicted)
    return replace(report, agreement=float((predicted[0] == predicted[1]).double().mean()), accuracy=accuracy)


def _calibration_reader(batches: Iterator[tuple[list[str], torch.Tensor]]) -> Any:
    """The batches as ONNX Runtime's calibration asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(({INPUT: batch.numpy()} for _, batch in batches), None)

    return Reader()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
