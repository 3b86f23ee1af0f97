"""Cost of scoring heads: training steps with HeadScorer's hooks and update against steps without, and a selection.

One model in one process takes steps with and without recording, in turns. A short training by Trainer times what a
selection by TaylorHeadScorer takes beyond the steps (masks, head_scores.json, head_scores.png). It runs twice, because the
first selection imports Matplotlib. The cost is a share of the warm-up with the default window: one epoch of
--warmup_epochs is scored, and heads are selected once. The weights are random: nothing is downloaded.

    python benchmarks/scoring_cost.py [--batch 8 --steps 30 --warmup_epochs 10 --images 1000 --adapter_bits 32]
    python benchmarks/scoring_cost.py --device cuda --batch 64 --steps 100
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

import torch
from measure import check_trainer_device, describe, device_name, interleaved, judge, ratio, timed
from random_vit import (
    add_adapter,
    add_dtype_argument,
    add_vit_arguments,
    backward,
    chosen_dtype,
    describe_vit,
    make_images,
    make_optimizer,
    make_vit,
    short,
)
from transformers import PrinterCallback, Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, HeadScorer, TaylorHeadScorer


class TimedScorer(TaylorHeadScorer):
    """A scorer that counts the seconds it spends outside `update`."""

    seconds = 0.0

    def _timed(event):
        def call(self, args, *more, **kwargs):
            # `timed` synchronises first: an accelerator is still busy with the step
            seconds, _ = timed(lambda: getattr(TaylorHeadScorer, event)(self, args, *more, **kwargs), args.device)
            self.seconds += seconds

        return call

    on_train_begin, on_step_begin = _timed("on_train_begin"), _timed("on_step_begin")
    on_step_end, on_train_end = _timed("on_step_end"), _timed("on_train_end")


def make(args):
    return add_adapter(make_vit(args), HeadMaskedLoraConfig(r=args.rank, ne=3, adapter_bits=args.adapter_bits))


def time_steps(args):
    """Return `{"without", "with scoring": seconds of every step}`, without adding and removing the hooks."""
    model, batch, dtype = make(args).to(args.device), make_images(args), chosen_dtype(args)
    optimizer, scorer = make_optimizer(model), HeadScorer(model, recording=False)

    def step():
        backward(model, batch, dtype)
        if scorer.recording:
            scorer.update()
        optimizer.step()
        optimizer.zero_grad()

    def scored_step():
        scorer.start()
        seconds, _ = timed(step, args.device)
        scorer.stop()
        return seconds

    return interleaved({"without": step, "with scoring": scored_step}, args.steps, args.device)


def time_selection(args):
    """Return the seconds that the callback takes beside the scored steps."""
    batch = {name: value.cpu() for name, value in make_images(args).items()}
    rows = [{name: value[i] for name, value in batch.items()} for i in range(args.batch)]
    scorer = TimedScorer(select_at=2, window="last_step")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=args.batch,
            bf16=chosen_dtype(args) == torch.bfloat16,
            use_cpu=torch.device(args.device).type == "cpu",
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(make(args), arguments, train_dataset=rows, callbacks=[scorer])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return scorer.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_vit_arguments(parser, steps=30, rank=8, adapter_bits=32, warmup_epochs=10, images=1000)
    add_dtype_argument(parser)
    args = parser.parse_args()
    check_trainer_device(parser, args.device)
    dtype, steps_per_epoch = short(chosen_dtype(args)), max(1, args.images // args.batch)
    print(
        f"{describe_vit(args)}, r={args.rank}, adapter_bits={args.adapter_bits}, {dtype}, {device_name(args.device)}"
    )

    selections = [time_selection(args) for _ in range(2)]
    times = time_steps(args)
    for name, seconds in times.items():
        print(describe(name, seconds))
    step = ratio(times["with scoring"], times["without"])
    print(f"step, with scoring / without: {step}")
    print(f"selection, beside the steps: {selections[0]:.3f} s, a second one in the process {selections[1]:.3f} s")

    epoch = steps_per_epoch * statistics.median(times["without"])
    of_epoch = step.map(lambda x: 100 * (x - 1 + selections[0] / epoch))
    print(f"an epoch of {steps_per_epoch} steps takes {epoch:.1f} s; scoring and selection in % of it: {of_epoch}")
    of_warmup = of_epoch.map(lambda x: x / args.warmup_epochs)
    where = f"{dtype}, {args.device}, {args.adapter_bits} bits, the last of {args.warmup_epochs} epochs is scored"
    judge("scoring", of_warmup, where)


if __name__ == "__main__":
    main()
