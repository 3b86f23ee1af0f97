"""The `peft-heads` command: a list of commands, each a module that is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import version

from .._compat.transformers import silence_known_warnings
from ..plugins import import_plugin, load_plugins, take_plugin_words
from .errors import INTERRUPTED, explain


@dataclass(frozen=True)
class Command:
    """A module with `run(argv: list[str]) -> int`, and its line in --help (which is kept here, so that no command is imported)."""

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
        "peft_heads.cli.export",
        "write an adapter as stock LoRA, as an ordinary, also smaller, checkpoint, packed, or as ONNX",
    ),
    "import": Command("peft_heads.cli.import_", "an adapter folder from the files of Bi-LoRA's authors"),
    "inspect": Command("peft_heads.cli.inspect", "what an adapter is: settings, heads, parameters, bytes"),
    "predict": Command(
        "peft_heads.cli.predict", "label and probability of images, by an adapter, a checkpoint or an ONNX file"
    ),
    "data": Command("peft_heads.cli.data", "check benchmark trees; size of the image cache, and its deletion"),
    "demo": Command("peft_heads.cli.demo", "LoRA and head-masked LoRA side by side on a small model, without network"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    2 means a wrong argument or unusable data, 1 a full disk, no network, or what the command says, 130 Ctrl-C. One line
    says what happened; with PEFT_HEADS_TRACEBACK=1 in the environment the traceback follows.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        parser = build_parser()
        parser.parse_args(argv)  # exits for --help, --version and unknown commands
        parser.print_help()
        return 2
    name, *rest = argv
    try:
        silence_known_warnings()
        plugins, rest = take_plugin_words(rest)
        load_plugins()
        for module in plugins:
            import_plugin(module)
        return importlib.import_module(COMMANDS[name].module).run(rest)
    except KeyboardInterrupt as interrupt:
        print(f"peft-heads {name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        code, text = explained
        print(f"peft-heads {name}: error: {text}", file=sys.stderr)
        return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of the first word; the rest belongs to the command, which has its own --help."""
    parser = argparse.ArgumentParser(
        prog="peft-heads",
        description="Head-masked LoRA and RLRR for vision transformers.",
        epilog="Every command takes --plugin MODULE: a module that adds methods or criteria.",
    )
    parser.add_argument("--version", action="version", version=f"peft-heads {version('peft-heads')}")
    commands = parser.add_subparsers(title="commands (peft-heads COMMAND --help)", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
