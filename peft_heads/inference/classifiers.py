"""A finished image classifier, wherever it comes from: pixel values in, logits out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..data.images import load_image_processor
from ..image_classifier import fetch_adapter, load_adapter, load_checkpoint, processor_of
from .onnx_file import SUFFIX, open_session, read_metadata, run_session


if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import nn

ADAPTER_FILE, CHECKPOINT_FILE = "adapter_config.json", "config.json"


class Classifier(Protocol):
    """An image classifier that only predicts.

    Attributes:
        id2label: Names of the classes, by index.
        image_processor: The image processor of the checkpoint.
    """

    id2label: dict[int, str]
    image_processor: Any

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (images, classes), float32 on the CPU, of `pixel_values` (images, channels, height, width)."""


@dataclass
class TorchClassifier:
    """A model of transformers, with adapters or without, in evaluation mode, on its device."""

    model: nn.Module
    image_processor: Any
    device: torch.device

    @property
    def id2label(self) -> dict[int, str]:
        return self.model.config.id2label

    @torch.inference_mode()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.device, self.model.dtype)
        return self.model(pixel_values=pixel_values).logits.float().cpu()


@dataclass
class OnnxClassifier:
    """A file that `peft-heads export --to onnx` has written, in a session of ONNX Runtime."""

    session: InferenceSession
    id2label: dict[int, str]
    image_processor: Any

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        size, expected = list(pixel_values.shape[1:]), self.session.get_inputs()[0].shape[1:]
        if size != expected:
            raise ValueError(
                f"the file was exported for images of {' x '.join(map(str, expected))} (channels, height, width), and "
                f"its image processor makes {' x '.join(map(str, size))} of one: it does not crop to one size"
            )
        return torch.from_numpy(run_session(self.session, pixel_values.numpy()))


def open_classifier(model: str | os.PathLike, device: str | None = None) -> Classifier:
    """The image classifier in an adapter (folder or Hub repository), a folder of transformers, or an ONNX file.

    Args:
        device: Device of torch, by default the accelerator if there is one; for ONNX files "cpu" (the default) or
            what else ONNX Runtime has an execution provider for.

    Raises:
        FileNotFoundError: There is nothing under that name.
        ValueError: It is something else, cannot be read, is not complete, or there is no such device.
    """
    path = Path(model)
    if path.suffix == SUFFIX and not path.is_dir():
        session = open_session(path, device)
        return OnnxClassifier(session, *read_metadata(session, path))
    chosen = _torch_device(device)
    if is_checkpoint(path):
        loaded, processor = load_checkpoint(path), load_image_processor(path)
    else:
        folder = fetch_adapter(model)
        loaded, untrained = load_adapter(folder, dtype=torch.float32)
        if untrained:
            raise ValueError(f"neither {folder} nor its base model holds {', '.join(untrained)}: they would be random")
        processor = processor_of(folder)
    return TorchClassifier(loaded.eval().to(chosen), processor, chosen)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's folder (transformers), and not an adapter's, or the name of a repository.

    Raises:
        ValueError: It is a file, or a folder that holds neither.
    """
    if path.is_file():
        raise ValueError(
            f"{path} is a file; expected the folder of an adapter or of a checkpoint, or a file that ends in {SUFFIX}"
        )
    if not path.is_dir() or (path / ADAPTER_FILE).exists():
        return False
    if not (path / CHECKPOINT_FILE).exists():
        raise ValueError(
            f"{path} holds neither an adapter ({ADAPTER_FILE}) nor a checkpoint of transformers ({CHECKPOINT_FILE})"
        )
    return True


def _torch_device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of a name, of a build without CUDA
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error
    return device
