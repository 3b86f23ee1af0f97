"""`peft-heads migrate`: a saved adapter for the module names of the transformers that is installed."""

from __future__ import annotations

import argparse
from importlib.metadata import version


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads migrate",
        description="transformers renames modules of vision models now and then (ViT, DeiT, BEiT, Swin in 5.9, DINOv2 "
        "in 5.18), and LoRA adapters saved before no longer load. Rewrites the names in an adapter's weights and "
        "configuration; what is not understood stays as it is. Head-masked adapters load without.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the adapter")
    parser.add_argument("--base_model", help="folder or repository of its base model, if not the one it names")
    args = parser.parse_args(argv)

    from ..convert.migrate import migrate_adapter
    from ..heads.protocol import module_patterns

    names = migrate_adapter(args.folder, args.base_model)
    transformers = f"transformers {version('transformers')}"
    if not names:
        print(f"{args.folder}: the names are those of {transformers} already; nothing was changed")
        return 0
    print(f"{args.folder}: {len(names)} modules renamed for {transformers}")
    for line in dict.fromkeys(f"  {module_patterns([old])} -> {module_patterns([new])}" for old, new in names.items()):
        print(line)
    return 0
