"""Which files an adapter's folder holds, whatever the method."""

from __future__ import annotations

import os
from pathlib import Path

from peft.utils import CONFIG_NAME

from .labels import LABELS_FILE
from .ordinary import check_ordinary
from .score_files import HEAT_MAP_FILE, SCORES_FILE
from .settings import MAX_JSON_BYTES
from .weights_file import NAMES as WEIGHTS_FILES


CARD_FILE, PROCESSOR_FILE = "README.md", "preprocessor_config.json"
FILES = (CONFIG_NAME, *WEIGHTS_FILES, LABELS_FILE, SCORES_FILE, HEAT_MAP_FILE, PROCESSOR_FILE, CARD_FILE)


def check_folder_files(folder: str | os.PathLike) -> None:
    """Raise ValueError if an adapter's folder holds a folder in a file's place, a pipe, a device or endless settings.

    `trainer_state.json`, which lies beside the adapter in a checkpoint, may have any length.
    """
    for path in sorted(Path(folder).iterdir()):
        if path.name in FILES or not path.is_dir():
            check_ordinary(path)
        if (
            path.suffix == ".json"
            and path.name != "trainer_state.json"
            and path.is_file()
            and path.stat().st_size > MAX_JSON_BYTES
        ):
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes (expected {MAX_JSON_BYTES:,} at most)")
