"""The training of one run: its data, its model, a Trainer for them, and the result."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, PrinterCallback, Trainer, TrainingArguments, set_seed

from ..._compat.transformers import commit_hash
from ...backbones.drop_path import CONFIG_FIELD, add_drop_path, residual_branches
from ...data.augmentation import Augmentation
from ...data.cache import open_images
from ...data.images import collate
from ...data.loading import load_task
from ...data.preprocessing import Preprocessing
from ...demo.model import DEMO_MODEL_PATH
from ...heads.protocol import get_head_masks
from ...image_classifier import new_image_classifier, quiet_loading
from ...methods import apply_method, has_scored_heads, pack_trained
from ...metrics.accuracy import compute_metrics
from ..recipes import SHIPPED
from ..records.effective import with_warmup
from ..records.environment import describe_environment
from ..records.run_record import CONTENT, Environment, RunResult, RunSpec
from .callbacks import Clock, EpochEnds
from .places import Places
from .trained import saved_bytes, selection_scores


class Training:
    """Data, model and Trainer of one run.

    Raises:
        ValueError, FileNotFoundError: The data are not as they should be.
    """

    def __init__(self, spec: RunSpec, places: Places) -> None:
        self.spec, self.places = spec, places
        self.splits = {
            part: load_task(
                places.data_root,
                spec.suite,
                spec.task,
                split,
                shots=spec.shots,
                list_seed=spec.list_seed,
                check_sizes=places.check_sizes,
                image_range=spec.preprocessing[part].get("image_range"),
            )
            for part, split in (("train", spec.train_split), ("eval", spec.eval_split))
        }
        processes = PartialState(cpu=places.use_cpu).num_processes
        batch_size, images = spec.recipe["batch_size"], len(self.splits["train"].dataset)
        if batch_size % processes:
            raise ValueError(
                f"a batch of {batch_size} images cannot be divided among {processes} processes; choose another number "
                "of either"
            )
        self.batch_size = batch_size // processes
        self.drop_last = bool(spec.recipe["drop_last"]) and images >= batch_size
        self.steps_per_epoch = images // batch_size if self.drop_last else math.ceil(images / batch_size)

    def environment(self) -> Environment:
        backbone = checkpoint_of(self.spec.backbone)
        revision = commit_hash(AutoConfig.from_pretrained(backbone, trust_remote_code=False))
        if revision is None and os.path.isdir(backbone):
            revision = folder_hash(backbone)
        return describe_environment(
            data_fingerprint={
                part: {"images": len(split.dataset), "layout": split.layout, "drawn": split.drawn}
                | {"sha256": split.fingerprint, CONTENT: split.content_fingerprint}
                for part, split in self.splits.items()
            },
            image_format="+".join(sorted({split.image_format for split in self.splits.values()})),
            checkpoint_revision=revision,
            device=PartialState().device,
            num_processes=PartialState().num_processes,
        )

    def trainer(self, folder: Path, test_every: int = 0, stop_after: int | None = None) -> Trainer:
        """A Trainer with a new model, initialised with the run's seed.

        Args:
            folder: Folder of checkpoints and head scores.
            test_every: Number of epochs between evaluations; 0 for none.
            stop_after: Number of epochs after which to save and stop.
        """
        recipe = self.spec.recipe
        # a launcher's setting would silently change results
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe["bf16"] else "no"
        args = TrainingArguments(
            os.fspath(folder),
            num_train_epochs=self.spec.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            learning_rate=recipe["learning_rate"],
            weight_decay=recipe["weight_decay"],
            max_grad_norm=recipe["max_grad_norm"],
            bf16=recipe["bf16"],
            warmup_steps=recipe["warmup_epochs"] * self.steps_per_epoch,
            lr_scheduler_type="cosine_warmup_with_min_lr",
            lr_scheduler_kwargs={
                "min_lr": recipe["final_learning_rate"],
                "warmup_lr_rate": recipe["warmup_learning_rate"] / recipe["learning_rate"],
            },
            dataloader_drop_last=self.drop_last,
            # workers augment images with generators of their own: results would depend on the number of workers
            dataloader_num_workers=0 if self.spec.preprocessing["augmentation"] else self.places.num_workers,
            dataloader_pin_memory=torch.accelerator.is_available() and not self.places.use_cpu,
            seed=self.spec.seed,
            logging_strategy="epoch",
            save_strategy="no",  # EpochEnds saves
            save_total_limit=2,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.places.use_cpu,
            # if everything is trained, a backbone may have parts that no image reaches (a mask token)
            ddp_find_unused_parameters=self.spec.method.name == "full",
        )
        set_seed(self.spec.seed)
        model, callbacks = self._model()
        trainer = _Trainer(
            model,
            args,
            collate,
            train_dataset=self._images("train"),
            eval_dataset=self._images("eval"),
            compute_metrics=compute_metrics,
            callbacks=[*callbacks, Clock(), EpochEnds(self.places.save_every, test_every, stop_after)],
        )
        trainer.remove_callback(PrinterCallback)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return trainer

    def result(self, trainer: Trainer) -> RunResult:
        """The result of a finished training. The evaluation split is first used here, unless `test_every` was given."""
        model, log = trainer.model, trainer.state.log_history
        clock = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Clock))
        memory = torch.cuda.max_memory_allocated() if trainer.args.device.type == "cuda" else None
        pack_trained(model)
        earlier = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
        accuracy = self.accuracy(trainer)
        losses = [entry["loss"] for entry in log if "loss" in entry]
        adapter_bytes, head_bytes = saved_bytes(model)
        masks = get_head_masks(model) if has_scored_heads(model) else {}
        return RunResult(
            accuracy=accuracy,
            epoch_losses=[loss if math.isfinite(loss) else None for loss in losses],
            seconds=clock.seconds(),
            peak_memory_bytes=memory,
            trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            adapter_bytes=adapter_bytes,
            head_bytes=head_bytes,
            masks={name: mask.tolist() for name, mask in masks.items()},
            head_scores=selection_scores(Path(trainer.args.output_dir), model) if masks else None,
            best_on_test=max([accuracy, *earlier]) if earlier and self.spec.eval_split == "test" else None,
        )

    def accuracy(self, trainer: Trainer) -> float:
        """The accuracy, in [0, 1], of a trained model on this run's evaluation split."""
        return trainer.evaluate(self._images("eval"))["eval_accuracy"]

    def _model(self) -> tuple[nn.Module, list]:
        rate, by = self.spec.recipe["drop_path"], self.spec.recipe.get("drop_path_by")
        names = self.splits["train"].dataset.features["label"].names
        with quiet_loading():
            base = new_image_classifier(
                checkpoint_of(self.spec.backbone), names, config_changes={CONFIG_FIELD: rate} if by == "config" else {}
            )
        branches = residual_branches(base) if by == "hooks" else []
        method = with_warmup(self.spec.method, self.spec.recipe)
        if method.get("criterion") == "random":
            method = replace(method, settings={**method.settings, "mask_seed": random_mask_seed(self.spec)})
        model, callbacks = apply_method(base, method)
        add_drop_path(base, branches, rate)
        return model, callbacks

    def _images(self, part: str) -> torch.utils.data.Dataset:
        settings, augmentation = dict(self.spec.preprocessing[part]), self.spec.preprocessing["augmentation"]
        if settings["normalization"] != "checkpoint":  # the name implies mean and std, which are refused beside it
            settings |= {"mean": None, "std": None}
        return open_images(
            self.splits[part],
            Preprocessing(**settings),
            cache=True if self.places.cache_test_images else None,
            augment=Augmentation(**augmentation) if part == "train" and augmentation else None,
            cache_dir=self.places.cache_dir,
        )


class _Trainer(Trainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on all images: Trainer applies `dataloader_drop_last`, meant for training, to evaluation as well.

        The random state is kept, because a DataLoader draws a seed: evaluating must not change the training.
        """
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with torch.random.fork_rng(devices=[]):
                return super().evaluate(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last


@lru_cache
def folder_hash(folder: str | os.PathLike) -> str:
    """The first digits of a SHA-256 over configuration and weights of a local checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin") and path.name != "preprocessor_config.json":
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
    return digest.hexdigest()[:16]


def checkpoint_of(backbone: str | os.PathLike) -> str | os.PathLike:
    """Name or path of a run's backbone; results say `SHIPPED` wherever the package is installed."""
    return DEMO_MODEL_PATH if backbone == SHIPPED else backbone


def random_mask_seed(spec: RunSpec) -> int:
    """The seed of a run's random masks. Every task and seed has its own: otherwise averages would be over few heads."""
    drawn = f"{spec.task} {spec.seed} {spec.list_seed} {spec.method.get('mask_seed') or 0}"
    return zlib.crc32(drawn.encode())
