"""`peft-heads demo`: LoRA and head-masked LoRA side by side, without network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads demo",
        description="Fine-tune a small ViT on handwritten digits: LoRA, and head-masked LoRA with heads chosen by "
        "Taylor score, at random, and the first. Needs no network, and less than a minute on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("peft-heads-demo"), help="where adapters and plots go")
    parser.add_argument(
        "--ne", type=int, choices=range(12), metavar="NE", default=3, help="heads to deactivate, 0 to 11 of 12"
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each run")
    parser.add_argument("--seed", type=int, default=0, help="of every run")
    args = parser.parse_args(argv)

    import torch

    from ..demo.run import run_demo

    # The model is tiny: a second thread gains little, and on a busy machine threads that wait for each other cost
    # many times the work.
    torch.set_num_threads(1)
    same = run_demo(args.output_dir, ne=args.ne, epochs=args.epochs, seed=args.seed, progress=sys.stderr.isatty())
    return 0 if same else 1
