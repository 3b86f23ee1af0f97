"""`peft-heads export`: a saved adapter in another form, most of which other tools read without this package."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path


# `--to`: its line in --help, and the function `(adapter, target, base_model=, overwrite=)` that writes it. It returns
# the target, or a report of what it has written, with `path`, `files` and `lines()`.
FORMATS = {
    "bi-lora": (
        "FILE.bin and FILE.yaml of Bi-LoRA's authors (k bits, q and v of a ViT-B/16)",
        "peft_heads.convert.bi_lora.convert:export_bi_lora",
    ),
    "lora": ("a stock LoRA adapter, masks folded in (mask_scope=adapter)", "peft_heads.convert.lora:export_lora"),
    "merged": ("an ordinary checkpoint of transformers", "peft_heads.convert.merged:export_merged"),
    "onnx": (
        "FILE.onnx, which ONNX Runtime reads, of an adapter or a merged or pruned checkpoint",
        "peft_heads.convert.onnx:export_onnx",
    ),
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
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder or Hub repository of the adapter; for onnx also a checkpoint's folder",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=" | ".join(FORMATS))
    parser.add_argument("target", metavar="DIR", help="the new folder; of bi-lora the new FILE.bin, of onnx FILE.onnx")
    parser.add_argument("--base_model", help="folder or repository of the base model, if not the one it names")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an adapter or a checkpoint in DIR, or the files"
    )
    onnx = parser.add_argument_group("of --to onnx")
    onnx.add_argument(
        "--int8",
        choices=("dynamic", "static"),
        help="8 bits for the linear layers, activations scaled for each batch, or once for all by --calibration; speed "
        "is compared with float32",
    )
    onnx.add_argument("--calibration", metavar="FOLDER", help="images for static, some hundred like those of the task")
    onnx.add_argument(
        "--eval_dir",
        metavar="FOLDER",
        help="images in FOLDER/CLASS/ on which int8 and float32 are compared; otherwise it is those of --calibration",
    )
    args = parser.parse_args(argv)
    options = {name: getattr(args, name) for name in ("int8", "calibration", "eval_dir")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and args.to != "onnx":
        raise ValueError(f"--{next(iter(options))} goes with --to onnx, not with --to {args.to}")

    module, _, name = FORMATS[args.to][1].partition(":")
    write = getattr(importlib.import_module(module), name)
    written = write(args.adapter, args.target, base_model=args.base_model, overwrite=args.overwrite, **options)
    target = getattr(written, "path", written)
    print(f"{args.adapter} -> {target} ({args.to})")
    print("\n".join(sizes(getattr(written, "files", None) or files_of(target))))
    if target is not written:
        print("\n".join(written.lines()))
    return 0


def files_of(target: Path) -> list[Path]:
    """The files of a folder, or a `.bin` and its `.yaml`."""
    return sorted(target.iterdir()) if target.is_dir() else [target, target.with_suffix(".yaml")]


def sizes(files: list[Path]) -> list[str]:
    """A line for each file."""
    return [f"  {path.stat().st_size:>13,} bytes  {path.name}" for path in files]
