"""Time to import peft_heads beside peft, to load an adapter and to switch between two, against stock LoRA.

Imports are timed in fresh processes, in turns. Loading is `PeftModel.from_pretrained` onto an existing model; switching is
`set_adapter` between two adapters of a model. Both are timed in one process, in turns. The weights are random: nothing is
downloaded.

    python benchmarks/load_time.py [--imports 10 --loads 20 --rank 8]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import describe, device_name, interleaved, ratio, timed
from peft import PeftModel
from random_vit import add_adapter, add_vit_arguments, describe_vit, make_vit, stock_lora

from peft_heads import HeadMaskedLoraConfig, pack_adapter


STOCK, OURS, ONE_BIT, PACKED = "stock LoRA", "head-masked", "head-masked, 1 bit", "the same, packed"


def time_import(package):
    """Return the seconds of `import` in a fresh interpreter, without the interpreter's own start."""
    code = f"import time; start = time.perf_counter(); import {package}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def write_adapter(side, folder, args):
    vit = make_vit(args)
    bits = 1 if side in (ONE_BIT, PACKED) else 32
    config = HeadMaskedLoraConfig(r=args.rank, ne=args.ne, adapter_bits=bits)
    model = (
        add_adapter(vit, stock_lora(vit, args.rank))
        if side == STOCK
        else add_adapter(vit, config, deactivated=args.ne)
    )
    if side == PACKED:
        pack_adapter(model)
    model.save_pretrained(folder)


def loader(folder, args):
    """Return a function that loads an adapter, removes it again, and returns the seconds of loading."""
    vit = make_vit(args).to(args.device)

    def load():
        seconds, model = timed(lambda: PeftModel.from_pretrained(vit, folder), args.device)
        model.unload()
        return seconds

    return load


def switcher(folder, args):
    """Return a function that switches to the other of two adapters and back."""
    model = PeftModel.from_pretrained(make_vit(args).to(args.device), folder)
    model.load_adapter(folder, "other")

    def switch():
        model.set_adapter("other")
        model.set_adapter("default")

    return switch


def report(what, times, base, unit="ms"):
    print(f"\n{what}")
    for side, seconds in times.items():
        print(describe(side, seconds, unit))
    for side in times:
        if side != base:
            print(f"{what}, {side} / {base}: {ratio(times[side], times[base])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_vit_arguments(parser, imports=10, loads=20, rank=8, ne=3)
    args = parser.parse_args()
    print(f"{describe_vit(args)}, r={args.rank}, ne={args.ne}, {device_name(args.device)}")

    # every training imports the second
    packages = ("peft", "peft, transformers.trainer", "peft_heads")
    imports = interleaved({name: lambda name=name: time_import(name) for name in packages}, args.imports, warm_up=1)
    report("import", imports, "peft", "s")

    with tempfile.TemporaryDirectory() as root:
        folders = {side: str(Path(root, side)) for side in (STOCK, OURS, ONE_BIT, PACKED)}
        for side, folder in folders.items():
            write_adapter(side, folder, args)
        for what, make in (("load", loader), ("switch", switcher)):
            sides = {side: make(folder, args) for side, folder in folders.items()}
            report(what, interleaved(sides, args.loads, args.device), STOCK)


if __name__ == "__main__":
    main()
