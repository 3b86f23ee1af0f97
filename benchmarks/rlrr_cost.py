"""Step time and peak memory of RLRR against stock LoRA and scaling in the manner of SSF; and what RLRR trains.

All sides in one process, interleaved step by step, so that they see the same machine; medians, the ratios to stock LoRA
and to the floor (a forward pass and the gradient of the input, with nothing but the classifier trained and the patches'
embedding asked for its gradient), with the spread of the step-by-step ratios. Random weights: nothing is downloaded.
Peak memory is that of the accelerator or, on a CPU, of the tensors that are kept for the backward pass.

    python benchmarks/rlrr_cost.py [--hidden 768 --layers 12 --heads 12 --batch 32 --steps 20 --bf16]
    python benchmarks/rlrr_cost.py --count
"""

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from peft_heads import RLRRConfig


VTAB_CLASSES = 49.5  # of a task of VTAB-1K, on average
MODELS = {  # what the paper says it trains, in millions
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
    """SSF: a layer's output times γ plus β, per channel."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        channels = layer.weight.shape[0]
        self.weight = layer.weight  # which the patch embedding is asked for
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        y = self.layer(x)
        shape = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        return y * self.scale.view(shape) + self.shift.view(shape)


def scaled(vit):
    """A model of which every linear layer, layer norm and the patch embedding is scaled and shifted as by SSF."""
    vit.requires_grad_(False)
    vit.classifier.requires_grad_(True)
    for name, module in list(vit.vit.named_modules()):
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Conv2d)):
            vit.vit.set_submodule(name, Scale(module))
    return vit


def floor(vit):
    """The frozen model with its classifier, back to the patches' embedding."""
    vit.requires_grad_(False)
    vit.classifier.requires_grad_(True)
    vit.vit.embeddings.cls_token.requires_grad_(True)
    return vit


def lora(vit, targets, rank):
    return get_peft_model(vit, LoraConfig(r=rank, target_modules=targets, modules_to_save=["classifier"]))


SIDES = {
    "floor": floor,
    "LoRA q, v": lambda vit: lora(vit, ["q_proj", "v_proj"], 8),
    "LoRA all": lambda vit: lora(vit, ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], 8),
    "SSF": scaled,
    "RLRR": lambda vit: get_peft_model(vit, RLRRConfig()),
    "RLRR r=8": lambda vit: get_peft_model(vit, RLRRConfig(r=8)),
}


def make(side, args):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden,
        num_labels=100,
    )
    model = SIDES[side](ViTForImageClassification(config)).train()
    for name, param in model.named_parameters():
        if "lora_B" in name:  # zero at initialisation, which could be unfairly fast
            param.data.normal_(std=0.02)
    return model


def forward(model, batch, bf16):
    device = batch["pixel_values"].device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        return model(**batch).loss


def step(model, optimizer, batch, bf16):
    synchronize = torch.cuda.synchronize if batch["labels"].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    forward(model, batch, bf16).backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - start


def memory(model, optimizer, batch, bf16):
    """MiB at the peak of a step beyond the weights; on a CPU, what is kept for the backward pass and is no weight."""
    if batch["labels"].is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, optimizer, batch, bf16)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, batch, bf16)
    loss.backward()
    optimizer.zero_grad()
    return sum(kept.values()) / 2**20


def count():
    print("trained parameters in millions, with the head of an average VTAB-1K task (49.5 classes)")
    for name, (model_class, config, width, paper) in MODELS.items():
        with torch.device("meta"):
            base = model_class(config)
        model = get_peft_model(base, RLRRConfig(), low_cpu_mem_usage=True)
        adapter = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "rlrr_" in n)
        print(f"{name:9} {(adapter + VTAB_CLASSES * (width + 1)) / 1e6:.3f}   paper {paper:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"hidden": 768, "layers": 12, "heads": 12, "batch": 8, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--count", action="store_true", help="only count what is trained, of four backbones")
    args = parser.parse_args()
    if args.count:
        return count()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = {"pixel_values": torch.randn(args.batch, 3, 224, 224), "labels": torch.arange(args.batch) % 100}
    batch = {name: value.to(device) for name, value in batch.items()}
    models, times, peaks = {}, {side: [] for side in SIDES}, {}
    for side in SIDES:
        model = make(side, args).to(device)
        models[side] = model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for index in range(args.steps + 2):
        for side in list(SIDES) if index % 2 else list(reversed(SIDES)):
            seconds = step(*models[side], batch, args.bf16)
            if index >= 2:  # warm-up
                times[side].append(seconds)
    for side in SIDES:
        peaks[side] = memory(*models[side], batch, args.bf16)

    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(
        f"ViT, hidden {args.hidden}, {args.layers} layers, batch {args.batch}, {'bf16' if args.bf16 else 'fp32'}, {name}"
    )
    print("                 trained    median     ratio to the floor      ratio to LoRA q, v        memory")
    for side, (model, _) in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ratios = " ".join(ratio(times[side], times[other]) for other in ("floor", "LoRA q, v"))
        median = 1e3 * statistics.median(times[side])
        print(f"{side:10} {trained:>13,} {median:8.1f} ms   {ratios} {peaks[side]:9.1f} MiB")


def ratio(seconds, others):
    """The median of the step-by-step ratios, and the middle half of them."""
    ratios = sorted(a / b for a, b in zip(seconds, others, strict=True))
    quarter = len(ratios) // 4
    return f"{statistics.median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f})"


if __name__ == "__main__":
    main()
