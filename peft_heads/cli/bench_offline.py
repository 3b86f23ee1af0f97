"""`peft-heads bench offline`: the evidence of our own, on data that are made here."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path


QUICK = {"epochs": 3, "head_warmup_epochs": 2}
QUICK_TASKS = ("digits",)


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads bench offline",
        description="Fine-tunes the small ViT that ships with the package on six tasks (scikit-learn's digits and five "
        "generated ones, written to OUTPUT_DIR/data) with every method and criterion, and prints what the results say. "
        "Runs on one thread of one CPU, so that results can be repeated. To use several CPUs, start it several times at "
        "once with other seeds or tasks, and in the end once more without them, for the report on all. A run that has a "
        "result is not repeated; a killed run starts again.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="data, results and the report")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--core", action="store_true", help="only the methods and the criteria, none of the side settings"
    )
    size.add_argument("--quick", action="store_true", help="few runs of few epochs, to see that everything works")
    parser.add_argument("--seed", type=int, nargs="+", help="default: 0 to 4")
    parser.add_argument("--task", nargs="+", help="default: all six")
    parser.add_argument(
        "--dry_run", action="store_true", help="only say how many runs there are, and with which settings"
    )
    args = parser.parse_args(argv)

    import torch
    from accelerate import PartialState

    from ..benchmark.engine.execution import Outcome, execute
    from ..benchmark.engine.places import Places
    from ..benchmark.engine.trunk import clear_trunks
    from ..benchmark.offline.settings import OFFLINE_TASKS, SEEDS, offline_settings, offline_specs
    from ..benchmark.recipes import RECIPES
    from ..benchmark.records.effective import describe_settings, effective_method
    from ..benchmark.records.results import read_results
    from ..data.tasks import OFFLINE, find_task
    from ..demo.offline_tasks import write_offline_task
    from .bench_run import finish, goes_on, progress_bar
    from .bench_settings import effective_lines

    if PartialState(cpu=True).num_processes > 1:
        raise ValueError(
            "bench offline runs in one process: start it several times, with other seeds or tasks, not by torchrun"
        )
    torch.set_num_threads(1)  # sums in another order have other results
    names = args.task or (QUICK_TASKS if args.quick else [task.name for task in OFFLINE_TASKS])
    tasks = [find_task(name, OFFLINE) for name in names]
    recipe = dataclasses.replace(RECIPES[OFFLINE], **(QUICK if args.quick else {}))
    seeds = args.seed or (SEEDS[:2] if args.quick else SEEDS)
    settings = offline_settings(core=args.core, quick=args.quick)
    specs = offline_specs(settings.values(), recipe, seeds, tasks)
    trainings = len(specs) // 2
    print(f"{trainings:,} trainings of {recipe.epochs} epochs, each evaluated on validation and on test images")
    print("\n".join(effective_lines([spec for spec in specs if spec.seed == seeds[0]])), flush=True)
    if args.dry_run:
        for name, method in settings.items():
            effective = effective_method(method, recipe.settings())
            print(f"  {name}: {describe_settings(effective) or 'no settings'}")
        return 0
    data = args.output_dir / "data"
    for task in tasks:
        write_offline_task(data, task.name)
    outcome = Outcome()
    places = Places(
        data,
        args.output_dir,
        cache_dir=args.output_dir / "cache",
        cache_test_images=True,
        save_every=0,
        use_cpu=True,
    )
    with goes_on(outcome):
        execute(specs, places, outcome, progress=progress_bar)
    clear_trunks(places)
    if outcome.runs:
        # including the runs of other processes
        found = {run.spec.run_id: run for run in read_results(args.output_dir, unofficial=True)}
        found = {run_id: run for run_id, run in found.items() if run.spec.epochs == recipe.epochs}
        report(list((found | outcome.runs).values()), args.output_dir / "report")
    return finish(outcome, args)


def report(runs: list, folder: Path) -> None:
    """Print the tables of the evidence, and write them with the benchmark's own report."""
    from ..adapter_folder.atomic import write_atomically
    from ..benchmark.offline.evidence import make_records, write_records
    from ..benchmark.offline.evidence_plots import plot_differences
    from ..benchmark.offline.evidence_tables import FOR_SCALE, evidence_tables
    from ..benchmark.report import make_report
    from ..benchmark.report.tables import to_csv, to_markdown, to_text
    from ..data.tasks import OFFLINE
    from ..scoring.plotting import figure_bytes

    records = make_records(runs)
    tables = evidence_tables(records)
    files = {f"{name}.csv": to_csv(table) for name, table in tables.items()}
    files |= {"runs.csv": write_records(records), "evidence.md": "\n".join(map(to_markdown, tables.values()))}
    for name in ("comparisons", "choice"):
        if name in tables and any(row.section != FOR_SCALE for row in tables[name].rows):
            files[f"{name}.png"] = figure_bytes(plot_differences(tables[name]))
    files |= make_report(runs, OFFLINE)
    for name, content in files.items():
        write_atomically(folder / name, content)
    for table in tables.values():
        print("\n" + to_text(table, table.columns) + "\n".join(table.notes))
    print(f"\n{folder}: evidence.md has these tables, report.md the accuracies and figures")
