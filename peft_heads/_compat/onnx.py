"""Facts about torch's exporter to ONNX and about ONNX Runtime: what they say that is of no use to a user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet_export() -> Iterator[None]:
    """Around `torch.onnx.export`: no warnings between torch's own parts, and no list of torchvision's missing operators.

    Delete when torch exports without them (seen with 2.13 and 2.14).
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_quantization() -> Iterator[None]:
    """Around ONNX Runtime's quantization, which logs on the root logger that a model be pre-processed.

    That infers shapes, which torch has written already. Without a handler there the root logger would get one for good.

    Delete when ONNX Runtime logs under its own name (seen with 1.23 and 1.32).
    """
    root, silent = logging.getLogger(), logging.NullHandler()

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addHandler(silent)
    root.addFilter(is_error)
    try:
        yield
    finally:
        root.removeFilter(is_error)
        root.removeHandler(silent)


def forget_shapes_of_weights(path: Path) -> None:
    """Remove from a file what it says of its weights' shapes beside the weights.

    ONNX Runtime 1.23 transposes weights for `quantize_dynamic` and leaves the old shapes, which are then an error.

    Delete when a version without this fault (seen fixed in 1.32) is the oldest that is supported.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    others = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)
    onnx.save(model, path)
