"""An epoch of training on as many images as a task of VTAB-1K has, end to end, against a plain script.

Our side reads images from the cache (`peft_heads.data.cache`) and trains head-masked LoRA with Trainer; heads are selected
after the first epoch. The plain script trains stock LoRA of the same rank with Trainer. It reads a `datasets` image folder,
whose set_transform decodes every image again with PIL and passes it to the checkpoint's image processor
(AutoImageProcessor; without torchvision, which nothing here needs, the one that resizes with PIL). The script prints the
processor's class. Otherwise both sides use Trainer's defaults, and worker processes only if --num_workers asks for them.
Without workers, reading is timed within the training: no way of reading could save the rest.

Whole trainings take turns, and each side comes first equally often. Each of our trainings has a cache of its own; its first
epoch, which fills the cache, is printed separately. The ratios are those of the medians of the rounds. The images are crops
of the two photographs that ship with scikit-learn, as JPEG of --image_size pixels (VTAB's sizes vary). On a CPU the model
is the small ViT that ships with the package; on a GPU it is ViT-B/16 with random weights, in bf16.

    python benchmarks/epoch_time.py [--images 1000 --image_size 224 --epochs 4 --rounds 6 --batch 64]
    python benchmarks/epoch_time.py --device cuda --num_workers 8
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from operator import truediv
from pathlib import Path

import datasets
import numpy as np
import torch
from measure import add_arguments, check_trainer_device, describe, device_name, interleaved, judge, ratio
from peft import get_peft_model
from PIL import Image
from random_vit import stock_lora
from sklearn.datasets import load_sample_images
from transformers import (
    AutoImageProcessor,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from peft_heads import HeadMaskedLoraConfig, TaylorHeadScorer
from peft_heads.data.cache import CachedImages
from peft_heads.data.image_folders import folder_task, load_folder_split
from peft_heads.data.images import collate, load_image_processor
from peft_heads.data.preprocessing import Preprocessing
from peft_heads.demo.model import DEMO_MODEL_PATH, load_demo_model, load_demo_processor


NUM_CLASSES = 10
TASK = "photographs"
PLAIN, OURS = "plain script", "ours"


class TimedImages(torch.utils.data.Dataset):
    """A data set that counts the seconds spent reading images in this process."""

    def __init__(self, data):
        self.data, self.seconds = data, 0.0

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        start = time.perf_counter()
        items = self.data.__getitems__(indices)
        self.seconds += time.perf_counter() - start
        return items


class EpochTimes(TrainerCallback):
    """Seconds of every epoch, counted from the end of the previous one, and seconds of reading in it."""

    def __init__(self, began, images):
        self.images = images
        self.ends, self.read = [began], [0.0]

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.read.append(self.images.seconds)

    @property
    def seconds(self):
        """`(seconds, seconds of reading)` of every epoch."""
        return [
            (end - begin, stop - start)
            for (begin, end), (start, stop) in zip(pairwise(self.ends), pairwise(self.read), strict=True)
        ]


def write_images(root, count, size):
    """Write `root/photographs/train/<class>/<image>.jpg`: crops of 60 % to 100 % of the height."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = int(rng.uniform(0.6, 1) * photograph.height)
        left, top = (int(rng.integers(0, whole - side + 1)) for whole in photograph.size)
        path = root / TASK / "train" / f"class{index % NUM_CLASSES}" / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + side, top + side)).resize((size, size)).save(path, quality=90)


