"""`peft-heads export`: a saved adapter in another form, most of which other tools read without this package."""

from __future__ import annotations

import argparse
import importlib


# `--to`: its line in --help, and the function `(adapter, target, base_model=, overwrite=)` that writes it.
FORMATS = {
    "lora": ("a stock LoRA adapter, masks folded in (mask_scope=adapter)", "peft_heads.export:export_lora"),
    "merged": ("an ordinary checkpoint of transformers", "peft_heads.export:export_merged"),
    "packed": ("the adapter itself with k bits per weight (adapter_bits < 32)", "peft_heads.export:export_packed"),
    "pruned": (
        "a smaller checkpoint, deactivated heads removed (mask_scope=head, as many in every layer)",
        "peft_heads.pruning:export_pruned",
    ),
}


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads export",
        description="Writes a saved adapter in another form. FORMAT is one of: "
        + "; ".join(f"{name}, {text}" for name, (text, _) in FORMATS.items())
        + ". The folder appears when it is complete.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub repository of the adapter")
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=" | ".join(FORMATS))
    parser.add_argument("target", metavar="DIR", help="the new folder")
    parser.add_argument("--base_model", help="folder or repository of the base model, if not the one it names")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter or a checkpoint in DIR")
    args = parser.parse_args(argv)

    module, _, name = FORMATS[args.to][1].partition(":")
    write = getattr(importlib.import_module(module), name)
    target = write(args.adapter, args.target, base_model=args.base_model, overwrite=args.overwrite)
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    print(f"{args.adapter} -> {target} ({args.to})")
    for name, size in files.items():
        print(f"  {size:>13,} bytes  {name}")
    return 0
