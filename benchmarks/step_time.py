"""Time of a training step with head masks, or with k-bit adapters, against stock LoRA of the same rank.

Both sides in one process, interleaved step by step, so that they see the same machine; the ratio of the medians and
the spread of the step-by-step ratios are printed. Random weights: nothing is downloaded.

    python benchmarks/step_time.py [--hidden 768 --layers 12 --heads 12 --batch 8 --steps 20 --adapter_bits 32 --accumulation 1]
"""

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_heads import HeadMaskedLoraConfig, get_head_masks, set_head_masks


def make(config, args):
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden,
            num_labels=100,
        )
    )
    model = get_peft_model(vit, config).train()
    for name, param in model.named_parameters():
        if "lora_B" in name:  # zero at initialisation, which could be unfairly fast
            param.data.normal_(std=0.02)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def step(model, optimizer, batch, accumulation=1):
    synchronize = torch.cuda.synchronize if batch["labels"].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(accumulation):
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 768,
        "layers": 12,
        "heads": 12,
        "batch": 8,
        "steps": 20,
        "rank": 8,
        "ne": 3,
        "adapter_bits": 32,
        "accumulation": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mask_scope", default="adapter")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = {
        "stock LoRA": LoraConfig(r=args.rank, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
        "head-masked": HeadMaskedLoraConfig(
            r=args.rank, ne=args.ne, mask_scope=args.mask_scope, adapter_bits=args.adapter_bits
        ),
    }
    models = {name: make(config, args) for name, config in sides.items()}
    masked = models["head-masked"][0]
    masks = get_head_masks(masked)
    for mask in masks.values():
        mask[: args.ne] = False
    set_head_masks(masked, masks)
    batch = {"pixel_values": torch.randn(args.batch, 3, 224, 224), "labels": torch.arange(args.batch)}
    batch = {name: value.to(device) for name, value in batch.items()}
    for model, _ in models.values():
        model.to(device)

    times = {name: [] for name in models}
    for index in range(args.steps + 2):
        order = list(models) if index % 2 else list(reversed(models))
        for name in order:
            seconds = step(*models[name], batch, args.accumulation)
            if index >= 2:  # warm-up
                times[name].append(seconds)

    print(
        f"ViT, hidden {args.hidden}, {args.layers} layers, {args.heads} heads, batch {args.batch}, r={args.rank}, "
        f"ne={args.ne}, mask_scope={args.mask_scope}, adapter_bits={args.adapter_bits}, "
        f"accumulation={args.accumulation}, {device}, {torch.get_num_threads()} threads"
    )
    for name, seconds in times.items():
        print(f"{name:12}  median {statistics.median(seconds) * 1e3:8.1f} ms   min {min(seconds) * 1e3:8.1f} ms")
    ratios = sorted(b / a for a, b in zip(times["stock LoRA"], times["head-masked"], strict=True))
    quarter = len(ratios) // 4
    ratio = statistics.median(times["head-masked"]) / statistics.median(times["stock LoRA"])
    print(
        f"ratio of medians {ratio:.3f}; step by step: median {statistics.median(ratios):.3f}, "
        f"middle half {ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f}"
    )


if __name__ == "__main__":
    main()
