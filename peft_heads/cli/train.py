"""`peft-heads train`: fine-tune an image classifier with Trainer."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from datasets import Image
from transformers import Trainer, TrainingArguments

from ..adapter_folder.checkpoints import (
    checkpoint_fault,
    checkpoint_folders,
    foreign_checkpoints,
    last_complete_checkpoint,
    read_error,
    run_of_folder,
)
from ..adapter_folder.contents import set_image_processor
from ..adapter_folder.labels import write_labels
from ..data.images import ImageTransform, collate, label_names, load_image_dataset, load_image_processor
from ..heads.protocol import describe_masks, get_head_masks
from ..image_classifier import new_image_classifier
from ..methods import apply_method, check_method, has_scored_heads, pack_trained
from ..metrics.accuracy import compute_metrics
from ..tuners.common.folder_config import AdapterFolderConfig
from .arguments import DataArguments, ModelArguments, local_inputs, parse_arguments
from .hub import check_hub, push, reachable_hub
from .interruption import how_to_go_on
from .output_folder import TrainingRun, check_output_folder, claim_output_folder, forget_replaced, trained_files


logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """Train, save and evaluate as `argv` says; raises ValueError or FileNotFoundError for a mistake of the user's."""
    model_args, data_args, method, training_args = parse_arguments(argv)
    check_method(method)
    checkpoint = find_checkpoint(training_args)
    if training_args.do_train or (training_args.do_train is None and training_args.do_eval is None):
        check_output_folder(training_args, checkpoint, local_inputs(argv, model_args, data_args, method))
    check_hub(training_args)
    set_up_logging(training_args)
    if not torch.accelerator.is_available():
        training_args.dataloader_pin_memory = False  # torch would warn that there is nothing to pin for

    with training_args.main_process_first(desc="loading the data"):
        data = load_data(data_args, model_args, training_args.seed)
    choose_steps(training_args, data)
    names = label_names(data, data_args.label_column_name)

    # Before the model, whose new classifier and adapter are initialised at random.
    seed = transformers.enable_full_determinism if training_args.full_determinism else transformers.set_seed
    seed(training_args.seed)
    model, callbacks = apply_method(load_model(model_args, names), method)

    processor = load_image_processor(
        model_args.image_processor_name or model_args.model_name_or_path,
        do_normalize=data_args.do_normalize,
        image_range=data_args.image_range,
        **hub_arguments(model_args) | {"trust_remote_code": trusts_processor(model_args)},
    )
    transform = ImageTransform(processor, data_args.image_column_name, data_args.label_column_name, names)
    if hasattr(model, "peft_config"):
        set_image_processor(model, processor)  # the card says how images are decoded
    columns = [data_args.image_column_name, data_args.label_column_name]
    # undecoded: the transform's error names the file
    undecoded = {split: rows.cast_column(columns[0], Image(decode=False)) for split, rows in data.items()}
    data = {split: rows.with_transform(transform, columns=columns) for split, rows in undecoded.items()}
    with reachable_hub(training_args):
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=data.get("train") if training_args.do_train else None,
            eval_dataset=data.get("validation") if training_args.do_eval else None,
            data_collator=collate,
            compute_metrics=compute_metrics,
            processing_class=processor,
            callbacks=callbacks,
        )
    for scorer in callbacks:
        scorer.attach(trainer)

    if training_args.do_train:
        begin_run(trainer, checkpoint)
        with how_to_go_on(trainer, argv):
            result = trainer.train(resume_from_checkpoint=checkpoint)
            pack_trained(trainer.model)
            save(trainer)
        _report(trainer, "train", result.metrics)
        trainer.save_state()
        if trainer.is_world_process_zero():
            forget_replaced(training_args.output_dir)
    if training_args.do_eval:
        _report(trainer, "eval", trainer.evaluate())
    not_pushed = push(trainer) if training_args.do_train and training_args.push_to_hub else None
    if training_args.do_train and trainer.is_world_process_zero():
        print(summary(trainer, method.name))
    # The processes end together: torchrun kills all of them as soon as one fails, even while Python cleans up.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    if not_pushed is not None:
        print(f"peft-heads train: error: {not_pushed}", file=sys.stderr)
    return 0 if not_pushed is None else 1


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means; `true` is the last complete one in the output folder."""
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() in ("false", "no"):
        return None
    if asked.lower() in ("true", "yes"):
        last = last_complete_checkpoint(args.output_dir, args.save_only_model)
        if last is None:
            raise FileNotFoundError(f"no complete checkpoint to resume from in {args.output_dir!r}")
        return last
    if not os.path.isdir(asked):
        raise FileNotFoundError(f"--resume_from_checkpoint {asked!r} is no checkpoint (there is no such folder)")
    fault = checkpoint_fault(asked, args.save_only_model)
    if fault is not None:
        beside = checkpoint_folders(Path(asked).parent)
        foreign = foreign_checkpoints(Path(asked).parent, run_of_folder(Path(asked).parent))
        own = (path for path in beside if path not in foreign)
        complete = next((str(path) for path in own if checkpoint_fault(path, args.save_only_model) is None), None)
        hint = f"; the last complete one is {complete!r}" if complete else ""
        raise ValueError(f"--resume_from_checkpoint {asked!r} is no complete checkpoint: {fault}{hint}")
    return asked


def begin_run(trainer: Trainer, checkpoint: str | None) -> None:
    """Claim the output folder for this run, and mark its checkpoints."""
    args, state = trainer.args, PartialState()
    if state.is_main_process:
        claim_output_folder(args, checkpoint)
    state.wait_for_everyone()
    trainer.add_callback(TrainingRun(run_of_folder(args.output_dir) or ""))


def set_up_logging(args: TrainingArguments) -> None:
    """Show the package's messages (the deactivated heads) once, from the main process."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("peft_heads").setLevel(logging.INFO if args.should_log else logging.WARNING)
    transformers.utils.logging.set_verbosity(args.get_process_log_level())


