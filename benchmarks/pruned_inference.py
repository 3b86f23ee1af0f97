"""Time of inference with deactivated heads and neurons: the adapter beside the weights, merged, and pruned.

For every number of heads the script times a head-masked adapter with mask_scope="head" as it is, merged (`peft-heads export
--to merged`), and without what is deactivated (`--to pruned`). All run in one process, in turns. The ratios, batch by
batch, are printed beside the arithmetic bound, the ratio of the operations that PyTorch counts in both models. Half of
the heads and `--neurons 0.5` make a ViT twice as fast by arithmetic. With bfloat16 the weights are stored in it, as for
inference, without autocast. The weights are random: nothing is downloaded.

    python benchmarks/pruned_inference.py [--batch 8 --batches 20 --ne 3 6 --neurons 0.5 --rank 8]
"""

from __future__ import annotations

import argparse
import copy

import torch
from measure import describe, device_name, interleaved, judge, ratio
from random_vit import (
    add_adapter,
    add_dtype_argument,
    add_vit_arguments,
    chosen_dtype,
    describe_vit,
    make_images,
    make_vit,
    short,
)
from torch.utils.flop_counter import FlopCounterMode

from peft_heads import HeadMaskedLoraConfig, get_head_masks, get_neuron_masks, set_neuron_masks
from peft_heads.backbones.targets import default_targets
from peft_heads.convert.smaller import prune


def make(args, ne):
    """Return `{"unmerged", "merged", "pruned": model}` of the same adapter: LoRA on query and value, and the masks."""
    vit = make_vit(args)
    config = HeadMaskedLoraConfig(
        r=args.rank,
        ne=ne,
        mask_scope="head",
        neuron_ratio=args.neurons or None,
        target_modules=default_targets(vit),
    )
    unmerged = add_adapter(vit, config, ne).eval()
    heads, neurons = get_head_masks(unmerged), {}
    if args.neurons:
        neurons = get_neuron_masks(unmerged)
        for mask in neurons.values():
            mask[: int(args.neurons * len(mask))] = False
        set_neuron_masks(unmerged, neurons)
    merged = copy.deepcopy(unmerged).merge_and_unload(safe_merge=True)
    return {"unmerged": unmerged, "merged": merged, "pruned": prune(merged, heads, neurons)}


def operations(model):
    """Count the floating-point operations of one image."""
    twin = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.zeros(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops()


def describe_cut(args, ne):
    return f"ne={ne}, {args.neurons:.0%} of the neurons, batch {args.batch}" if args.neurons else f"ne={ne}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_vit_arguments(parser, batches=20, rank=8)
    add_dtype_argument(parser)
    parser.add_argument("--ne", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--neurons", type=float, default=0.0, help="share of the MLP neurons that are deactivated")
    args = parser.parse_args()
    dtype = chosen_dtype(args)
    images = make_images(args)["pixel_values"].to(dtype)

    @torch.inference_mode()
    def infer(model):
        model(images)

    print(f"{describe_vit(args)}, r={args.rank}, {short(dtype)}, {device_name(args.device)}")
    for ne in args.ne:
        models = make(args, ne)
        counts = {name: operations(model) for name, model in models.items()}
        for model in models.values():
            model.to(args.device, dtype)
        times = interleaved(
            {name: lambda model=model: infer(model) for name, model in models.items()}, args.batches, args.device
        )
        print(f"\n{ne} of {args.heads} heads and {args.neurons:.0%} of the neurons deactivated")
        for name, seconds in times.items():
            print(describe(name, seconds))
        for slow, fast in (("unmerged", "merged"), ("unmerged", "pruned"), ("merged", "pruned")):
            bound, speed_up = counts[slow] / counts[fast], ratio(times[slow], times[fast])
            print(f"{slow} / {fast}: {speed_up}; by arithmetic {bound:.3f}, of which {speed_up.median / bound:.1%}")
        # the loop ends with merged / pruned, the pair that has a target
        share = speed_up.map(lambda x, bound=bound: 100 * x / bound)
        judge(
            "smaller" if args.neurons else "pruned", share, f"{short(dtype)}, {args.device}, {describe_cut(args, ne)}"
        )


if __name__ == "__main__":
    main()
