"""What the benchmark's protocol saves: time of a sweep, of separate runs, and of testing while training; the image cache.

The script makes a tree in VTAB-1K's layout of scikit-learn's digits, as JPEG of 224 x 224 pixels. By default it has a tenth
of a task's 1,000 training images, and 20 test images for each of them, as VTAB-1K has on average (387,904 for 19 tasks).
The model is the small ViT that ships with the package. Everything runs in one process and thread, in turns; the order is
reversed every other time, so choose an even --repeat. The script prints the spread and, beside (a), what sharing the
warm-up could reach if only training steps took time. For separate runs that are tested while they train, (b) and (c), it
runs one and multiplies the time by their number. There is one seed of one task: only the ratios matter.

    python benchmarks/sweep_cost.py [--epochs 100 --images 100 --test_images 2000 --repeat 4 --ne 1 3 6]
    python benchmarks/sweep_cost.py --only_separate --repeat 12        (the sweep against (a), and nothing else)
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from measure import describe, device_name, interleaved, ratio, timed

from peft_heads.benchmark.engine.execution import Outcome, execute
from peft_heads.benchmark.engine.places import Places
from peft_heads.benchmark.engine.sweep import Sweep
from peft_heads.benchmark.engine.trunk import trunk_epochs, trunk_key
from peft_heads.benchmark.recipes import RECIPES
from peft_heads.data.cache import CachedImages, StreamedImages
from peft_heads.data.preprocessing import Preprocessing
from peft_heads.data.tasks import find_task
from peft_heads.data.trees import load_split
from peft_heads.demo.digits import load_digits_dataset
from peft_heads.demo.model import DEMO_MODEL_PATH


METHOD = {"name": "head-masked-lora", "r": 8, "criterion": ["absolute", "positive", "negative"]}


def write_tree(root, images, test_images):
    """Write digits into the folder of svhn, which has the same ten classes."""
    digits = load_digits_dataset()
    home = root / "svhn"
    sizes = {"train800": images * 4 // 5, "val200": images // 5, "train800val200": images, "test": test_images}
    for split, size in sizes.items():
        rows = digits["test" if split == "test" else "train"]
        folder = home / "images" / split
        folder.mkdir(parents=True)
        lines = []
        for index in range(size):
            row = rows[index % len(rows)]
            row["image"].convert("RGB").resize((224, 224)).save(folder / f"{index:06}.jpg")
            lines.append(f"images/{split}/{index:06}.jpg {row['label']}\n")
        (home / f"{split}.txt").write_text("".join(lines))


def epochs_saved(specs, epochs):
    """Return `(saved, all)`: epochs that a sweep saves by sharing those before the scoring; epochs of separate runs."""
    groups = Counter(map(trunk_key, specs))
    shared = {trunk_key(spec): trunk_epochs(spec) for spec in specs}
    saved = sum((count - 1) * shared[key] for key, count in groups.items())
    return saved, len(specs) * epochs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"epochs": 100, "images": 100, "test_images": 2000, "repeat": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ne", type=int, nargs="+", default=[1, 3, 6])
    parser.add_argument("--only_separate", action="store_true", help="time only the sweep and (a)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args, root):
    write_tree(root / "data", args.images, args.test_images)
    task = find_task("svhn", "vtab")
    recipe = replace(RECIPES["vtab"], epochs=args.epochs, batch_size=20)
    sweep = Sweep((task,), METHOD | {"ne": args.ne}, recipe, str(DEMO_MODEL_PATH), seeds=(0,))
    specs = sweep.runs(sweep.methods(), (0,), final=True)
    print(
        f"{len(specs)} runs of {args.epochs} epochs, {args.images} training and {args.test_images} test images, {device_name('cpu')}"
    )

    def run(specs, **options):
        # a new folder of results, so that no run is found finished; the cache stays
        out = Path(tempfile.mkdtemp(dir=root))
        places = Places(root / "data", out, cache_dir=root / "cache", check_sizes=False, use_cpu=True)
        outcome = Outcome()
        execute(specs, places, outcome, **options)
        assert len(outcome.runs) == len(specs) and not outcome.failed
        shutil.rmtree(out)

    def one_run(**options):
        return timed(lambda: run(specs[:1], share_warmup=False, **options))[0]

    separate = "(a) separate runs, tested once"
    ways = {
        "sweep (warm-up shared, tested once)": lambda: run(specs),
        separate: lambda: run(specs, share_warmup=False),
    }
    tested = {
        "(b) separate runs, tested every ten epochs": lambda: len(specs) * one_run(test_every=10),
        "(c) separate runs, tested every epoch": lambda: len(specs) * one_run(test_every=1),
    }
    run(specs[:1], share_warmup=False)  # fills the cache
    times = interleaved(ways if args.only_separate else ways | tested, args.repeat, warm_up=0)
    saved, whole = epochs_saved(specs, args.epochs)
    base = next(iter(times.values()))
    for name, values in times.items():
        print(describe(name, values, "s", width=44))
        if values is not base:
            print(f"    / sweep: {ratio(values, base)}")
        if name == separate:
            share = f"{saved} of {whole} epochs of steps ({saved / whole:.1%})"
            print(f"    of which sharing saves {share}: / sweep could reach {whole / (whole - saved):.3f}")
    if args.only_separate:
        return

    split = load_split(root / "data", task, "train800val200", check_sizes=False)
    preprocessing = Preprocessing(size=224)
    print(f"\nan epoch of {args.images} images, 224 x 224, read as the model's input")
    cached = CachedImages(split, preprocessing, cache_dir=root / "cache224")
    streamed = StreamedImages(split, preprocessing)
    order = list(range(len(cached)))
    reads = interleaved(
        {
            "decoded anew": lambda: streamed.__getitems__(order),
            "from the cache": lambda: cached.__getitems__(order),
        },
        rounds=10,
    )
    print(f"cache: {cached.entry.size / 2**20:.1f} MiB")
    for name, values in reads.items():
        print(describe(name, values))
    print(f"decoded anew / from the cache: {ratio(reads['decoded anew'], reads['from the cache'])}")


if __name__ == "__main__":
    main()
