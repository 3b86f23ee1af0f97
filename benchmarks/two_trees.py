"""Compare two source trees of peft_heads: does a change make a training step, or loading an adapter, slower?

    git worktree add ../before v0.1.0
    python benchmarks/two_trees.py ../before . [--rounds 40] [--steps 5]

Each tree has one worker process, which imports peft_heads from there. The workers take turns, so that both see the same
machine. They use only public names, so that distant trees can be compared. The script prints the ratios of the second tree
to the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


TASKS = ("step", "step of 1 bit", "step of RLRR", "load", "load of RLRR")


class Worker:
    """A process that reads one task a line, performs it, and answers with the seconds."""

    def __init__(self, tree: Path, arguments: list[str]) -> None:
        env = os.environ | {"PYTHONPATH": str(tree.resolve()), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--worker", *arguments]
        self.process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        package = Path(json.loads(self.process.stdout.readline())).parent
        if package.parent.resolve() != tree.resolve():
            raise ValueError(f"{tree} holds no peft_heads: {package} was imported instead")

    def seconds(self, task: str) -> float:
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", help="the tree before the change, and after it")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5, help="training steps of a round")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.steps)
        return
    if len(args.trees) != 2:
        parser.error("two trees are needed")
    from measure import describe, interleaved, ratio  # of this tree; the workers import none but their own

    workers = [Worker(tree, ["--steps", str(args.steps)]) for tree in args.trees]
    for task in TASKS:
        sides = {str(i): lambda worker=worker, task=task: worker.seconds(task) for i, worker in enumerate(workers)}
        times = interleaved(sides, args.rounds)
        for tree, seconds in zip(args.trees, times.values(), strict=True):
            print(describe(f"{task}, {tree.name or tree.resolve().name}", seconds, width=40))
        print(f"{task}, second to first: {ratio(times['1'], times['0'])}\n", flush=True)
    for worker in workers:
        worker.process.stdin.close()
        worker.process.wait()


def work(steps: int) -> None:
    """Perform the tasks that are read, until the end of the input."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    import peft_heads

    torch.set_num_threads(1)
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=768,
        image_size=64,
        num_labels=10,
    )
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def backbone() -> ViTForImageClassification:
        torch.manual_seed(0)
        return ViTForImageClassification(config)

    def adapted(adapter):
        model = get_peft_model(backbone(), adapter).train()
        if adapter.ne:
            masks = peft_heads.get_head_masks(model)
            for mask in masks.values():
                mask[: adapter.ne] = False
            peft_heads.set_head_masks(model, masks)
        return model

    lora = peft_heads.HeadMaskedLoraConfig(ne=3, lora_alpha=8)
    models = {
        "step": adapted(lora),
        "step of 1 bit": adapted(peft_heads.HeadMaskedLoraConfig(ne=3, r=32, adapter_bits=1)),
        "step of RLRR": adapted(peft_heads.RLRRConfig(ne=3)),
    }
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for name, model in models.items()
    }
    place = tempfile.TemporaryDirectory()
    folders = {"load": f"{place.name}/lora", "load of RLRR": f"{place.name}/rlrr"}
    models["step"].save_pretrained(folders["load"])
    models["step of RLRR"].save_pretrained(folders["load of RLRR"])
    print(json.dumps(peft_heads.__file__), flush=True)
    for line in sys.stdin:
        task = line.strip()
        base = backbone() if task in folders else None
        start = time.perf_counter()
        if task in folders:
            PeftModel.from_pretrained(base, folders[task])
        else:
            for _ in range(steps):
                models[task](pixel_values=images).logits.square().mean().backward()
                optimizers[task].step()
                optimizers[task].zero_grad()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
