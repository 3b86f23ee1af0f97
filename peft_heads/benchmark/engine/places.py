"""Where a run reads and writes, and how it is executed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Where files are, and how runs are executed; nothing here changes a result.

    Attributes:
        data_root: Folder with one folder per task.
        output_dir: Folder of results; its folder `work` holds what unfinished runs need.
        cache_dir: Folder of decoded images; None for the default.
        check_sizes: Whether the tasks must have as many images as published.
        cache_test_images: Whether test images are cached as well, instead of decoded at every access.
        save_every: Number of epochs between checkpoints.
        num_workers: Number of processes that load images; where images are augmented there are none.
        use_cpu: Whether to use the CPU even if there is an accelerator.
    """

    data_root: str | os.PathLike
    output_dir: str | os.PathLike
    cache_dir: str | os.PathLike | None = None
    check_sizes: bool = True
    cache_test_images: bool = False
    save_every: int = 10
    num_workers: int = 0
    use_cpu: bool = False

    @property
    def work(self) -> Path:
        return Path(self.output_dir) / "work"
