"""Loaders of the demo model, a small ViT with 12 heads that ships with the package, pre-trained on synthetic strokes."""

from pathlib import Path

import torch
from transformers import AutoConfig, ViTForImageClassification

from ..data.images import load_image_processor
from ..image_classifier import quiet_loading


DEMO_MODEL_PATH = Path(__file__).parent / "vit_strokes"


def load_demo_model(num_labels=10, random_weights=False, seed=0, path=DEMO_MODEL_PATH):
    """Load the shipped ViT as a `ViTForImageClassification` in evaluation mode, with a new classifier.

    `seed` fixes the classifier's initial weights, and all weights with `random_weights=True` (the same
    architecture in its default initialisation, for comparison). The global random state is left as it was.
    """
    labels = {"id2label": {i: str(i) for i in range(num_labels)}, "label2id": {str(i): i for i in range(num_labels)}}
    with torch.random.fork_rng(devices=[]), quiet_loading():
        torch.default_generator.manual_seed(seed)
        if random_weights:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **labels)
            return ViTForImageClassification(config).eval()
        return ViTForImageClassification.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **labels
        ).eval()


def load_demo_processor(path=DEMO_MODEL_PATH):
    """Load the image processor: resizes to 32x32 pixels and normalises to [-1, 1], shape (batch, 3, 32, 32)."""
    with quiet_loading():
        return load_image_processor(path, local_files_only=True)
