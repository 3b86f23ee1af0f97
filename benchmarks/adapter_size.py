"""Bytes of saved adapters of ViT-B/16 (q and v), by bits and deactivated heads, beside the arithmetic limit.

The script writes files and measures them; the classifier does not count. The limit counts only the bits of the codes of
active heads: 24 · r · (768 + 64 · (12 − ne)) · bits / 8. The weights are random: nothing is downloaded.

    python benchmarks/adapter_size.py [--r 32 --bits 32 8 4 2 1 --ne 0 1 3 6]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_heads import HeadMaskedLoraConfig, get_head_masks, pack_adapter, set_head_masks
from peft_heads.backbones.targets import default_targets
from peft_heads.convert.inspect import inspect_adapter


def size_of(config, ne=0):
    """Return the bytes of the weights' file without the classifier."""
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig())
    if config.target_modules is None and not isinstance(config, HeadMaskedLoraConfig):
        config.target_modules = default_targets(base)
    model = get_peft_model(base, config).to_empty(device="cpu")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                param.normal_()
    if ne:
        set_head_masks(model, {name: torch.arange(12) >= ne for name in get_head_masks(model)})
    if getattr(config, "adapter_bits", 32) < 32:
        pack_adapter(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = Path(folder, "adapter_model.safetensors").stat().st_size
        return weights - inspect_adapter(folder).bytes["classification head"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 8, 4, 2, 1])
    parser.add_argument("--ne", type=int, nargs="+", default=[0, 1, 3, 6])
    args = parser.parse_args()

    stock = size_of(LoraConfig(r=8, modules_to_save=["classifier"]))
    limit = 24 * 8 * (768 + 768) * 4
    print(f"stock LoRA, r=8: {stock:,} bytes (limit {limit:,}; {stock / limit:.3f} of it)\n")
    print(f"head-masked LoRA, r={args.r}\nbits  ne       bytes       limit   bytes / limit      MiB")
    for bits in args.bits:
        for ne in args.ne:
            size = size_of(HeadMaskedLoraConfig(ne=ne, r=args.r, adapter_bits=bits), ne)
            limit = 24 * args.r * (768 + 64 * (12 - ne)) * bits // 8
            print(f"{bits:4}  {ne:2}  {size:10,}  {limit:10,}   {size / limit:13.3f}   {size / 2**20:6.3f}")


if __name__ == "__main__":
    main()
