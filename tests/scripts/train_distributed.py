"""Train once, in as many processes as torchrun starts: `train_distributed.py FOLDER LAYOUT [OPTION=JSON …]`.

Layouts that run through Trainer: `ddp` (also for one process), `zero1`, `zero2`, `zero3` (DeepSpeed). In a plain loop:
`loop` (gradients averaged by hand; also for one process), `fsdp2` (every block a unit), `fsdp2-units` (every trained
linear layer a unit as well, as in PEFT's wrapping policy). Options: `method` (`head-masked-lora`, `rlrr`), `ne`,
`config`, `scorer` (arguments of TaylorHeadScorer), and those of the layout.

Every rank writes `rank<N>.json`; the scores are in `head_scores.json`, or for a plain loop in the ranks' files.
"""

import json
import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from accelerate import PartialState
from peft import get_peft_model
from torch import distributed as dist
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, HeadScorer, RLRRConfig, TaylorHeadScorer, get_head_masks, get_neuron_masks
from peft_heads.adapter_folder import card, labels, saving, score_files
from peft_heads.heads.gates import GATE_STATISTICS


torch.set_num_threads(1)
GLOBAL_BATCH, STEPS, SELECT_AT = 8, 6, 3


def main(folder, layout, **options):
    ne = options.pop("ne", 2)
    config_class = {"head-masked-lora": HeadMaskedLoraConfig, "rlrr": RLRRConfig}[
        options.pop("method", "head-masked-lora")
    ]
    settings = options.pop("config", {})
    config = config_class(**settings) if "target_speed" in settings else config_class(ne=ne, **settings)
    model = get_peft_model(tiny.make("vit"), config)
    written = []
    write = card.write_atomically
    for module in (card, labels, saving, score_files):
        module.write_atomically = lambda path, content: written.append(Path(path).name) or write(path, content)
    if layout in ("loop", "fsdp2", "fsdp2-units"):
        result = run_loop(folder, layout, model, **options)
    else:
        result = run_trainer(folder, layout, model, **options)
    result["masks"] = {name: mask.tolist() for name, mask in get_head_masks(model).items()}
    if getattr(config, "prunes_neurons", False):
        result["neuron_masks"] = {name: mask.tolist() for name, mask in get_neuron_masks(model).items()}
    result["written"] = written
    Path(folder, f"rank{dist.get_rank() if dist.is_initialized() else 0}.json").write_text(json.dumps(result))


def run_trainer(folder, layout, model, examples=32, scorer=None, **arguments):
    if layout.startswith("zero"):
        arguments |= {"deepspeed": deepspeed_config(int(layout[-1]))}
    else:
        arguments |= {"ddp_find_unused_parameters": False}
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = arguments.setdefault("gradient_accumulation_steps", 1)
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=GLOBAL_BATCH // world_size // accumulation,
        num_train_epochs=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **arguments,
    )
    scorer = TaylorHeadScorer(**(scorer or {"warmup_epochs": 2}))
    trainer = Trainer(model, args, train_dataset=tiny.examples(examples), callbacks=[scorer])
    trainer.train()
    trainer.save_model()
    cuts = {name: scorer.progress[name] for name in ("cuts_made", "remain")}
    return {"world_size": args.world_size, **cuts, **checks(scorer._scorer, trainer.optimizer)}


def run_loop(folder, layout, model, accumulation=1, short=False, overflow=False):
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1:
        dist.init_process_group("gloo")
    if layout.startswith("fsdp2"):
        shard(model, units=layout == "fsdp2-units")
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    scorer = HeadScorer(model)
    model.train()
    for step in range(STEPS):
        batch = tiny.batch(GLOBAL_BATCH, seed=step)
        for micro in range(accumulation):
            part = slice(micro * world_size + rank, None, world_size * accumulation)
            if not (short and step == 1 and rank == 1):  # a process whose data has run out
                loss = model(**{key: value[part] for key, value in batch.items()}).loss / accumulation
                (loss * float("inf") if overflow and step == 1 and rank == 1 else loss).backward()
        if layout == "loop" and world_size > 1:
            for param in trained:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
                dist.all_reduce(param.grad)
                param.grad /= world_size
        torch.nn.utils.clip_grad_norm_(trained, 0.05)
        if step >= SELECT_AT or scorer.update():
            optimizer.step()
        optimizer.zero_grad()
        if step == SELECT_AT - 1:
            scores = {c: {n: s.tolist() for n, s in by_name.items()} for c, by_name in scorer.all_scores().items()}
            scorer.apply(optimizer)
    model.save_pretrained(folder, is_main_process=rank == 0)
    steps = [scorer.num_steps, scorer.num_skipped]
    return {"world_size": world_size, "scores": scores, "steps": steps, **checks(scorer, optimizer)}


def shard(model, units):
    from torch.distributed.fsdp import fully_shard

    if units:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
                fully_shard(module)
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith(tiny.now("vit.layers")):
            fully_shard(module)
    fully_shard(model)


def deepspeed_config(stage):
    import deepspeed.ops

    # its communication through shared memory is compiled on first use; gloo does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000,
        # 0: the smallest parameters are partitioned as well
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def checks(scorer, optimizer):
    """Return the largest absolute value in deactivated raw rows and their optimizer state, and sums of weights."""
    from peft_heads.functional.sharding import whole, whole_value

    rows, states, weights = 0.0, 0.0, {}
    for name, layer in scorer.layers.items():
        off = layer.deactivated_rows("default")
        for i, param in enumerate(layer.head_parameters("default")):
            value = whole_value(param)
            weights[f"{name}.{i}"] = value.double().sum().item()
            rows = max(rows, value[off].abs().max().item())
            of_param = [whole(x) for x in optimizer.state.get(param, {}).values() if x.shape == param.shape]
            if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
                from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

                rows = max(rows, safe_get_full_fp32_param(param)[off].abs().max().item())
                of_param = [safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")]
            assert len(of_param) == 2
            states = max([states, *(state[off].abs().max().item() for state in of_param)])
    found = {"deactivated_rows": rows, "their_states": states, "weights": weights}
    if scorer.num_images:
        found["images"] = scorer.num_images
        found["neurons"] = {c: {n: s.tolist() for n, s in scorer.neuron_scores(c).items()} for c in GATE_STATISTICS}
    return found


if __name__ == "__main__":
    folder, layout, *options = sys.argv[1:]
    main(folder, layout, **{key: json.loads(value) for key, _, value in (option.partition("=") for option in options)})
    if dist.is_initialized():
        PartialState().wait_for_everyone()
    # Without Python's clean-up: gloo's threads abort it ("terminate called without an active exception") in one run of
    # ten, in a plain Trainer script as well (torch 2.13, transformers 5.23), and torchrun then ends the other process.
    sys.stdout.flush()
    os._exit(0)
