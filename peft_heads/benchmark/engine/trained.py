"""What is read off a model when its training is finished: the bytes that are saved of it, the scores of its heads."""

from __future__ import annotations

import json
from pathlib import Path

from peft import get_peft_model_state_dict
from torch import nn

from ...adapter_folder.score_files import SCORES_FILE
from ...backbones.classifier import classifier_names


def saved_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes that are saved of a trained model: (the adapter, or whatever else was trained; the classifier)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = tuple(f"{name}." for name in classifier_names(base))
    if hasattr(model, "peft_config"):
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        tensors = {name: param for name, param in model.named_parameters() if param.requires_grad}
    of_head = [x.nbytes for name, x in tensors.items() if name.removeprefix("base_model.model.").startswith(heads)]
    return sum(x.nbytes for x in tensors.values()) - sum(of_head), sum(of_head)


def selection_scores(folder: Path, model: nn.Module) -> dict[str, list[float]] | None:
    """The scores by which the run's heads were selected, or None."""
    path = folder / SCORES_FILE
    if not path.exists():
        return None  # baselines that need no scores
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return scores.get(model.active_peft_config.criterion)
