"""ViT-B/16 and smaller models with random weights, adapters on them, and a training step. Nothing is downloaded."""

from __future__ import annotations

import torch
from measure import add_arguments
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_heads import get_head_masks, set_head_masks
from peft_heads.backbones.classifier import classifier_names
from peft_heads.backbones.targets import default_targets


NUM_LABELS = 100


def add_vit_arguments(parser, **defaults: int) -> None:
    """Add options for the size of the ViT (ViT-B/16 by default), and more integers."""
    add_arguments(parser, **{"hidden": 768, "layers": 12, "heads": 12, "batch": 8, **defaults})


def make_vit(args) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden,
            num_labels=NUM_LABELS,
        )
    )


def describe_vit(args) -> str:
    return f"ViT, hidden {args.hidden}, {args.layers} layers, {args.heads} heads, batch {args.batch}"


def make_images(args) -> dict[str, torch.Tensor]:
    """Make a batch: `pixel_values` (batch, 3, 224, 224), `labels` (batch,)."""
    batch = {"pixel_values": torch.randn(args.batch, 3, 224, 224), "labels": torch.arange(args.batch) % NUM_LABELS}
    return {name: value.to(args.device) for name, value in batch.items()}


def stock_lora(vit, rank: int, **options) -> LoraConfig:
    """Configure LoRA on the projections that ours adapts, with a trained classifier."""
    return LoraConfig(r=rank, target_modules=default_targets(vit), modules_to_save=classifier_names(vit), **options)


def add_adapter(vit, config, deactivated: int = 0):
    """Return the model with an adapter, its first heads deactivated, in training mode."""
    model = get_peft_model(vit, config).train()
    for name, param in model.named_parameters():
        if "lora_B" in name:  # initialised to zero, which could be unfairly fast
            param.data.normal_(std=0.02)
    if deactivated:
        masks = get_head_masks(model)
        for mask in masks.values():
            mask[:deactivated] = False
        set_head_masks(model, masks)
    return model


def make_optimizer(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)


def backward(model, batch, dtype: torch.dtype = torch.float32) -> None:
    """Run one forward and backward pass; autocast computes in other types than float32."""
    with torch.autocast(batch["labels"].device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = model(**batch).loss
    loss.backward()


def training_step(model, optimizer, batch, dtype: torch.dtype = torch.float32, accumulation: int = 1) -> None:
    for _ in range(accumulation):
        backward(model, batch, dtype)
    optimizer.step()
    optimizer.zero_grad()


def add_dtype_argument(parser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="default: float32 on a CPU, bfloat16 (in training: autocast) on an accelerator",
    )


def chosen_dtype(args) -> torch.dtype:
    default = "float32" if torch.device(args.device).type == "cpu" else "bfloat16"
    return getattr(torch, args.dtype or default)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
