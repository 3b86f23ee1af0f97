"""`peft-heads export`: a saved adapter in another form, most of which other tools read without this package."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


# `--to`: its line in --help, and the function `(adapter, target, base_model=, overwrite=)` that writes it.
FORMATS = {
    "bi-lora": (
        "FILE.bin and FILE.yaml of Bi-LoRA's authors (k bits, q and v of a ViT-B/16)",
        "peft_heads.convert.bi_lora.convert:export_bi_lora",
    ),
    "lora": ("a stock LoRA adapter, masks folded in (mask_scope=adapter)", "peft_heads.convert.lora:export_lora"),
    "merged": ("an ordinary checkpoint of transformers", "peft_heads.convert.merged:export_merged"),
    "packed": (
        "the adapter itself with k bits per weight (adapter_bits < 32)",
        "peft_heads.convert.packed:export_packed",
    ),
    "pruned": (
        "a smaller checkpoint, deactivated heads and neurons removed (mask_scope=head, as many in every layer)",
        "peft_heads.convert.pruned:export_pruned",
    ),
}


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads export",
        description="Writes a saved adapter in another form. FORMAT is one of: "
        + "; ".join(f"{name}, {text}" for name, (text, _) in FORMATS.items())
        + ". What is written appears when it is complete.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub repository of the adapter")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=" | ".join(FORMATS))
    parser.add_argument("target", metavar="DIR", help="the new folder; of bi-lora the new FILE.bin")
    parser.add_argument("--base_model", help="folder or repository of the base model, if not the one it names")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an adapter or a checkpoint in DIR, or the files"
    )
    args = parser.parse_args(argv)

    module, _, name = FORMATS[args.to][1].partition(":")
    write = getattr(importlib.import_module(module), name)
    target = write(args.adapter, args.target, base_model=args.base_model, overwrite=args.overwrite)
    print(f"{args.adapter} -> {target} ({args.to})")
    print("\n".join(sizes(target)))
    return 0


def sizes(target: Path) -> list[str]:
    """A line for each file of a folder, or for a `.bin` and its `.yaml`."""
    files = sorted(target.iterdir()) if target.is_dir() else [target, target.with_suffix(".yaml")]
    return [f"  {path.stat().st_size:>13,} bytes  {path.name}" for path in files]