def load_data(data_args: DataArguments, model_args: ModelArguments, seed: int):
    """Load the splits; every field of DataArguments but `do_normalize` is a parameter of the loader."""
    arguments = {name: value for name, value in vars(data_args).items() if name != "do_normalize"}
    return load_image_dataset(**arguments, seed=seed, cache_dir=model_args.cache_dir, token=model_args.token)


def choose_steps(args: TrainingArguments, data) -> None:
    """Decide whether to train and to evaluate: as transformers' example does, but both if neither is asked for."""
    if args.do_train is None and args.do_eval is None:
        args.do_train, args.do_eval = True, "validation" in data
    args.do_train = bool(args.do_train)
    args.do_eval = bool(args.do_eval) or args.eval_strategy != "no"
    found = ", ".join(data)
    if args.do_train and "train" not in data:
        raise ValueError(f"training needs a split 'train'; found: {found} (only to evaluate: --do_eval)")
    if args.do_eval and "validation" not in data:
        raise ValueError(f"evaluation needs a split 'validation' (or --train_val_split 0.15); found: {found}")
    if not args.do_train and not args.do_eval:
        raise ValueError("nothing to do: neither --do_train nor --do_eval")


def hub_arguments(args: ModelArguments) -> dict:
    return {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }


def trusts_processor(args: ModelArguments) -> bool:
    """Whether code that comes with the image processor may run: only the base model's own, if the user trusts it."""
    return args.trust_remote_code and args.image_processor_name in (None, args.model_name_or_path)


def load_model(args: ModelArguments, names: list[str]):
    """The checkpoint, with a classifier for the data's labels."""
    return new_image_classifier(
        args.model_name_or_path,
        names,
        config_name=args.config_name,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **hub_arguments(args),
    )


def save(trainer: Trainer) -> None:
    """Save the final adapter or model, the image processor and, for adapters, the label names; `push` uploads them."""
    folder = Path(trainer.args.output_dir)
    try:
        trainer.save_model(_internal_call=True)
    except BaseException:
        for path in trained_files(folder):
            if path.is_file() and read_error(path) is not None:
                path.unlink(missing_ok=True)  # half-written; the checkpoints are whole
        raise
    configs = getattr(trainer.model, "peft_config", {}).values()
    is_stock = any(configs) and not any(isinstance(config, AdapterFolderConfig) for config in configs)
    if trainer.args.should_save and is_stock:
        # Our adapters save their labels themselves. Without labels the classifier of another adapter could not be rebuilt.
        write_labels(folder, trainer.model.get_base_model().config.id2label)


def summary(trainer: Trainer, method: str) -> str:
    """What was trained and where it lies."""
    folder = Path(trainer.args.output_dir)
    is_adapter = hasattr(trainer.model, "peft_config")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    weights = folder.glob("adapter_model*.safetensors" if is_adapter else "model*.safetensors")
    lines = [
        f"method              {method}",
        f"{'adapter' if is_adapter else 'model':19} {folder}",
        f"trained parameters  {trained:,}",
        f"bytes               {sum(file.stat().st_size for file in weights):,}",
    ]
    if has_scored_heads(trainer.model):
        lines.append(f"deactivated heads   {describe_masks(get_head_masks(trainer.model))}")
    return "\n".join(lines)


def _report(trainer: Trainer, split: str, metrics: dict) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
