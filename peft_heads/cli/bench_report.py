"""`peft-heads bench report`: tables and figures of a folder of results."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.suites import DEFAULT_SUITE


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads bench report",
        description="Prints the tables of a folder of results, with the published rows beside; with --output_dir, "
        "writes report.md, every table as CSV and LaTeX, and the figures (PNG). RESULTS_DIR/official holds complete "
        "runs of committed code, or of an installed package; the report says where they depart from the recipe of "
        "their suite.",
    )
    parser.add_argument("results", metavar="RESULTS_DIR", help="the folder that `bench run` and `bench sweep` wrote")
    parser.add_argument("--suite", default=DEFAULT_SUITE, help="suite to report (default %(default)s)")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="write the report there")
    parser.add_argument("--unofficial", action="store_true", help="include runs of uncommitted code and partial ones")
    parser.add_argument("--overwrite", action="store_true", help="replace files in DIR")
    args = parser.parse_args(argv)

    from ..benchmark.records.results import read_results

    runs = read_results(args.results, unofficial=args.unofficial)
    if not runs:
        hint = "" if args.unofficial else "; --unofficial reads those of uncommitted code and partial ones as well"
        raise ValueError(f"{args.results} holds no results{hint}")

    from ..adapter_folder.atomic import write_atomically
    from ..benchmark.records.plans import read_plans
    from ..benchmark.report import make_report

    files = make_report(runs, args.suite, read_plans(args.results))
    if args.output_dir is None:
        print(files["report.md"].partition("\n![")[0].rstrip())
        return 0
    existing = [name for name in files if (args.output_dir / name).exists()]
    if existing and not args.overwrite:
        raise ValueError(
            f"{args.output_dir} holds {existing[0]} already and nothing was changed; --overwrite replaces it"
        )
    for name in reversed(files):  # report.md, which shows the others, last
        write_atomically(args.output_dir / name, files[name])
    print(files["report.md"].partition("\n![")[0].rstrip())
    print(f"\n{len(files)} files in {args.output_dir}")
    return 0
