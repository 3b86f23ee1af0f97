"""All 19 tasks of VTAB-1K in one process on one GPU: time per task, images per second, share of the arithmetic peak.

GPU figures have not been taken yet: there was no GPU. The script has been run on a CPU only, with a tiny model.

It trains as the recipe `vtab` does (100 epochs of 1,000 images in batches of 64, AdamW, stochastic depth; heads are scored
in the tenth epoch and then deactivated) and tests once. The model is ViT-B/16 with random weights; the synthetic images
have the full size and the published numbers. The weights are loaded once. The backbone is compiled once; the classifier,
whose size differs from task to task, stays outside. Images lie on the device as uint8. Attention is SDPA. Autocast computes
in bfloat16, in which the frozen matrices are stored. Steps have a fixed shape, so the forward and backward passes of the
backbone are CUDA graphs (`torch.compile(mode="reduce-overhead")`).

A task's time is the time of training and testing, without making its images, which stands for reading the cache (test
images of real tasks must also be decoded once). Start-up (model, compilation) is added to the sum. With --results a file
keeps the times of each task, and later runs add to it, so that the tasks can be measured a few at a time.

    python benchmarks/gpu_suite.py --results gpu_suite.json [--tasks cifar dtd … --peak_tflops 989 --compile reduce-overhead]
    python benchmarks/gpu_suite.py --device cpu --quick
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from measure import add_arguments, device_name, judge, synchronize
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, get_scheduler

from peft_heads import HeadMaskedLoraConfig, HeadScorer, get_head_masks, set_head_masks
from peft_heads.adapter_folder.atomic import write_atomically
from peft_heads.backbones.drop_path import add_drop_path, residual_branches
from peft_heads.benchmark.recipes import RECIPES
from peft_heads.data.tasks import TASKS
from peft_heads.heads.protocol import head_layers


VTAB = {task.name: task for task in TASKS if task.suite == "vtab"}
RECIPE = RECIPES["vtab"]
H200_BF16_TFLOPS = 989  # dense; an H100 SXM has the same
QUICK = {"epochs": 3, "images": 20, "batch": 8, "test_batch": 16, "test_images": 24, "tasks": ["cifar", "svhn"]}
QUICK_VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
QUICK_VIT |= {"image_size": 32, "patch_size": 8}


# Floating-point operations: a multiplication and an addition count as two.


def forward_flops(config: ViTConfig, rank: int, num_labels: int) -> int:
    """Count the operations of one image with LoRA on q and v: matrix products only, by the usual convention."""
    tokens, parts = _tokens(config), _layer_flops(config, rank)
    patches = 2 * (tokens - 1) * config.num_channels * config.patch_size**2 * config.hidden_size
    return patches + config.num_hidden_layers * sum(parts.values()) + 2 * config.hidden_size * num_labels


def training_flops(config: ViTConfig, rank: int, num_labels: int) -> int:
    """Count the operations of one image, forward and backward, without what flash attention computes twice.

    In the backward pass a frozen matrix costs one product (the gradient of its input); a product of two factors that
    both need gradients costs two. The first layer needs no gradients of the inputs of q, k and v, nor of k.
    """
    tokens, d = _tokens(config), config.hidden_size
    parts = _layer_flops(config, rank)
    backward = parts["frozen"] + 2 * parts["attention"] + 2 * parts["lora"]
    unasked = 2 * tokens * 3 * d**2 + parts["lora"] // 2 + 2 * tokens**2 * d
    whole = config.num_hidden_layers * backward - unasked + 2 * 2 * d * num_labels
    return forward_flops(config, rank, num_labels) + whole


def _layer_flops(config: ViTConfig, rank: int) -> dict[str, int]:
    tokens, d = _tokens(config), config.hidden_size
    return {
        "frozen": 2 * tokens * (4 * d**2 + 2 * d * config.intermediate_size),
        "attention": 2 * 2 * tokens**2 * d,
        "lora": 2 * (2 * tokens * 2 * d * rank),
    }


def _tokens(config: ViTConfig) -> int:
    return (config.image_size // config.patch_size) ** 2 + 1


class Features(nn.Module):
    """The backbone, from uint8 images (batch, 3, H, W) to the class token, float32 (batch, hidden)."""

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.backbone = backbone
        self.device_type = device.type

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.device_type != "cpu"):
            return self.backbone(images.float() / 255).last_hidden_state[:, 0].float()


class Suite:
    """One model for all tasks; `run` measures one task."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        config = ViTConfig(attn_implementation="sdpa", **(QUICK_VIT if args.quick else {}))
        vit = ViTForImageClassification(config)
        branches = residual_branches(vit)
        lora = HeadMaskedLoraConfig(r=args.rank, ne=args.ne, adapter_bits=args.adapter_bits, modules_to_save=[])
        self.model = get_peft_model(vit, lora).to(self.device)
        add_drop_path(vit, branches, RECIPE.drop_path)
        if self.device.type == "cuda":
            store_in_bfloat16(vit)
        self.config = vit.config
        self.features = Features(vit.vit, self.device)
        if args.compile != "no":
            self.features.compile(mode=None if args.compile == "default" else args.compile, dynamic=False)
        self.trained = [param for param in self.model.parameters() if param.requires_grad]
        self.start()

    def start(self) -> None:
        """Compile, and record the graphs, before anything is timed."""
        images, labels = self.make_images(2, self.args.batch, seed=0)
        test_images, test_labels = self.make_images(2, self.args.test_batch, seed=0)
        classifier, optimizer, _ = self.reset(2, steps=10)
        for _ in range(3):
            self.step(classifier, optimizer, images, labels)
        scorer = HeadScorer(self.model)
        for _ in range(3):
            self.step(classifier, optimizer, images, labels, scorer)
        self.end_scoring(scorer, optimizer)
        for _ in range(3):
            self.test(classifier, test_images, test_labels)

    def reset(self, num_classes: int, steps: int):
        """Re-initialise the adapter in place (recorded graphs know its addresses); make classifier, optimizer, schedule."""
        for layer in head_layers(self.model).values():
            layer.reset_lora_parameters("default", True)
        set_head_masks(self.model, {name: torch.ones_like(mask) for name, mask in get_head_masks(self.model).items()})
        classifier = nn.Linear(self.config.hidden_size, num_classes, device=self.device)
        optimizer = torch.optim.AdamW(
            [*self.trained, *classifier.parameters()],
            lr=RECIPE.learning_rate,
            weight_decay=RECIPE.weight_decay,
            fused=self.device.type == "cuda",
        )
        rates = {
            "min_lr": RECIPE.final_learning_rate,
            "warmup_lr_rate": RECIPE.warmup_learning_rate / RECIPE.learning_rate,
        }
        schedule = get_scheduler(
            "cosine_warmup_with_min_lr",
            optimizer,
            num_warmup_steps=steps * RECIPE.warmup_epochs // RECIPE.epochs,
            num_training_steps=steps,
            scheduler_specific_kwargs=rates,
        )
        return classifier, optimizer, schedule

    def make_images(self, num_classes: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make noise in a colour that shows the class: uint8 (count, 3, H, W), and labels (count,)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        colours = torch.randint(0, 128, (num_classes, 3), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(count, device=self.device) % num_classes
        size = self.config.image_size
        shape = (count, self.config.num_channels, size, size)
        images = torch.randint(0, 128, shape, generator=generator, dtype=torch.uint8, device=self.device)
        images += colours.to(self.device, torch.uint8)[labels][:, :, None, None]
        return images, labels

    def step(self, classifier, optimizer, images, labels, scorer=None) -> torch.Tensor:
        if not self.model.training:  # train() walks through all modules, which would delay the graph
            self.model.train()
        torch.compiler.cudagraph_mark_step_begin()
        # hooks on quantised weights break a compiled graph at every weight
        eager = scorer is not None and self.args.adapter_bits < 32
        features = self.features.forward if eager else self.features
        loss = cross_entropy(classifier(features(images)), labels)
        loss.backward()
        if scorer is not None:
            scorer.update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # the next step overwrites the outputs of a graph
        return loss.detach()

    @torch.no_grad()
    def end_scoring(self, scorer, optimizer) -> None:
        """Deactivate heads. A pass outside the compiled graph lets quantised weights see that their hooks are gone."""
        scorer.apply(optimizer)
        if self.args.adapter_bits < 32:
            self.features.forward(self.make_images(2, 1, seed=0)[0])

    @torch.no_grad()
    def test(self, classifier, images, labels) -> torch.Tensor:
        """Count the images classified correctly. The last batch is filled up, so that its shape is the same."""
        self.model.eval()
        right, count = torch.zeros((), device=self.device), len(labels)
        for begin in range(0, count, self.args.test_batch):
            index = torch.arange(begin, begin + self.args.test_batch, device=self.device)
            torch.compiler.cudagraph_mark_step_begin()
            found = classifier(self.features(images[index % count])).argmax(1)
            right += ((found == labels[index % count]) & (index < count)).sum()
        return right

    def run(self, name: str) -> dict[str, float]:
        """Return seconds, numbers of images and accuracy of one task."""
        args, task = self.args, VTAB[name]
        images, labels = self.make_images(task.num_classes, args.images, seed=1)
        test_count = args.test_images or task.sizes["test"]
        test_images, test_labels = self.make_images(task.num_classes, test_count, seed=2)
        synchronize(self.device)
        began = time.perf_counter()
        batches = args.images // args.batch
        classifier, optimizer, schedule = self.reset(task.num_classes, args.epochs * batches)
        scored_epoch = min(RECIPE.head_warmup_epochs, max(1, args.epochs // 2))
        scorer = None
        for epoch in range(1, args.epochs + 1):
            if epoch == scored_epoch:
                scorer = HeadScorer(self.model)
            for index in torch.randperm(args.images, device=self.device)[: batches * args.batch].split(args.batch):
                self.step(classifier, optimizer, images[index], labels[index], scorer)
                schedule.step()
            if epoch == scored_epoch:
                self.end_scoring(scorer, optimizer)
                scorer = None
        synchronize(self.device)
        trained = time.perf_counter()
        accuracy = float(self.test(classifier, test_images, test_labels)) / test_count
        return {
            "train_seconds": trained - began,
            "train_images": args.epochs * batches * args.batch,
            "test_seconds": time.perf_counter() - trained,
            "test_images": test_count,
            "accuracy": accuracy,
        }

    def report(self, name: str, result: dict[str, float], remark: str = "") -> None:
        flops = (self.config, self.args.rank, VTAB[name].num_classes)
        line = f"{name:21} {result['train_seconds'] + result['test_seconds']:8.2f} s"
        for part, per_image in (("train", training_flops(*flops)), ("test", forward_flops(*flops))):
            speed = result[f"{part}_images"] / result[f"{part}_seconds"]
            share = speed * per_image / (1e12 * self.args.peak_tflops)
            line += f"   {part} {speed:8.0f} images/s, {share:6.2%} of the peak"
        print(f"{line}   accuracy {result['accuracy']:.3f}{remark}", flush=True)


def store_in_bfloat16(model: nn.Module) -> None:
    """Store frozen matrices in bfloat16, to which autocast would otherwise convert them in every step."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
            module.to(torch.bfloat16)


def read_results(path: str | None, settings: dict) -> dict:
    """Return what earlier runs with the same settings have measured; other settings raise a ValueError."""
    if path is None or not Path(path).exists():
        return {"settings": settings, "start_up": 0.0, "tasks": {}}
    results = json.loads(Path(path).read_text("utf-8"))
    if results["settings"] != settings:
        raise ValueError(f"{path} was measured with {results['settings']}, not {settings}; name another file")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(
        parser,
        epochs=RECIPE.epochs,
        images=1000,
        batch=RECIPE.batch_size,
        test_batch=256,
        test_images=0,  # 0: as many as published
        rank=8,
        ne=3,
        adapter_bits=32,
    )
    parser.add_argument("--tasks", nargs="+", choices=list(VTAB), default=list(VTAB), metavar="TASK")
    parser.add_argument("--compile", choices=["no", "default", "reduce-overhead", "max-autotune"])
    parser.add_argument("--peak_tflops", type=float, default=H200_BF16_TFLOPS, help="peak of the device in dense bf16")
    parser.add_argument("--results", help="JSON file to add the times to")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    if args.compile is None:
        args.compile = "no" if torch.device(args.device).type == "cpu" else "reduce-overhead"

    settings = {name: value for name, value in vars(args).items() if name not in ("tasks", "results", "peak_tflops")}
    settings |= {"device": device_name(args.device), "torch": torch.__version__}
    results = read_results(args.results, settings)
    began = time.perf_counter()
    suite = Suite(args)
    synchronize(args.device)
    start_up = time.perf_counter() - began
    results["start_up"] = max(start_up, results["start_up"])
    print(", ".join(f"{name}={value}" for name, value in settings.items()))
    print(f"start-up, with compilation: {start_up:.1f} s; the peak is taken to be {args.peak_tflops:g} TFLOPS")
    for name in args.tasks:
        known = name in results["tasks"]
        if not known:
            results["tasks"][name] = suite.run(name)
            if args.results:
                write_atomically(args.results, json.dumps(results, indent=1).encode())
        suite.report(name, results["tasks"][name], f"   (from {args.results})" if known else "")
    summarize(results, args)


def summarize(results: dict, args: argparse.Namespace) -> None:
    tasks = results["tasks"].values()
    seconds = results["start_up"] + sum(task["train_seconds"] + task["test_seconds"] for task in tasks)
    print(f"start-up and {len(tasks)} of {len(VTAB)} tasks: {seconds / 60:.2f} min")
    if args.quick or args.epochs != RECIPE.epochs or args.test_images or len(tasks) < len(VTAB):
        print(f"not judged: the target is for {len(VTAB)} tasks of full size, {RECIPE.epochs} epochs each")
    else:
        judge("suite", seconds / 60, device_name(args.device))


if __name__ == "__main__":
    main()
