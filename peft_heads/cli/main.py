"""The `peft-heads` command: a list of commands, each a module that is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import version

from .._compat import silence_known_warnings


@dataclass(frozen=True)
class Command:
    """A module with `run(argv: list[str]) -> int`, and its line in --help (kept here, so that nothing is imported)."""

    module: str
    help: str


COMMANDS = {
    "train": Command(
        "peft_heads.cli.train", "fine-tune an image classifier (head-masked LoRA, RLRR, LoRA, linear, full, …)"
    ),
    "bench": Command("peft_heads.cli.bench", "the papers' benchmarks: run, sweep, report"),
    "migrate": Command(
        "peft_heads.cli.migrate", "rewrite a LoRA adapter for the module names of the installed transformers"
    ),
    "export": Command(
        "peft_heads.cli.export", "write an adapter as stock LoRA, as an ordinary, also smaller, checkpoint, or packed"
    ),
    "import": Command("peft_heads.cli.import_", "an adapter folder from the files of Bi-LoRA's authors"),
    "inspect": Command("peft_heads.cli.inspect", "what an adapter is: settings, heads, parameters, bytes"),
    "data": Command("peft_heads.cli.data", "check benchmark trees; size of the image cache, and its deletion"),
    "demo": Command("peft_heads.cli.demo", "LoRA and head-masked LoRA side by side on a small model, without network"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; gives its exit code. 2: a wrong argument or unusable data, said in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        parser = build_parser()
        parser.parse_args(argv)  # exits for --help, --version and unknown commands
        parser.print_help()
        return 2
    silence_known_warnings()
    name, *rest = argv
    command = importlib.import_module(COMMANDS[name].module)
    try:
        return command.run(rest)
    except (ValueError, FileNotFoundError) as error:
        if not raised_by_this_package(error):
            raise
        print(f"peft-heads {name}: error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of the first word; the rest belongs to the command, which has its own --help."""
    parser = argparse.ArgumentParser(
        prog="peft-heads", description="Head-masked LoRA and RLRR for vision transformers."
    )
    parser.add_argument("--version", action="version", version=f"peft-heads {version('peft-heads')}")
    commands = parser.add_subparsers(title="commands (peft-heads COMMAND --help)", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


def raised_by_this_package(error: BaseException) -> bool:
    """Whether the error comes from a check of ours, with a message for the user; a library's keeps its traceback."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "peft_heads"


if __name__ == "__main__":
    sys.exit(main())
