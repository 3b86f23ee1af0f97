"""`peft-heads bench run` and `peft-heads bench sweep`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..data.loading import find_tasks
from ..data.suites import SUITES


def run(argv: list[str]) -> int:
    from .bench_arguments import build_parser
    from .method_options import named_method

    parser = build_parser(
        "run",
        "Trains one setting and evaluates it once, at the end: by default on all but the test images and on these, with "
        "--validation on the images by which settings are chosen. A run that has a result is not repeated.",
        lists=False,
        method=named_method(argv),
    )
    parser.add_argument("--validation", action="store_true", help="train and evaluate without test images")
    args = parser.parse_args(argv)
    _check_single(args)
    sweep, places = _prepare(args, {})

    from ..benchmark.engine.execution import Outcome, execute
    from .bench_settings import effective_lines

    specs = sweep.runs(sweep.methods(), sweep.seeds, final=not args.validation)
    say(effective_lines(specs, args.any_size))
    outcome = Outcome()
    with goes_on(outcome):
        execute(specs, places, outcome, test_every=args.test_every, progress=progress_bar)
    if _is_main():
        for done in outcome.runs.values():
            print(f"{done.spec.task:22} seed {done.spec.seed}  {100 * done.result.accuracy:6.2f} %  {done.path}")
    return finish(outcome, args)


def sweep(argv: list[str]) -> int:
    from .bench_arguments import build_parser
    from .method_options import named_method

    parser = build_parser(
        "sweep",
        "Compares settings under the protocol: --tune is chosen task by task on validation images, everything else that "
        "has several values makes rows of the report; then each is trained on all but the test images and evaluated on "
        "these, once. Without more arguments, what the papers try. A run that has a result is not "
        "repeated, and a killed run goes on from its checkpoint.",
        lists=True,
        method=named_method(argv),
    )
    parser.add_argument("--tune", nargs="*", metavar="NAME", help="settings to choose per task (default: scale)")
    parser.add_argument("--search_seed", type=int, nargs="+", default=[0], help="seeds of the runs to choose by")
    parser.add_argument(
        "--no_shared_warmup", action="store_true", help="let every run train the epochs before its heads are selected"
    )
    parser.add_argument(
        "--storage", metavar="URL|FILE", help="share the sweep with other machines by Optuna's storage"
    )
    parser.add_argument("--study_name", help="in the storage (default: one per plan)")
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="also take the runs that other machines have begun so far, because those machines are gone",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="only say how many runs there are, and with which settings"
    )
    args = parser.parse_args(argv)
    sweep, places = _prepare(args, {} if args.tune is None else {"tuned": tuple(args.tune)})

    from ..benchmark.engine.execution import Outcome
    from ..benchmark.engine.sweep import run_sweep
    from .bench_settings import effective_lines

    effective = effective_lines(sweep.runs(sweep.methods(), sweep.seeds[:1], final=True), args.any_size)
    if args.dry_run:
        search = sweep.search()
        reported = len(sweep.variants()) * len(sweep.runs(sweep.methods()[:1], sweep.seeds, final=True))
        print(f"{len(search):,} runs to choose by, {reported:,} to report")
        print(f"recipe: {sweep.recipe.paper}")
        for setting, accuracy in sweep.recipe.expected.items():
            print(f"  published: {accuracy:.2f} %  {setting}")
        say(effective)
        return 0
    say(effective)
    outcome = Outcome()
    with goes_on(outcome):
        run_sweep(
            sweep,
            places,
            outcome,
            share_warmup=not args.no_shared_warmup,
            test_every=args.test_every,
            progress=progress_bar,
            queue=_queue(args, sweep) if args.storage and _is_main() else None,
        )
    if _is_main() and outcome.runs:
        from ..adapter_folder.atomic import write_atomically
        from ..benchmark.report import make_report, summarize

        files = make_report(outcome.runs.values(), args.suite, sweep.choices())
        folder = places.work.parent / "report"
        for name in reversed(files):
            write_atomically(folder / name, files[name])
        print(summarize(outcome.runs.values(), args.suite, sweep.choices()))
        print(f"{len(files)} files in {folder}: report.md has all tables, what the rows share, and the figures")
    return finish(outcome, args)


def _prepare(args: argparse.Namespace, settings: dict[str, Any]):
    """The sweep and its places."""
    import torch
    from accelerate import PartialState

    from ..benchmark.engine.places import Places
    from ..benchmark.engine.sweep import Sweep
    from .bench_arguments import read_method, read_recipe

    # First of all: a process that is not told its device takes itself for the only one, on a CPU.
    use_cpu = args.use_cpu or not torch.accelerator.is_available()
    PartialState(cpu=use_cpu)
    has_shots = bool(SUITES[args.suite].shots)
    sweep = Sweep(
        find_tasks(args.data_root, args.suite, args.task),
        read_method(args),
        read_recipe(args),
        args.model_name_or_path,
        seeds=tuple(args.seed),
        search_seeds=tuple(getattr(args, "search_seed", (0,))),
        shots=tuple(args.shots) if has_shots else (None,),
        list_seeds=tuple(args.list_seed) if has_shots else (None,),
        **settings,
    )
    places = Places(
        args.data_root,
        args.output_dir,
        cache_dir=args.cache_dir,
        check_sizes=not args.any_size,
        cache_test_images=args.cache_test_images,
        save_every=args.save_every,
        num_workers=args.num_workers,
        use_cpu=use_cpu,
    )
    return sweep, places


def _queue(args: argparse.Namespace, sweep):
    from ..benchmark.engine.optuna_queue import SharedQueue, default_study_name

    name = args.study_name or default_study_name(sweep.plan())
    return SharedQueue(args.storage, name, args.output_dir, args.take_over)


def _check_single(args: argparse.Namespace) -> None:
    """Raise ValueError if a setting has several values: `bench run` runs one, and the papers try several."""
    from .bench_arguments import read_method

    open_choices = [name for name, value in read_method(args).items() if isinstance(value, list)]
    if open_choices:
        names = ", ".join(f"--{name}" for name in open_choices)
        raise ValueError(f"one setting is run: give {names} (bench sweep tries several values)")


def progress_bar(count: int, title: str):
    from tqdm import tqdm

    return tqdm(total=count, desc=title, unit="run", file=sys.stderr, disable=not _is_main())


def say(lines: list[str]) -> None:
    """Print lines once, from the main process."""
    if _is_main():
        print("\n".join(lines), flush=True)


@contextmanager
def goes_on(outcome) -> Iterator[None]:
    """Around the runs: Ctrl-C reports how many are finished, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        where = f" at {interrupt}" if str(interrupt) else ""
        raise KeyboardInterrupt(
            f"interrupted{where}; {len(outcome.runs):,} runs of this command are finished and kept: the same command, "
            "given again, goes on from there"
        ) from interrupt


def _is_main() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def finish(outcome, args: argparse.Namespace) -> int:
    """Report the failures and return the exit code; the processes end together."""
    from accelerate import PartialState

    if _is_main():
        for run_id, why in outcome.failed.items():
            print(f"failed: {run_id}: {why}", file=sys.stderr)
        for note in outcome.not_chosen:
            print(f"not chosen: {note}", file=sys.stderr)
        if outcome.failed:
            print(f"{len(outcome.failed)} runs failed: {args.output_dir}/failed has the traces", file=sys.stderr)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    return 1 if outcome.failed else 0
