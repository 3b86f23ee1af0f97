"""`peft-heads data`: check benchmark trees, show or empty the cache of decoded images."""

from __future__ import annotations

import argparse
import textwrap

from ..data.suites import DEFAULT_SUITE, SUITES


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads data", description="Benchmark trees on disk, and the cache of decoded images."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="check | info | clean")
    check = commands.add_parser(
        "check",
        description="Compares the tasks below ROOT with what was published: lists, number of images, labels, files. "
        "Exit code 1: something is missing or wrong.",
    )
    check.add_argument("root", metavar="ROOT", help="the folder that holds one folder per task")
    check.add_argument(
        "--suite",
        choices=[name for name, suite in SUITES.items() if not suite.generated],
        default=DEFAULT_SUITE,
        help="default: %(default)s; folder: images of your own",
    )
    check.add_argument("--task", nargs="+", default=[], metavar="TASK", help="only these (default: all of the suite)")
    check.add_argument(
        "--image_range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="the values that are black and white in images of more than 8 bits",
    )
    info = commands.add_parser("info", description="Shows what the cache of decoded images holds.")
    clean = commands.add_parser(
        "clean", description="Deletes the cache of decoded images, which is made again when it is needed."
    )
    for command in (info, clean):
        command.add_argument(
            "--cache_dir",
            metavar="DIR",
            help="default: PEFT_HEADS_CACHE of the environment, or ~/.cache/peft_heads/images",
        )
    args = parser.parse_args(argv)
    if args.command == "check":
        return check_trees(args.root, args.suite, args.task, args.image_range)
    return show_cache(args.cache_dir, clean=args.command == "clean")


def check_trees(root: str, suite: str, names: list[str], image_range: list[float] | None) -> int:
    from ..data.deep_images import check_image_range
    from ..data.loading import check_tasks

    reports = check_tasks(root, suite, names, check_image_range(image_range))
    for report in reports:
        print("\n".join(describe(report)))
    in_order = sum(not report.faults for report in reports)
    print(f"{in_order} of {len(reports)} tasks in order")
    return 0 if in_order == len(reports) else 1


def describe(report) -> list[str]:
    """The report on one task, as lines of text."""
    from ..data.trees import SHOWN_FAULTS

    state = f"{len(report.faults):,} fault{'s' if len(report.faults) > 1 else ''}" if report.faults else "in order"
    lines = [f"{report.task.name:22} {state}"]
    if report.layout:
        lines[0] += f"; {report.layout}, {report.image_format or 'no images'}"
        images = ", ".join(f"{split} {number:,}" for split, number in report.images.items())
        lines += textwrap.wrap(images, 100, initial_indent=" " * 4, subsequent_indent=" " * 4)
    lines += [f"    note: {note}" for note in report.notes]
    lines += [f"    {fault}" for fault in report.faults[:SHOWN_FAULTS]]
    if len(report.faults) > SHOWN_FAULTS:
        lines.append(f"    and {len(report.faults) - SHOWN_FAULTS:,} more")
    return lines


def show_cache(cache_dir: str | None, clean: bool) -> int:
    from ..data.cache import cache_entries, cache_size, clean_cache
    from ..data.image_store import default_cache_dir

    for entry in cache_entries(cache_dir):
        print(f"{entry.size:>16,} bytes  {entry.description}")
    print(f"{cache_size(cache_dir):>16,} bytes in {cache_dir or default_cache_dir()}")
    if clean:
        print(f"{clean_cache(cache_dir):>16,} bytes deleted")
    return 0
