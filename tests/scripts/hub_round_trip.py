"""Run what users do with the Hub against the server that HF_ENDPOINT names: `hub_round_trip.py push|load RESULT.json`."""

import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from huggingface_hub import create_tag
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from peft_heads import (
    HeadMaskedLoraConfig,
    RLRRConfig,
    TaylorHeadScorer,
    get_head_masks,
    load_image_classifier,
    set_head_masks,
    set_image_processor,
)
from peft_heads.demo.model import load_demo_processor


torch.set_num_threads(1)
LABELS = {0: "cat", 1: "dog", 2: "eel"}


def push():
    processor = load_demo_processor()
    processor.size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    tiny.make("vit", num_labels=5).push_to_hub("me/tiny-vit")
    processor.push_to_hub("me/tiny-vit")
    processor.image_mean = [0.1, 0.2, 0.3]

    # by hand: three versions of one adapter
    model = get_peft_model(base(id2label=LABELS), HeadMaskedLoraConfig(ne=1))
    set_image_processor(model, processor)
    results = {}
    for seed, (version, revision) in enumerate({"v1": None, "main": None, "other": "other"}.items()):
        tiny.randomize_lora(model, seed=seed)
        set_head_masks(model, tiny.masks_off(model, seed + 1))
        model.push_to_hub("me/my-adapter", revision=revision)
        results[version] = outcome(model)
        if version == "v1":
            create_tag("me/my-adapter", tag="v1")

    stock = get_peft_model(base(), LoraConfig(target_modules=tiny.now(["q_proj"]), modules_to_save=["classifier"]))
    stock.push_to_hub("me/stock")

    rlrr = get_peft_model(base(id2label=LABELS), RLRRConfig(ne=1))
    set_image_processor(rlrr, processor)
    set_head_masks(rlrr, tiny.masks_off(rlrr, 4))
    rlrr.push_to_hub("me/rlrr")
    results["rlrr"] = outcome(rlrr)

    with tempfile.TemporaryDirectory() as folder:  # no name for a base model on the Hub
        tiny.make("vit").save_pretrained(folder)
        vit = AutoModelForImageClassification.from_pretrained(folder)
        get_peft_model(vit, HeadMaskedLoraConfig(ne=0)).push_to_hub("me/local-base")

    # with Trainer: as train() leaves the repository, then as push_to_hub does, then from the model
    model = get_peft_model(base(id2label=LABELS), HeadMaskedLoraConfig(ne=1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(model, folder, processor)
        create_tag("me/trained", tag="end-of-train")
        trainer.push_to_hub()
        results["trained"] = outcome(model)
        model.push_to_hub("me/trained-by-hand")
        create_tag("me/trained-by-hand", tag="as-trained")

        # in another process, say, training goes on from the last checkpoint
        resumed = get_peft_model(base(id2label=LABELS), HeadMaskedLoraConfig(ne=1))
        train(resumed, folder, processor, resume_from_checkpoint=f"{folder}/checkpoint-12")
        resumed.push_to_hub("me/resumed")

    set_head_masks(model, tiny.masks_off(model, *(int(i) for i in range(6) if i != heads_off(model)[0])))
    model.push_to_hub("me/trained-by-hand")
    return results


def load():
    # the labels come with the adapter
    results = {"main": outcome(PeftModel.from_pretrained(base(num_labels=3), "me/my-adapter"))}
    for revision in ("v1", "other"):
        loaded = PeftModel.from_pretrained(base(num_labels=3), "me/my-adapter", revision=revision)
        results[revision] = outcome(loaded)
    loaded.load_adapter("me/my-adapter", "second", revision="v1")
    loaded.set_adapter("second")
    results["load_adapter"] = outcome(loaded, "second")

    for name, repository, kwargs in (
        ("classifier", "me/my-adapter", {}),
        ("classifier v1", "me/my-adapter", {"revision": "v1"}),
        ("classifier rlrr", "me/rlrr", {}),
        ("classifier trained", "me/trained", {}),
        ("classifier during training", "me/trained", {"revision": "end-of-train"}),
        ("classifier of a checkpoint", "me/trained", {"subfolder": "last-checkpoint"}),
    ):
        results["downloaded"] = sorted({path.name for path in Path(HF_HUB_CACHE).glob("*trained/snapshots/*/*")})
        classifier, processor = load_image_classifier(repository, **kwargs)
        results[name] = outcome(classifier)
        results[name]["image_mean"] = list(processor.image_mean)
    _, processor = load_image_classifier("me/stock")
    results["stock"] = {"image_mean": list(processor.image_mean)}

    for config in (HeadMaskedLoraConfig.from_pretrained("me/my-adapter"), PeftConfig.from_pretrained("me/my-adapter")):
        results[f"config {len(results)}"] = [type(config).__name__, config.ne, config.base_model_name_or_path]
    stock = HeadMaskedLoraConfig.from_lora("me/stock")
    results["from_lora"] = [sorted(stock.target_modules), stock.ne]
    model = get_peft_model(base(), HeadMaskedLoraConfig(ne=1))
    results["errors"] = {
        "missing": error_of(load_image_classifier, "me/missing"),
        "missing revision": error_of(load_image_classifier, "me/my-adapter", revision="v9"),
        "no adapter": error_of(load_image_classifier, "me/tiny-vit"),
        "missing subfolder": error_of(load_image_classifier, "me/my-adapter", subfolder="v9"),
        "from_pretrained": error_of(PeftModel.from_pretrained, base(), "me/missing"),
        "load_adapter": error_of(model.load_adapter, "me/missing", "second"),
    }
    return results


def base(**kwargs):
    return AutoModelForImageClassification.from_pretrained("me/tiny-vit", ignore_mismatched_sizes=True, **kwargs)


def train(model, folder, processor, **kwargs):
    """Train three epochs of 4 steps, with a checkpoint after each; heads are selected after the second."""
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=8,
        num_train_epochs=4 if kwargs else 3,
        learning_rate=1e-2,
        save_strategy="epoch",
        hub_strategy="checkpoint",
        push_to_hub=not kwargs,
        hub_model_id="me/trained",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    scorer = TaylorHeadScorer(select_at=8)
    trainer = Trainer(
        model, args, train_dataset=tiny.examples(), processing_class=processor, callbacks=[scorer],
        data_collator=lambda rows: {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]},
    )  # fmt: skip
    if args.push_to_hub:
        trainer.add_callback(WaitForPush(trainer))
    trainer.train(**kwargs)
    return trainer


class WaitForPush(TrainerCallback):
    """A callback that waits for uploads: Trainer goes on training, and would skip a push that comes too soon."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, *args, **kwargs):
        self.trainer.push_in_progress.wait_until_done()


def heads_off(model, adapter_name="default"):
    return (~next(iter(get_head_masks(model, adapter_name).values()))).nonzero().flatten().tolist()


def outcome(model, adapter_name="default"):
    with torch.no_grad():
        logits = model.eval()(tiny.images()).logits.tolist()
    masks = {name: mask.tolist() for name, mask in get_head_masks(model, adapter_name).items()}
    labels = model.config.id2label
    return {"logits": logits, "masks": masks, "labels": labels, "heads_off": heads_off(model, adapter_name)}


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    result = {"push": push, "load": load}[sys.argv[1]]()
    Path(sys.argv[2]).write_text(json.dumps(result))
