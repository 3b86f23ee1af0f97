"""Writes small benchmark trees in the published layouts, flaws included: images listed twice, paths with spaces, aliases.

The colour of an image depends on its class, so that a model can learn it.
"""

import colorsys
import json
import shutil
from dataclasses import replace

import numpy as np
from PIL import Image

from peft_heads.data.tasks import LIST_SEEDS, SHOTS, find_task


VTAB_SIZES = {"train800": 8, "val200": 4, "train800val200": 12, "test": 6}
SIZES = {"train": 9, "val": 6, "test": 6}


def picture(label, num_classes, index=0, size=(20, 16)):
    """Return an RGB image of `size` = (width, height): the class's colour with noise seeded by `index`."""
    colour = 255 * np.array(colorsys.hsv_to_rgb(label / num_classes, 1, 0.8))
    noise = np.random.default_rng((label, index)).normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8))


def small(name, suite, num_classes=3, sizes=None):
    """Return the row of a task with fewer classes and images."""
    task = find_task(name, suite)
    if suite == "fewshot":
        return replace(task, num_classes=num_classes, sizes=sizes or {"val": SIZES["val"], "test": SIZES["test"]})
    return replace(task, num_classes=num_classes, sizes=sizes or (VTAB_SIZES if suite == "vtab" else SIZES))


def write_vtab(root, task, layout="txt", folder=None, size=(20, 16)):
    """Write a task of VTAB-1K ("txt": JPEG with copies in train800val200; "json": PNG); return its folder."""
    home = root / (folder or task.name)
    if layout == "json":
        for split in ("train800val200", "test"):
            entries = []
            for i in range(task.sizes[split]):
                label = i % task.num_classes
                _save(picture(label, task.num_classes, i, size), home / "images" / f"{split}_{i:06}.png")
                entries.append({f"{split}_{i:06}.png": label})
            (home / f"{split}.json").write_text(json.dumps(entries))
        return home
    lines = {}
    for split in ("train800", "val200", "test"):
        lines[split] = []
        for i in range(task.sizes[split]):
            name, label = f"images/{split}/{i:06}.jpg", i % task.num_classes
            _save(picture(label, task.num_classes, noise_index(split, i), size), home / name)
            lines[split].append((name, label))
    copies = home / "images" / "train800val200"
    copies.mkdir(parents=True)
    lines["train800val200"] = []
    for i, (name, label) in enumerate(lines["train800"] + lines["val200"]):
        shutil.copy(home / name, copies / f"{i:06}.jpg")
        lines["train800val200"].append((f"images/train800val200/{i:06}.jpg", label))
    for split, rows in lines.items():
        _write_lines(home / f"{split}.txt", rows)
    return home


def write_few_shot(root, task, folder=None, repeat=1, shots=SHOTS, images="images", size=(20, 16)):
    """Write a few-shot task with all lists, 1-shot lists repeating each line `repeat` times; return its folder."""
    home = root / (folder or task.name)

    def rows(split, per_class, start=0):
        for label in range(task.num_classes):
            for i in range(start, start + per_class):
                name = f"class {label}/an image {i}.jpg" if split == "train" else f"{split}_{label}_{i}.jpg"
                path = home / images / name
                if not path.exists():
                    _save(picture(label, task.num_classes, noise_index(split, i), size), path)
                yield name, label

    for shot in shots:
        for seed in LIST_SEEDS:
            lines = [row for row in rows("train", shot, start=seed) for _ in range(repeat if shot == 1 else 1)]
            _write_lines(home / "annotations" / f"train_meta.list.num_shot_{shot}.seed_{seed}", lines)
    for split in ("val", "test"):
        lines = list(rows(split, task.sizes[split] // task.num_classes))
        _write_lines(home / "annotations" / f"{split}_meta.list", lines)
    return home


def write_fgvc(root, task, folder=None, images="images", text_classes=False, size=(20, 16)):
    """Write a fine-grained task; classes are 1, 2, … or text ("0295", …) as in NABirds. Return its folder."""
    home = root / (folder or task.name)
    for split, number in task.sizes.items():
        entries = {}
        for i in range(number):
            label = i % task.num_classes
            name = f"{label + 1:03}.Some_bird/{split}_{i:04}.jpg"
            _save(picture(label, task.num_classes, noise_index(split, i), size), home / images / name)
            entries[name] = f"{295 + label:04}" if text_classes else label + 1
        (home / f"{split}.json").write_text(json.dumps(entries))
    return home


def noise_index(split, index):
    """Return an index that makes other noise in every split."""
    return 1000 * ("train800", "val200", "test", "train", "val").index(split) + index


def _write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in rows))


def _save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
