"""A small tree of two tasks, a tiny ViT, and a recipe that takes a second."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import trees

from peft_heads.benchmark.engine.places import Places
from peft_heads.benchmark.recipes import RECIPES
from peft_heads.data.tasks import find_task


SIZES = {"train800": 37, "val200": 16, "train800val200": 53, "test": 19}
TASKS = ("cifar", "eurosat")


@dataclass
class Bench:
    """Everything that a run needs; `places(name)` has a folder of results of its own."""

    root: Path

    backbone = property(lambda self: str(self.root / "vit"))
    tasks = property(lambda self: tuple(find_task(name, "vtab") for name in TASKS))

    @property
    def recipe(self):
        return replace(
            RECIPES["vtab"],
            epochs=4,
            batch_size=16,
            warmup_epochs=1,
            head_warmup_epochs=3,
            learning_rate=1e-2,
            final_learning_rate=1e-3,
        )

    def places(self, name, **changes):
        settings = {"cache_dir": self.root / "cache", "check_sizes": False, "use_cpu": True, "save_every": 1}
        return Places(self.root / "data", self.root / name, **settings | changes)


@pytest.fixture
def bench(bench_root, tmp_path):
    """The same, with folders of results that no other test uses."""
    for name in ("data", "vit", "cache"):
        (tmp_path / name).symlink_to(bench_root / name, target_is_directory=True)
    return Bench(tmp_path)


@pytest.fixture(scope="session")
def bench_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    for name in TASKS:
        trees.write_vtab(root / "data", trees.small(name, "vtab", sizes=SIZES))
    tiny.make("vit").save_pretrained(root / "vit")
    (root / "cache").mkdir()
    return root
