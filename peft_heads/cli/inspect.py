"""`peft-heads inspect`: show what a saved adapter is, from its files."""

from __future__ import annotations

import argparse
from pathlib import Path


# Settings that are shown only where they change something.
BITS = ("adapter_bits", "classifier_bits", "packed")


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads inspect",
        description="Shows an adapter's method and settings, its deactivated heads, the size of the update in every "
        "head, parameters and bytes. Reads files only; of the base model, its configuration.",
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="folder or Hub repository of a head-masked, RLRR or LoRA adapter"
    )
    parser.add_argument("--base_model", help="folder or repository of the base model, if not the one it names")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a heat map (PNG) of the heads' update norms")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    args = parser.parse_args(argv)
    if args.plot and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG: {args.plot} must end in .png")
    if args.plot and args.plot.exists() and not args.overwrite:
        raise ValueError(f"{args.plot} exists already and nothing was changed; --overwrite replaces it")

    from ..convert.inspect import inspect_adapter

    report = inspect_adapter(args.adapter, args.base_model)
    if args.plot and report.no_norms:
        raise ValueError(f"there is nothing to plot: {report.no_norms}")
    print("\n".join(describe(report)))
    if args.plot:
        from ..adapter_folder.atomic import write_atomically
        from ..scoring.plotting import figure_bytes, plot_head_scores

        figure = plot_head_scores(report.norms, report.masks, joint=False, title="Norm of the update per head")
        print(f"heat map             {write_atomically(args.plot, figure_bytes(figure))}")
    return 0


def describe(report) -> list[str]:
    """The report, as lines of text."""
    from ..heads.neurons import describe_neurons
    from ..tuners.common.method_registry import method_of

    settings = report.settings
    hidden = BITS if report.neuron_masks else (*BITS, "neuron_criterion")
    shown = (name for name in method_of(settings.get("peft_type")).shown_settings if name not in hidden)
    known = [f"{name}={settings[name]}" for name in shown if settings.get(name) is not None]
    known += [f"{name}={settings[name]}" for name in BITS if settings.get(name) not in (None, False, 32)]
    lines = [
        f"adapter              {report.folder}",
        f"method               {settings.get('peft_type')}",
        f"base model           {settings.get('base_model_name_or_path')}",
        f"settings             {', '.join(known)}",
        "parameters           " + ", ".join(f"{part} {number:,}" for part, number in report.parameters.items()),
        "bytes",
        *(f"  {number:>13,} {part}" for part, number in report.bytes.items()),
        f"  {sum(report.other_files.values()):>13,} other files ({', '.join(report.other_files)})",
        "deactivated heads" + ("" if report.masks else "    none: the file has no head masks"),
    ]
    for name, mask in report.masks.items():
        heads = (~mask).nonzero().flatten().tolist()
        lines.append(f"  {name}: {', '.join(map(str, heads)) or 'none'} of {len(mask)}")
    if report.neuron_masks:
        lines += ["deactivated neurons", *(f"  {line}" for line in describe_neurons(report.neuron_masks))]
    lines.append(
        "norm of the update   " + (f"not known: {report.no_norms}" if report.no_norms else "per head, from 0")
    )
    for name, norms in report.norms.items():
        lines.append(f"  {name}: {' '.join(f'{norm:.3g}' for norm in norms.tolist())}")
    return lines
