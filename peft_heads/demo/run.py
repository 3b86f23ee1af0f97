"""The demo: LoRA and head-masked LoRA side by side, on the shipped ViT and scikit-learn's handwritten digits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from ..adapter_folder.score_files import HEAT_MAP_FILE
from ..backbones.classifier import classifier_names
from ..backbones.targets import default_targets
from ..heads.protocol import describe_masks
from ..image_classifier import load_image_classifier
from ..methods import scores_heads
from ..metrics.accuracy import compute_metrics
from ..scoring.callback import TaylorHeadScorer
from ..tuners import HeadMaskedLoraConfig
from .digits import load_digits_dataset
from .model import load_demo_model, load_demo_processor


RANK = 8


@dataclass
class Result:
    """The result of one run: `accuracy` in [0, 1] and `logits` on the test split, `seconds` of training."""

    method: str
    accuracy: float
    trained_parameters: int
    adapter_bytes: int
    seconds: float
    heads: str
    folder: Path
    logits: torch.Tensor


def demo_configs(ne: int) -> dict[str, tuple[str, PeftConfig]]:
    """`{folder name: (name in the table, configuration)}` of the runs that are compared."""
    model = load_demo_model()
    lora = LoraConfig(r=RANK, target_modules=default_targets(model), modules_to_save=classifier_names(model))
    criteria = {"taylor": ("Taylor", "absolute"), "random": ("random", "random"), "front": ("front", "front")}
    return {"lora": ("LoRA", lora)} | {
        folder: (f"head-masked LoRA, {name}", HeadMaskedLoraConfig(r=RANK, ne=ne, criterion=criterion))
        for folder, (name, criterion) in criteria.items()
    }


def prepare(split) -> list[dict]:
    """A split of the digits as a list dataset: pixel_values (3, 32, 32) and labels; decoded and resized once."""
    pixel_values = load_demo_processor()(images=list(split["image"]), return_tensors="pt")["pixel_values"]
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixel_values, split["label"], strict=True)]


def fine_tune(
    method: str, config: PeftConfig, folder: Path, data: dict[str, list], *, epochs: int, seed: int, progress: bool
) -> Result:
    """Fine-tune the shipped ViT with one configuration and save the adapter; every method gets the same seed."""
    set_seed(seed)
    model = get_peft_model(load_demo_model(seed=seed), config)
    scorer = TaylorHeadScorer(warmup_epochs=max(1, epochs // 10))  # the papers' share: 10 of 100 epochs
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        weight_decay=1e-4,
        seed=seed,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=compute_metrics,
        processing_class=load_demo_processor(),
        callbacks=[scorer] if scores_heads(config) else [],
    )
    trainer.remove_callback(PrinterCallback)  # the table shows the results
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    accuracy = trainer.evaluate()["eval_accuracy"]
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    return Result(
        method=method,
        accuracy=accuracy,
        trained_parameters=model.get_nb_trainable_parameters()[0],
        adapter_bytes=(adapter / "adapter_model.safetensors").stat().st_size,
        seconds=seconds,
        heads=describe_masks(scorer.masks) if scorer.masks else "-",
        folder=folder,
        logits=logits_of(model, data["test"]),
    )


def logits_of(model: torch.nn.Module, data: list[dict]) -> torch.Tensor:
    """Logits (images, labels), on the CPU."""
    pixel_values = torch.stack([example["pixel_values"] for example in data])
    with torch.inference_mode():
        return model.eval().cpu()(pixel_values=pixel_values).logits


def run_demo(output_dir: Path, *, ne: int = 3, epochs: int = 10, seed: int = 0, progress: bool = False) -> bool:
    """Run the comparison and print it; returns whether the reloaded adapter predicts the same."""
    digits = load_digits_dataset()
    data = {split: prepare(digits[split]) for split in ("train", "test")}
    print(
        f"Fine-tuning a small ViT (12 heads, pre-trained on synthetic strokes) on {len(data['train'])} handwritten "
        f"digits,\n{epochs} epochs, heads scored in the first {max(1, epochs // 10)}; tested on {len(data['test'])}.\n"
    )
    results = {
        name: fine_tune(method, config, output_dir / name, data, epochs=epochs, seed=seed, progress=progress)
        for name, (method, config) in demo_configs(ne).items()
    }
    print(format_table(list(results.values())))
    print(f"\nOne seed; standard error of an accuracy: {standard_error(results['lora'], len(data['test'])):.4f}")
    print("\nDeactivated heads")
    for result in results.values():
        if result.heads != "-":
            print(f"  {result.method}: {result.heads}")

    taylor = results["taylor"]
    print(f"\nHeat map        {taylor.folder / HEAT_MAP_FILE}")
    print(f"Saved adapter   {taylor.folder / 'adapter'}")
    return check_reloaded(taylor, data["test"])


def check_reloaded(result: Result, data: list[dict]) -> bool:
    """Load the saved adapter into a fresh base model; its logits must be those of the trained model, bit for bit."""
    model, _ = load_image_classifier(result.folder / "adapter")
    logits = logits_of(model, data)
    identical = torch.equal(logits, result.logits)
    difference = (logits - result.logits).abs().max().item()
    print(
        f"Reloaded        into a fresh model: logits {'identical' if identical else 'DIFFERENT'} "
        f"(largest difference {difference:g} over {len(data)} test images)"
    )
    return identical


def standard_error(result: Result, num_images: int) -> float:
    """The standard error of the accuracy, as a binomial proportion: smaller differences between methods are chance."""
    return (result.accuracy * (1 - result.accuracy) / num_images) ** 0.5


def format_table(results: list[Result]) -> str:
    """The results as an aligned table, in the order given."""
    rows = [("method", "accuracy", "trained parameters", "adapter bytes", "seconds")]
    rows += [
        (r.method, f"{r.accuracy:.4f}", f"{r.trained_parameters:,}", f"{r.adapter_bytes:,}", f"{r.seconds:.1f}")
        for r in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
