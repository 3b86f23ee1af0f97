"""Time of inference after `peft-heads export --to pruned` against the model with all its heads.

Both sides in one process, interleaved batch by batch, so that they see the same machine; the ratio of the medians and
the spread of the batch-by-batch ratios are printed beside what the arithmetic allows: the multiplications of both
models, counted by PyTorch. Random weights: nothing is downloaded.

    python benchmarks/pruned_inference.py [--hidden 768 --layers 12 --heads 12 --batch 8 --batches 20 --ne 3 6]
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from peft_heads.heads import resolve_heads
from peft_heads.pruning import prune_heads


def make(args):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
        num_labels=100,
    )
    return ViTForImageClassification(config).eval()


def prune(model, ne):
    """The model with the values of the first heads set to zero, as merging does, and without these heads."""
    masks = {}
    for name, layout in resolve_heads(model).items():
        if layout.parts[0].role == "value":
            masks[name] = torch.arange(layout.num_heads) >= ne
            for param in model.get_submodule(name).parameters():
                param.data = layout.mask_rows(param.data, masks[name])
    return prune_heads(model, masks)


@torch.inference_mode()
def seconds_of(model, images):
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    model(images)
    synchronize()
    return time.perf_counter() - start


def operations(model, images):
    with torch.device("meta"):
        twin = type(model)(model.config)
    with FlopCounterMode(display=False) as counter:
        twin(images[:1].to("meta"))
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 768, "layers": 12, "heads": 12, "batch": 8, "batches": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ne", type=int, nargs="+", default=[3, 6])
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    models = {0: make(args)} | {ne: prune(make(args), ne) for ne in args.ne}
    times = {ne: [] for ne in models}
    for model in models.values():
        model.to(device)
    for index in range(args.batches + 2):
        for ne in models if index % 2 else reversed(models):
            seconds = seconds_of(models[ne], images)
            if index >= 2:  # warm-up
                times[ne].append(seconds)

    print(
        f"ViT, hidden {args.hidden}, {args.layers} layers, {args.heads} heads, batch {args.batch}, {device}, "
        f"{torch.get_num_threads()} threads"
    )
    for ne, seconds in times.items():
        line = f"ne={ne}: median {statistics.median(seconds) * 1e3:8.1f} ms"
        if ne:
            ratios = sorted(a / b for a, b in zip(times[0], seconds, strict=True))
            quarter = len(ratios) // 4
            bound = operations(models[0], images) / operations(models[ne], images)
            line += (
                f"   {statistics.median(times[0]) / statistics.median(seconds):.3f} times as fast as with all heads "
                f"(batch by batch: median {statistics.median(ratios):.3f}, middle half {ratios[quarter]:.3f} to "
                f"{ratios[-quarter - 1]:.3f}); by arithmetic {bound:.3f}"
            )
        print(line)


if __name__ == "__main__":
    main()
