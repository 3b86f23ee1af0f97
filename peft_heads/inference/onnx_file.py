"""An exported ONNX file: what its metadata says, and its session of ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter_folder.ordinary import check_regular
from ..data.images import load_image_processor


if TYPE_CHECKING:
    import numpy as np
    from onnxruntime import InferenceSession

SUFFIX = ".onnx"
INPUT, OUTPUT = "pixel_values", "logits"
# Keys of the metadata. The first two are JSON.
LABELS, PROCESSOR, VERSION = "id2label", "image_processor", "peft_heads_version"
CPU = "CPUExecutionProvider"


def check_packages(*names: str) -> None:
    """Raise ValueError unless the packages of the extra `onnx` are installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {', '.join(missing)}: pip install 'peft-heads[onnx]'")


def metadata(id2label: dict[int, str], image_processor: Any, version: str) -> dict[str, str]:
    """What a file says of itself: labels and preprocessing as JSON, and the version of this package."""
    return {
        LABELS: json.dumps({str(index): label for index, label in id2label.items()}, ensure_ascii=False),
        PROCESSOR: image_processor.to_json_string(),
        VERSION: version,
    }


def open_session(path: str | os.PathLike, device: str | None = None) -> InferenceSession:
    """ONNX Runtime's session of a file.

    Args:
        device: "cpu", "cuda", "cuda:1", or the name of an execution provider; the CPU if None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: ONNX Runtime is not installed, cannot read the file, or has no such execution provider.
    """
    check_packages("onnxruntime")
    import onnxruntime

    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    provider, options = _provider(device or "cpu", onnxruntime.get_available_providers())
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors, which are raised as well
    # its threads must not go on waiting in a loop after a run, at the cost of everything else
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), settings, providers=[(provider, options)])
    except Exception as error:  # ONNX Runtime has a class for each of its status codes, without a public base
        raise ValueError(f"ONNX Runtime cannot open {path}: {' '.join(str(error).split())}") from error
    if session.get_providers()[0] != provider:
        raise ValueError(
            f"ONNX Runtime has {provider}, but could not start it, and would use {session.get_providers()[0]}"
        )
    return session


def read_metadata(session: InferenceSession, path: str | os.PathLike) -> tuple[dict[int, str], Any]:
    """The labels and the image processor that a file was exported with.

    Raises:
        ValueError: It was not written by `peft-heads export`.
    """
    found = session.get_modelmeta().custom_metadata_map
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    if (inputs, outputs) != ([INPUT], [OUTPUT]) or not {LABELS, PROCESSOR} <= found.keys():
        raise ValueError(
            f"{path} was not written by `peft-heads export --to onnx`: its input is {', '.join(inputs)} (expected "
            f"{INPUT}), its output {', '.join(outputs)} ({OUTPUT}), and its metadata has {', '.join(found) or 'nothing'} "
            f"({LABELS}, {PROCESSOR})"
        )
    try:
        labels = {int(index): str(label) for index, label in json.loads(found[LABELS]).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {LABELS} of its metadata is no JSON of class indices and names: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(found[PROCESSOR], "utf-8")
        try:
            return labels, load_image_processor(folder)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{path}: {PROCESSOR} of its metadata cannot be used: {error}") from error


def run_session(session: InferenceSession, pixel_values: np.ndarray) -> np.ndarray:
    """Logits (images, classes) of `pixel_values`, float32 (images, channels, height, width)."""
    return session.run([OUTPUT], {INPUT: pixel_values})[0]


def _provider(device: str, available: list[str]) -> tuple[str, dict[str, str]]:
    """The name of the execution provider, and its options."""
    name, _, index = device.partition(":")
    known = {provider.removesuffix("ExecutionProvider").lower(): provider for provider in available}
    provider = known.get(name.removesuffix("ExecutionProvider").lower())
    if provider is None or not re.fullmatch(r"\d*", index):
        raise ValueError(
            f"--device {device}: ONNX Runtime has no such execution provider here; there is {', '.join(known)}"
        )
    return provider, {"device_id": index} if index else {}
