"""What is written beside an adapter's weights and configuration: card, labels, image processor, head scores."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from .atomic import write_atomically
from .card import CardedConfig, selection_settings, write_card
from .contents import FolderContents
from .files import CARD_FILE, PROCESSOR_FILE
from .labels import write_labels
from .score_files import SCORES_FILE, led_to, write_head_scores


def write_contents(
    folder: str | os.PathLike, config: CardedConfig, contents: FolderContents, warn: bool = True
) -> None:
    """Write the files into `folder`; an image processor, labels or scores that are not known leave what is there.

    Args:
        folder: The adapter's folder.
        config: The adapter's configuration.
        contents: What is written.
        warn: Whether to say so if heads were to be selected and none is.
    """
    folder = Path(folder)
    if not contents.model_class:
        return  # the configuration alone is saved, without an adapter
    settings = selection_settings(config)
    if warn and settings is not None:
        _warn_of_no_selection(folder, config, contents)
    if contents.id2label:
        write_labels(folder, contents.id2label)
    if contents.image_processor is not None:
        write_atomically(folder / PROCESSOR_FILE, contents.image_processor)
    if settings is not None and led_to(contents.head_scores.get(SCORES_FILE), settings, contents.masks):
        write_head_scores(folder, contents.head_scores)
    write_card(folder / CARD_FILE, config, contents)


def _warn_of_no_selection(folder: Path, config: CardedConfig, contents: FolderContents) -> None:
    # A run that broke off leaves selection_pending behind, but then it is not Trainer that saves. An adapter that is
    # not named "default" lies in a folder of its own inside the checkpoint.
    is_checkpoint = any(name.startswith("checkpoint-") for name in (folder.name, folder.parent.name))
    if contents.selection_pending and is_checkpoint:  # of the warm-up
        return
    if getattr(config, "target_speed", None) is not None and (contents.selected or contents.neurons_selected):
        return  # heads alone, neurons alone or both reach a speed
    if config.masks_heads and contents.masks and not contents.selected:
        numbers = {name: getattr(config, name, None) for name in ("ne", "ratio", "target_speed")}
        asked_for = next(f"{name}={value}" for name, value in numbers.items() if value is not None)
        warnings.warn(
            f"the adapter saved to {folder} is to deactivate heads ({asked_for}), but none has "
            f"been selected: it is {config.card.unmasked} so far. Train with TaylorHeadScorer among the callbacks, or use "
            "HeadScorer or set_head_masks"
        )
    numbers = {name: value for name in ("neuron_ratio", "target_speed") if (value := getattr(config, name, None))}
    if numbers and contents.neuron_masks and not contents.neurons_selected:
        asked_for = ", ".join(f"{name}={value}" for name, value in numbers.items())
        warnings.warn(
            f"the adapter saved to {folder} is to switch neurons off ({asked_for}), but all are on, so that none can be "
            "removed. Train with TaylorHeadScorer among the callbacks, or use HeadScorer or set_neuron_masks"
        )
