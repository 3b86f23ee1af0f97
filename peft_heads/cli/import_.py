"""`peft-heads import`: an adapter folder from another program's files."""

from __future__ import annotations

import argparse
import importlib

from .export import files_of, sizes


# Its line in --help, and the function `(file, target, base_model=, overwrite=)` that reads it.
FORMATS = {
    "bi-lora": ("FILE.bin and FILE.yaml of Bi-LoRA's authors", "peft_heads.convert.bi_lora.convert:import_bi_lora")
}


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads import",
        description="Writes an adapter folder for another program's files. FORMAT is one of: "
        + "; ".join(f"{name}, {text}" for name, (text, _) in FORMATS.items())
        + ". The folder appears when it is complete.",
    )
    parser.add_argument("form", choices=FORMATS, metavar="FORMAT", help=" | ".join(FORMATS))
    parser.add_argument("file", metavar="FILE", help="the file; what belongs to it is read beside it")
    parser.add_argument("target", metavar="DIR", help="the new folder")
    parser.add_argument(
        "--base_model", help="folder or repository of the base model, if not the one that the format is for"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter or a checkpoint in DIR")
    args = parser.parse_args(argv)

    module, _, name = FORMATS[args.form][1].partition(":")
    read = getattr(importlib.import_module(module), name)
    target = read(args.file, args.target, base_model=args.base_model, overwrite=args.overwrite)
    print(f"{args.file} -> {target} ({args.form})")
    print("\n".join(sizes(files_of(target))))
    return 0
