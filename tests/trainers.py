"""A short training of a tiny model with Trainer."""

import tiny
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, get_head_masks


STEPS_PER_EPOCH = 4  # 32 examples in batches of 8


def make_trainer(folder, callbacks, model=None, train_dataset=None, ne=1, seed=0, eval_dataset=None, **arguments):
    arguments = {"num_train_epochs": 4, "save_strategy": "no", "learning_rate": 1e-2, **arguments}
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=arguments.pop("per_device_train_batch_size", 8),
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        seed=seed,
        use_cpu=True,
        logging_strategy=arguments.pop("logging_strategy", "no"),
        **arguments,
    )
    if model is None:
        model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=ne, lora_dropout=0.1))
    return Trainer(
        model,
        args,
        train_dataset=tiny.examples() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def off(model, adapter_name="default"):
    return {tuple((~mask).nonzero().flatten().tolist()) for mask in get_head_masks(model, adapter_name).values()}
