"""`load_best_model_at_end` for adapters that Trainer does not load itself.

A checkpoint's own folder holds the file of the adapter named "default"; every other adapter has a folder of its own
inside. Trainer loads the file in the checkpoint's own folder into the first active adapter, whatever its name, and
loads nothing where there is no such file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from ..adapter_folder.contents import folder_contents
from ..adapter_folder.labels import read_labels


def check_best_checkpoint(model: nn.Module, active: Sequence[str]) -> None:
    """Raise ValueError if the active adapters of the best checkpoint could not be loaded at the end of training.

    Args:
        model: Trainer's model.
        active: Names of its active adapters, in their order.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            "load_best_model_at_end=True: Trainer can load no adapter into a model that is no PeftModel, as after "
            "transformers' own add_adapter, and would fail at the end of training; create the adapter with "
            "get_peft_model, or pass load_best_model_at_end=False and load the best checkpoint yourself"
        )
    others = _left_to_us(active)
    if not others:
        return
    way_out = "name the adapter 'default' and let it be the only active one, or pass load_best_model_at_end=False"
    distributed_type = AcceleratorState().distributed_type
    if distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            f"load_best_model_at_end=True with the active adapter(s) {', '.join(map(repr, active))} does not work "
            f"under {distributed_type.value}; {way_out}"
        )
    first = active[0]
    if first != "default" and "default" in model.peft_config:
        difference = _difference(model, "default", first)
        if difference is not None:
            raise ValueError(
                f"load_best_model_at_end=True: at the end of training Trainer will load the file of adapter 'default' "
                f"into the active adapter {first!r}, before the right one can be loaded, and they do not fit: "
                f"{difference}; delete the adapter 'default' from the model or give both the same settings, "
                "or pass load_best_model_at_end=False"
            )


def load_best_checkpoint(model: PeftModel, active: Sequence[str], checkpoint: str) -> None:
    """Load the active adapters that Trainer has not loaded: weights, masks, classifiers and labels.

    Args:
        model: Trainer's model, after Trainer has loaded the best checkpoint in its own way.
        active: Names of its active adapters, in their order.
        checkpoint: Trainer's best checkpoint.

    Raises:
        ValueError: An adapter's file is missing; nothing is loaded then.
    """
    folders = {name: Path(checkpoint, name if name != "default" else "") for name in _left_to_us(active)}
    for name, folder in folders.items():
        if not any((folder / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            raise ValueError(
                f"load_best_model_at_end=True: the best checkpoint has no file of adapter {name!r} "
                f"({folder / SAFETENSORS_WEIGHTS_NAME} is missing), so the model does not have the best weights; load "
                f"another checkpoint with model.load_adapter(FOLDER, {name!r})"
            )
    for name, folder in folders.items():
        # the labels take effect with the weights
        folder_contents(model, name).labels_in_file = read_labels(folder)
        model.load_adapter(str(folder), name)


def warn_if_before_selection(best_step: int | None, selected_at: int | None, last_cut: int) -> None:
    """Warn if the best checkpoint was written before the heads were selected, and so has no deactivated heads, or few.

    Args:
        best_step: The step of the best checkpoint; None if there is none.
        selected_at: The step of the selection, or of the first cut; None if there was none.
        last_cut: The step of the last cut.
    """
    if selected_at is None or best_step is None or best_step >= max(selected_at, last_cut):
        return
    if best_step < selected_at:
        what, has = f"the selection of heads at step {selected_at}", "has no deactivated heads"
    else:
        what, has = f"the last cut at step {last_cut}", "has fewer heads or neurons off than planned"
    warnings.warn(
        f"load_best_model_at_end has loaded the checkpoint of step {best_step}, which is older than {what}: the model {has}. "
        "Evaluate only after the selection, or select earlier"
    )


def _left_to_us(active: Sequence[str]) -> list[str]:
    """The active adapters into which Trainer loads nothing, or the wrong file."""
    return [name for index, name in enumerate(active) if (index, name) != (0, "default")]


def _difference(model: PeftModel, saved: str, loaded: str) -> str | None:
    """The reason why the file of one adapter cannot be loaded into another; None if there is none.

    The number of classes may differ: our tuners adjust the classifier to the file.
    """
    there, here = _shapes(model, saved), _shapes(model, loaded)
    for one, other, name in ((there, here, saved), (here, there, loaded)):
        more = sorted(one.keys() - other.keys())
        if more:
            return f"{name!r} alone has {more[0]}" + (f" and {len(more) - 1} others" if len(more) > 1 else "")
    for key, shape in there.items():
        if here[key] != shape:
            return f"{key} has the shape {shape} in {saved!r} and {here[key]} in {loaded!r}"
    return None


def _shapes(model: PeftModel, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """`{key in the adapter's file: shape}` of its weights.

    Modules that are trained in full may have another number of outputs, so theirs is left out.
    """
    ends = tuple(f".{name}." for name in model.peft_config[adapter_name].modules_to_save or ())
    with torch.no_grad():
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {
        key: tuple(value.shape[1:] if any(end in f".{key}" for end in ends) else value.shape)
        for key, value in state_dict.items()
        if _belongs_to_module(key)
    }


def _belongs_to_module(key: str) -> bool:
    """Whether a key of an adapter's file is that of a module's tensor; settings noted among the weights have no module.

    Example:
        >>> _belongs_to_module("base_model.model.classifier.bias"), _belongs_to_module("base_model.model.lora_settings")
        (True, False)
    """
    return "." in key.removeprefix("base_model.model.")
