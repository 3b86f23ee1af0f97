"""`peft-heads bench`: the papers' benchmarks. Its own commands are listed here, each a function that is given the rest."""

from __future__ import annotations

import argparse
import importlib


# Sub-command: its line in --help, and the function `(argv: list[str]) -> int` that runs it.
COMMANDS = {
    "run": ("train and evaluate one setting on one or more tasks", "peft_heads.cli.bench_run:run"),
    "sweep": (
        "compare settings: choose on validation images, report on test images",
        "peft_heads.cli.bench_run:sweep",
    ),
    "offline": ("evidence of our own, on data that are made here", "peft_heads.cli.bench_offline:run"),
    "report": ("tables and figures of a folder of results", "peft_heads.cli.bench_report:run"),
}


def run(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        parser = build_parser()
        parser.parse_args(argv)  # exits for --help and unknown commands
        parser.print_help()
        return 2
    name, *rest = argv
    module, _, function = COMMANDS[name][1].partition(":")
    return getattr(importlib.import_module(module), function)(rest)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the first word; the rest belongs to the sub-command, which has its own --help."""
    parser = argparse.ArgumentParser(prog="peft-heads bench", description="The papers' benchmarks, honestly run.")
    commands = parser.add_subparsers(title="commands (peft-heads bench COMMAND --help)", metavar="COMMAND")
    for name, (text, _) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser
