"""`peft-heads predict`: the classes of images, by an adapter, a checkpoint, or an ONNX file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="peft-heads predict",
        description="Prints file, label and probability for every image. Images are decoded and preprocessed as in "
        "training. One that cannot be read is named on stderr, the others are predicted, and the exit code is 1.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="adapter (folder or Hub repository), folder of a merged or pruned checkpoint, or exported .onnx file",
    )
    parser.add_argument(
        "images",
        metavar="IMAGES",
        nargs="+",
        help="files, and folders, which are searched for image files at any depth",
    )
    parser.add_argument("--top_k", type=int, default=1, help="labels for each image")
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text", help="of what is printed")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write a file, when it is complete, and print nothing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, …; for an .onnx file what ONNX Runtime has a provider for. If not given: an "
        "accelerator where torch finds one; for an .onnx file the CPU",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    args = parser.parse_args(argv)
    for name in ("top_k", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.output and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; expected a file")
    if args.output and args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists already and nothing was changed; --overwrite replaces it")

    from tqdm import tqdm

    from ..adapter_folder.atomic import write_atomically
    from ..inference.classifiers import open_classifier
    from ..inference.predictions import find_images, predict, written

    files = find_images(args.images)
    classifier = open_classifier(args.model, args.device)
    faults = []

    def tell(error: ValueError) -> None:
        faults.append(error)
        tqdm.write(f"peft-heads predict: {error}", file=sys.stderr)

    with tqdm(files, desc="predict", unit="image", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        predictions = predict(classifier, bar, args.batch_size, args.top_k, tell)
        text = written(predictions, args.format)
        if args.output:
            write_atomically(args.output, "".join(text))
        else:
            for piece in text:
                tqdm.write(piece, file=sys.stdout, end="")
    if faults:
        print(f"peft-heads predict: {len(faults)} of {len(files)} images could not be read", file=sys.stderr)
    return 1 if faults else 0
