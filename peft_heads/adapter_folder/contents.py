"""What stands beside an adapter's weights and configuration, while the adapter is in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


@dataclass
class FolderContents:
    """Plain data, so that its owner can be copied and pickled.

    Attributes:
        masks: The adapter's head masks, as of the last time its weights were collected.
        neuron_masks: Its neuron masks, likewise; empty if it prunes none.
        model_class: Class name of the base model; empty until the weights are collected for the first time.
        id2label: Label names of the adapter, as of the last time its weights were collected.
        labels_in_file: Label names beside the weights that are about to be loaded; None once these are in force.
        image_processor: `preprocessor_config.json` of the image processor as it is used.
        head_scores: Contents of `head_scores.json` and `head_scores.png`, by file name, once heads were selected by
            scores. They are written as long as the masks are those that the scores have led to.
        selection_pending: Whether a [`TaylorHeadScorer`] is going to select heads later, so that Trainer saves
            its checkpoints of the warm-up without a warning.
    """

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    neuron_masks: dict[str, torch.Tensor] = field(default_factory=dict)
    model_class: str = ""
    id2label: dict[int, str] | None = None
    labels_in_file: dict[int, str] | None = None
    image_processor: str | None = None
    head_scores: dict[str, bytes] = field(default_factory=dict)
    selection_pending: bool = False

    @property
    def selected(self) -> bool:
        """Whether any head is deactivated."""
        return any(not mask.all() for mask in self.masks.values())

    @property
    def neurons_selected(self) -> bool:
        """Whether any neuron is off."""
        return any(not mask.all() for mask in self.neuron_masks.values())


def folder_contents(model: Any, adapter_name: str = "default") -> FolderContents | None:
    """What `save_pretrained` is going to write beside an adapter's weights; None if the adapter is no method of ours.

    Args:
        model: A `PeftModel`, its tuner, or a model into which an adapter was injected.
        adapter_name: The adapter.
    """
    state = getattr(model, "adapter_states", {}).get(adapter_name)
    if state is not None:
        return state.contents
    # injected into a model, without a tuner that stays
    carried = getattr(model.peft_config[adapter_name], "carried", None)
    return None if carried is None else carried.contents


def set_image_processor(model: Any, image_processor: Any, adapter_name: str = "default") -> None:
    """Let `save_pretrained` and `push_to_hub` store the image processor beside the adapter.

    [`TaylorHeadScorer`] does so by itself with the Trainer's `processing_class`.
    """
    contents = folder_contents(model, adapter_name)
    settings = getattr(image_processor, "to_dict", dict)()
    if contents is not None and "image_processor_type" in settings:  # not a tokenizer, say
        contents.image_processor = image_processor.to_json_string()
