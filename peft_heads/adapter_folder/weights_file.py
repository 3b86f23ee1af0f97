"""The weights of a saved adapter, `adapter_model.safetensors` or `.bin`: names, shapes and dtypes without reading, then tensors."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .ordinary import check_ordinary


# In PEFT's order.
NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it; the dtype is None where torch's has another name."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


def find_weights(path_or_repo: str, subfolder: str | None = None, **download_kwargs: Any) -> Path | None:
    """The file of weights that PEFT reads for an adapter in a folder or on the Hub; None if there is none.

    Raises:
        ValueError: There is something else of that name: a folder, a pipe.
    """
    folder = Path(path_or_repo, subfolder or "")
    if folder.is_dir():
        found = next((folder / name for name in NAMES if (folder / name).exists()), None)
        if found is not None:
            check_ordinary(found)
        return found
    for name in NAMES:
        try:  # PEFT is going to ask for the same file
            return Path(hf_hub_download(path_or_repo, name, subfolder=subfolder, **download_kwargs))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            continue
    return None


def read_infos(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in a file of weights.

    Raises:
        ValueError: It is damaged, or of another form.
    """
    if path.suffix != ".safetensors":
        return {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in _load_bin(path).items()}
    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}
            return {
                key: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for key, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {one_line(error)}") from error


def read_weights(path: Path, keys: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights, on the CPU; all of them, or those named by `keys`. Errors as of `read_infos`."""
    if path.suffix != ".safetensors":
        return {key: tensor for key, tensor in _load_bin(path).items() if keys is None or key in keys}
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if keys is None or key in keys}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {one_line(error)}") from error


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """As PEFT reads it, `weights_only=True`, but mapped into memory: what nobody looks at is not read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files of a form that is refused a moment later
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which torch.load(weights_only=True) refuses: "
            f"{one_line(error)[:300]}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise ValueError(f"{path} holds no weights: expected tensors by name")
    return dict(tensors)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
