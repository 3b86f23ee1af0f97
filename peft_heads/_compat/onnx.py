"""Facts about torch's exporter to ONNX and about ONNX Runtime: what they say that is of no use to a user."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
