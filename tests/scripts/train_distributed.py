"""One training run, in as many processes as torchrun starts: `train_distributed.py FOLDER BATCH_PER_PROCESS CRITERION`."""

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
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, TaylorHeadScorer, get_head_masks


torch.set_num_threads(1)
folder, batch_size, criterion = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=2, criterion=criterion))
args = TrainingArguments(
    folder,
    per_device_train_batch_size=batch_size,
    num_train_epochs=3,
    learning_rate=1e-2,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    logging_strategy="no",
    ddp_find_unused_parameters=False,
)
trainer = Trainer(model, args, train_dataset=tiny.examples(), callbacks=[TaylorHeadScorer(warmup_epochs=2)])
trainer.train()
masks = {name: mask.tolist() for name, mask in get_head_masks(model).items()}
weights = {n: p.detach().double().sum().item() for n, p in model.named_parameters() if p.requires_grad}
result = {"world_size": args.world_size, "masks": masks, "weights": weights}
Path(folder, f"rank{args.process_index}.json").write_text(json.dumps(result))
PartialState().wait_for_everyone()
# Without Python's clean-up: gloo's threads abort it ("terminate called without an active exception") in one run of ten,
# in a plain Trainer script as well (torch 2.13, transformers 5.23), and torchrun then ends the other process.
sys.stdout.flush()
os._exit(0)
