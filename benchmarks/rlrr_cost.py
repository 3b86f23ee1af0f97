"""Step time and memory of RLRR against stock LoRA and against scaling as in SSF; and the number of trained parameters.

All sides run in one process, in turns. The script prints the ratios, step by step, to LoRA on q and v and to the floor. The
floor is a forward pass and the gradients of the tokens from the last layer to the first, which RLRR and SSF both need: a
frozen model of which only the classifier and the class token (768 numbers) are trained. On an accelerator memory is the
peak of a step beyond the model; on a CPU it is the bytes kept for the backward pass, without weights. The weights are
random: nothing is downloaded.

    python benchmarks/rlrr_cost.py [--batch 8 --steps 20 --rank 8]
    python benchmarks/rlrr_cost.py --device cuda --batch 64 --steps 100
    python benchmarks/rlrr_cost.py --count
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from measure import describe, device_name, interleaved, peak_memory, ratio
from peft import get_peft_model
from random_vit import (
    add_adapter,
    add_dtype_argument,
    add_vit_arguments,
    backward,
    chosen_dtype,
    describe_vit,
    make_images,
    make_optimizer,
    make_vit,
    short,
    stock_lora,
    training_step,
)
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from peft_heads import RLRRConfig


FLOOR, STOCK = "floor", "LoRA q, v"
ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
VTAB_CLASSES = 49.5  # average over the tasks of VTAB-1K
MODELS = {  # the last number: trained parameters by the paper, in millions
    "ViT-B/16": (ViTForImageClassification, ViTConfig(num_labels=2), 768, 0.33),
    "ViT-L/16": (
        ViTForImageClassification,
        ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        1024,
        0.82,
    ),
    "ViT-H/14": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14
        ),
        1280,
        1.33,
    ),
    "Swin-B": (
        SwinForImageClassification,
        SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
        1024,
        0.41,
    ),
}


class Scale(nn.Module):
    """SSF: a layer's output is multiplied by γ and shifted by β, per channel."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        channels = layer.weight.shape[0]
        self.weight = layer.weight  # the model reads the patch embedding's weight
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        y = self.layer(x)
        shape = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        return y * self.scale.view(shape) + self.shift.view(shape)


def scaled(vit):
    """Scale and shift every linear layer, every layer norm and the patch embedding, as SSF does."""
    vit.requires_grad_(False)
    vit.classifier.requires_grad_(True)
    for name, module in list(vit.vit.named_modules()):
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
            vit.vit.set_submodule(name, Scale(module))
    return vit


def floor(vit):
    """Freeze all but the classifier and the class token, so that gradients flow through the whole model."""
    vit.requires_grad_(False)
    vit.classifier.requires_grad_(True)
    vit.vit.embeddings.cls_token.requires_grad_(True)
    return vit


def lora_on_all_layers(vit, rank):
    config = stock_lora(vit, rank)
    config.target_modules = set(ALL_LAYERS)
    return add_adapter(vit, config)


SIDES = {  # functions of the model and LoRA's rank
    FLOOR: lambda vit, rank: floor(vit),
    STOCK: lambda vit, rank: add_adapter(vit, stock_lora(vit, rank)),
    "LoRA all layers": lora_on_all_layers,
    "SSF": lambda vit, rank: scaled(vit),
    "RLRR": lambda vit, rank: add_adapter(vit, RLRRConfig()),
    "RLRR r=8": lambda vit, rank: add_adapter(vit, RLRRConfig(r=8)),
}


def memory(model, optimizer, batch, dtype):
    """Return the peak bytes of a step beyond the model; on a CPU, the bytes kept for the backward pass, without weights."""
    if batch["labels"].is_cuda:
        before, peak = peak_memory(lambda: training_step(model, optimizer, batch, dtype), batch["labels"].device)
        return peak - before
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward(model, batch, dtype)
    optimizer.zero_grad()
    return sum(kept.values())


def count():
    print("trained parameters in millions, with the classifier of an average VTAB-1K task (49.5 classes)")
    for name, (model_class, config, width, paper) in MODELS.items():
        with torch.device("meta"):
            base = model_class(config)
        model = get_peft_model(base, RLRRConfig(), low_cpu_mem_usage=True)
        adapter = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "rlrr_" in n)
        print(f"{name:9} {(adapter + VTAB_CLASSES * (width + 1)) / 1e6:.3f}   paper {paper:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_vit_arguments(parser, steps=20, rank=8)
    add_dtype_argument(parser)
    parser.add_argument("--count", action="store_true", help="only count the trained parameters of four backbones")
    args = parser.parse_args()
    if args.count:
        return count()

    dtype, batch = chosen_dtype(args), make_images(args)
    print(f"{describe_vit(args)}, LoRA's r={args.rank}, {short(dtype)}, {device_name(args.device)}")
    models = {side: make(make_vit(args), args.rank).train().to(args.device) for side, make in SIDES.items()}
    optimizers = {side: make_optimizer(model) for side, model in models.items()}
    times = interleaved(
        {side: partial(training_step, models[side], optimizers[side], batch, dtype) for side in SIDES},
        args.steps,
        args.device,
    )
    peaks = {side: memory(models[side], optimizers[side], batch, dtype) for side in SIDES}
    for side, seconds in times.items():
        trained = sum(param.numel() for param in models[side].parameters() if param.requires_grad)
        print(f"{describe(side, seconds)}, {trained:,} trained, {peaks[side] / 2**20:.1f} MiB of memory")
    for other in (FLOOR, STOCK):
        for side in SIDES:
            if side not in (FLOOR, other):
                memories = f"memory {peaks[side] / peaks[other]:.3f}"
                print(f"step, {side} / {other}: {ratio(times[side], times[other])}; {memories}")


if __name__ == "__main__":
    main()