def write_checkpoint(folder):
    """Save ViT-B/16 with random weights, and its image processor."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(num_labels=NUM_CLASSES)).save_pretrained(folder)
    processor = load_demo_processor()
    processor.size = {"height": 224, "width": 224}
    processor.save_pretrained(folder)
    return folder


def load_model(args):
    if args.checkpoint == DEMO_MODEL_PATH:
        return load_demo_model(NUM_CLASSES)
    return ViTForImageClassification.from_pretrained(args.checkpoint)


def plain_data(args):
    processor = AutoImageProcessor.from_pretrained(args.checkpoint)
    data = datasets.load_dataset("imagefolder", data_dir=args.root / TASK, cache_dir=args.root / "datasets")["train"]

    data.set_transform(partial(transform_plain, processor))
    return data


# At the top level, because worker processes that are not forked must import it.
def transform_plain(processor, examples):
    images = [image.convert("RGB") for image in examples["image"]]
    return {**processor(images, return_tensors="pt"), "label": examples["label"]}


def collate_plain(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}


def our_data(args, cache):
    processor = load_image_processor(args.checkpoint)
    preprocessing = Preprocessing.from_processor(processor, size=processor.size["height"], filter="bilinear")
    split = load_folder_split(args.root, folder_task(args.root, TASK), "train")
    return CachedImages(split, preprocessing, cache_dir=cache)


def check_same_images(args):
    """Check that both sides train on the same pixel values, up to rounding in the resizing library."""
    with tempfile.TemporaryDirectory() as cache:
        one, other = plain_data(args)[0], our_data(args, cache)[0]
    difference = float((torch.as_tensor(one["pixel_values"]) - other["pixel_values"]).abs().max())
    if difference > 0.05 or one["label"] != other["labels"]:
        raise RuntimeError(f"the two sides see other images: values differ by {difference}, with a range of 2")
    processor = type(AutoImageProcessor.from_pretrained(args.checkpoint)).__name__
    print(f"the plain script's image processor: {processor}")
    print(f"the same image differs by {difference:.1e} at most between the two sides")


def train_plain(args):
    """Train by the plain script; return `(seconds, seconds of reading)` of every epoch."""
    began = time.perf_counter()
    model = load_model(args)
    model = get_peft_model(model, stock_lora(model, args.rank))
    return train(args, model, plain_data(args), collate_plain, [], began)


def train_ours(args):
    """Train on our side; return the same. The first epoch fills the cache."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        model = get_peft_model(load_model(args), HeadMaskedLoraConfig(r=args.rank, ne=args.ne))
        return train(args, model, our_data(args, cache), collate, [TaylorHeadScorer(warmup_epochs=1)], began)


def train(args, model, data, collator, callbacks, began):
    images = TimedImages(data)
    times = EpochTimes(began, images)
    on_cpu = torch.device(args.device).type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            learning_rate=1e-3,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            dataloader_num_workers=args.num_workers,
            dataloader_pin_memory=not on_cpu,
            remove_unused_columns=False,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, collator, train_dataset=images, callbacks=[*callbacks, times])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return times.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, images=1000, image_size=224, epochs=4, rounds=6, batch=64, rank=8, ne=3, num_workers=0)
    args = parser.parse_args()
    check_trainer_device(parser, args.device)
    if args.epochs < 2:
        parser.error("--epochs must be at least 2: the first epoch is reported separately")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        args.root = Path(folder)
        measure(args)


def measure(args):
    write_images(args.root, args.images, args.image_size)
    on_cpu = torch.device(args.device).type == "cpu"
    args.checkpoint = DEMO_MODEL_PATH if on_cpu else write_checkpoint(args.root / "checkpoint")
    model = "the small ViT, fp32" if on_cpu else "ViT-B/16, bf16"
    print(
        f"{args.images} JPEGs of {args.image_size} pixels, {model}, batch {args.batch}, r={args.rank}, "
        f"{args.num_workers} workers, {device_name(args.device)}"
    )
    check_same_images(args)
    epochs = {PLAIN: [], OURS: []}
    sides = {
        PLAIN: lambda: epochs[PLAIN].append(train_plain(args)),
        OURS: lambda: epochs[OURS].append(train_ours(args)),
    }
    interleaved(sides, args.rounds, args.device, warm_up=0)
    first = {side: [training[0][0] for training in rounds] for side, rounds in epochs.items()}
    # The epochs of one training are not independent measurements.
    later, reading = (
        {side: [statistics.median(epoch[i] for epoch in t[1:]) for t in rounds] for side, rounds in epochs.items()}
        for i in range(2)
    )
    for side in epochs:
        print(describe(f"{side}, first epoch", first[side], "s"))
        print(describe(f"{side}, later epochs", later[side], "s"))
        if not args.num_workers:
            print(describe(f"{side}, reading", reading[side], "s"))
    print("the first epoch includes what comes before it: model, data and, on our side, the cache")
    print(f"first epoch, plain / ours: {ratio(first[PLAIN], first[OURS])}")
    print(f"later epochs, plain / ours: {ratio(later[PLAIN], later[OURS])}")
    where = f"{model}, JPEGs of {args.image_size} pixels, {args.device}"
    if not args.num_workers:  # workers read while the main process trains
        share = statistics.median(map(truediv, reading[PLAIN], later[PLAIN]))
        bare = [whole - read for whole, read in zip(later[OURS], reading[OURS], strict=True)]
        print(
            f"reading takes {share:.1%} of a plain epoch; if ours took nothing, plain / ours: {ratio(later[PLAIN], bare)}"
        )
        where += f"; reading takes {share:.0%} of the plain epoch"
    judge("epoch", ratio(later[PLAIN], later[OURS]), where)


if __name__ == "__main__":
    main()
