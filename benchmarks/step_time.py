"""Time and peak memory of a training step with head masks, or with k-bit adapters, against stock LoRA of the same rank.

The third side is the floor, which every adapter on these projections pays: the frozen forward pass, the gradients of the
activations down to the first adapted projections, and the classifier, without an adapter. All sides run in one process, in
turns, and the script prints the ratios step by step. Peak memory is measured in a process of its own for each side and run,
because one side would reuse memory that another has freed; see `measure.peak_memory`. The weights are random: nothing is
downloaded.

The update's scale is s = lora_alpha / r. Both configs have lora_alpha=8 by default, so s = 1 with r=8. Ours skips the
multiplication by s = 1, which stock LoRA performs. With --scale there is no target.

    python benchmarks/step_time.py [--batch 4 --steps 60 --rank 8 --ne 3 --adapter_bits 32 --accumulation 1]
    python benchmarks/step_time.py --batch 4 --rank 32 --adapter_bits 1 --steps 24
    python benchmarks/step_time.py --scale 0.5 --memory_runs 0
    python benchmarks/step_time.py --device cuda --batch 64 --steps 100
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

from measure import describe, device_name, in_own_process, interleaved, judge, peak_memory, ratio
from random_vit import (
    add_adapter,
    add_dtype_argument,
    add_vit_arguments,
    chosen_dtype,
    describe_vit,
    make_images,
    make_optimizer,
    make_vit,
    short,
    stock_lora,
    training_step,
)

from peft_heads import HeadMaskedLoraConfig
from peft_heads.backbones.targets import default_targets


FLOOR, STOCK, OURS = "floor", "stock LoRA", "head-masked"


def make(side, args):
    vit = make_vit(args)
    if side == FLOOR:
        return floor(vit).to(args.device)
    alpha = {} if args.scale is None else {"lora_alpha": args.scale * args.rank}
    if side == STOCK:
        return add_adapter(vit, stock_lora(vit, args.rank, **alpha)).to(args.device)
    config = HeadMaskedLoraConfig(
        r=args.rank, ne=args.ne, mask_scope=args.mask_scope, adapter_bits=args.adapter_bits, **alpha
    )
    return add_adapter(vit, config, deactivated=args.ne).to(args.device)


def floor(vit):
    """Ask for gradients of the classifier, and of the outputs of the projections that LoRA adapts."""
    vit.requires_grad_(False).train()
    vit.classifier.requires_grad_(True)
    targets = tuple(default_targets(vit))
    for name, module in vit.named_modules():
        if name.endswith(targets):
            module.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return vit


def stepper(side, args):
    """Return a function that takes one training step of a side."""
    model = make(side, args)
    return partial(
        training_step, model, make_optimizer(model), make_images(args), chosen_dtype(args), args.accumulation
    )


def memory_of(side, args):
    """Return the bytes before training and at its peak, over two steps; the first makes the optimizer's state."""
    step = stepper(side, args)
    return peak_memory(lambda: [step() for _ in range(2)], args.device)


def print_memory(args, where):
    runs = [
        {side: in_own_process(memory_of, side, args) for side in (FLOOR, STOCK, OURS)} for _ in range(args.memory_runs)
    ]
    above = {side: [run[side][1] - run[side][0] for run in runs] for side in (FLOOR, STOCK, OURS)}
    for side, values in above.items():
        whole = statistics.median(run[side][1] for run in runs)
        low, median, high = (x / 2**20 for x in (min(values), statistics.median(values), max(values)))
        print(f"{side:12} {median:9.1f} MiB ({low:.1f} to {high:.1f}) beyond the model, {whole / 2**20:.1f} in all")
    for other in (STOCK, FLOOR):
        print(f"memory beyond the model, {OURS} / {other}: {ratio(above[OURS], above[other])}")
        whole = ratio([run[OURS][1] for run in runs], [run[other][1] for run in runs])
        print(f"memory in all, {OURS} / {other}: {whole}")
    if (
        args.adapter_bits == 32 and args.scale is None
    ):  # k-bit adapters have no target: they keep both forms of a weight
        judge("memory", ratio(above[OURS], above[STOCK]), where)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_vit_arguments(parser, batch=4, steps=60, rank=8, ne=3, adapter_bits=32, accumulation=1, memory_runs=3)
    add_dtype_argument(parser)
    parser.add_argument("--mask_scope", default="adapter")
    parser.add_argument("--scale", type=float, help="s = lora_alpha / r of both sides; default: that of their configs")
    args = parser.parse_args()

    where = f"{short(chosen_dtype(args))}, {args.device}, r={args.rank}"
    print(
        f"{describe_vit(args)}, r={args.rank}, ne={args.ne}, mask_scope={args.mask_scope}, "
        f"scale={args.scale or 'default'}, adapter_bits={args.adapter_bits}, accumulation={args.accumulation}, {short(chosen_dtype(args))}, "
        f"{device_name(args.device)}"
    )
    if args.memory_runs:
        print_memory(args, where)
    times = interleaved({side: stepper(side, args) for side in (FLOOR, STOCK, OURS)}, args.steps, args.device)
    for side, seconds in times.items():
        print(describe(side, seconds))
    for one, other in ((OURS, STOCK), (OURS, FLOOR), (STOCK, FLOOR)):
        print(f"step, {one} / {other}: {ratio(times[one], times[other])}")
    target = {32: "step", 1: "1-bit step"}.get(args.adapter_bits)
    if target is not None and args.scale is None:
        judge(target, ratio(times[OURS], times[STOCK]), where)


if __name__ == "__main__":
    main()
