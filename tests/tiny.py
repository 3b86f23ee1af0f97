"""Tiny models and data with the structure of the real ones."""

import re

import torch
import transformers
from packaging.version import Version
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from peft_heads._compat.transformers import load_pil_image_processor
from peft_heads.demo.model import DEMO_MODEL_PATH
from peft_heads.heads import resolve_heads


IMAGE_SIZE = 16
NUM_LABELS = 3
# transformers >= 5.1 has a class of its own for the PIL backend
ViTProcessor = type(load_pil_image_processor(DEMO_MODEL_PATH))
# Names of ViT's and Swin's modules in the tests (transformers >= 5.9), and their earlier names. A dot may belong to a
# regular expression.
VERSION = Version(transformers.__version__)
OLD_NAMES = VERSION < Version("5.9")
_RENAMED = [
    (r"vit(\\?\.)layers", r"vit\1encoder\1layer"),
    (r"\blayers(?=\\?\.)", "layer"),
    (r"attention(\\?\.)(\(?[qkv]_proj)", r"attention\1attention\1\2"),
    (r"(attention\\?\.)?\bo_proj", "attention.output.dense"),
    (r"(mlp\\?\.)?\bfc1", "intermediate.dense"),
    (r"(mlp\\?\.)?\bfc2", "output.dense"),
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
]


def now(names):
    """Translate names or patterns of modules, alone or in a list, set or dict, for the installed transformers."""
    if isinstance(names, dict):
        return {now(name): value for name, value in names.items()}
    if not isinstance(names, str):
        return type(names)(map(now, names))
    for new, old in _RENAMED if OLD_NAMES else ():
        names = re.sub(new, old, names)
    return names


def make(name, seed=0, num_labels=NUM_LABELS):
    """Make a randomly initialised tiny ViT (6 heads in 2 layers) or Swin (stages of 2 and 4 heads, 2 layers each)."""
    torch.manual_seed(seed)
    labels = {"num_labels": num_labels}
    if name == "vit":
        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=32,
            image_size=IMAGE_SIZE,
            patch_size=4,
            **labels,
        )
        return ViTForImageClassification(config)
    config = SwinConfig(
        embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=2, image_size=IMAGE_SIZE, patch_size=4, **labels
    )
    return SwinForImageClassification(config)


def images(n=4, seed=0):
    """(n, 3, 16, 16)"""
    return torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def batch(n=4, seed=0):
    return {"pixel_values": images(n, seed), "labels": torch.arange(n) % NUM_LABELS}


def examples(n=32, seed=0):
    """Make a list dataset whose labels can be learned: the mean colour shows the class."""
    pixels = images(n, seed)
    return [{"pixel_values": pixels[i] + (i % NUM_LABELS), "labels": i % NUM_LABELS} for i in range(n)]


def randomize_lora(model, seed=0, std=0.5):
    """Give lora_B, which is initialised to zero, values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_(std=std, generator=generator)


def masks_off(model, *heads):
    """Return masks for `set_head_masks` that deactivate these heads in every projection that LoRA adapts."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    masks = {}
    for name, layout in resolve_heads(base, fused_parts="qv").items():
        for key, part in layout.named_parts(name).items():
            if part.role != "key":
                masks[key] = torch.ones(part.num_heads, dtype=torch.bool)
                masks[key][list(heads)] = False
    return masks


def gradients(model):
    """Return `{name: gradient}` of all trained parameters; each must have one."""
    grads = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    assert grads and not [name for name, grad in grads.items() if grad is None]
    return grads


def train(model, steps=3, seed=0, optimizer=None, lr=1e-2, after_backward=None):
    """Take a few optimizer steps in training mode; return the optimizer."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trainable, lr=lr, weight_decay=0.1)
    model.train()
    for step in range(steps):
        torch.manual_seed(seed + step)  # dropout
        model(**batch(seed=seed + step)).loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer
