"""Tiny classifiers of the families whose configurations can say fewer heads or neurons, and units that are silent."""

import backbones
import tiny
import torch
from transformers import BeitConfig, BeitForImageClassification

from peft_heads.backbones.blocks import find_blocks
from peft_heads.heads import resolve_heads


# transformers before 5.9 has no `head_dim` but `pruned_heads`, which forgets BEiT's relative position bias
OLD = tiny.OLD_NAMES
HAS_BIAS = ("beit relative bias", "beit shared bias")
# families that lose heads and neurons, and those that lose neurons alone
BOTH = ("vit", "deit", "deit with teacher", "beit", "beit relative bias", "dinov2", "dinov2 with registers", "vit msn")
NEURONS_ALONE = ("clip classifier", "siglip classifier")
FAMILIES = {
    **{name: backbones.FAMILIES[name].make for name in BOTH},
    "beit shared bias": lambda: BeitForImageClassification(
        BeitConfig(**backbones.VIT, **backbones.LABELS, use_shared_relative_position_bias=True)
    ),
}
IMAGES = torch.randn(2, 3, backbones.IMAGE_SIZE, backbones.IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def make(name):
    """Make a classifier in which no bias, position bias or layer scale is zero, in evaluation mode."""
    model = FAMILIES[name]() if name in FAMILIES else backbones.FAMILIES[name].make()
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.data += 0.2 * torch.randn(param.shape, generator=generator)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IMAGES).logits


def silence_heads(model, heads):
    """Zero the values of heads, `{index of the layer: heads}`, in the model itself; return the masks."""
    masks = {}
    values = {n: layout for n, layout in resolve_heads(model).items() if layout.parts[0].role == "value"}
    for index, (name, layout) in enumerate(values.items()):
        mask = torch.ones(layout.num_heads, dtype=torch.bool)
        mask[list(heads.get(index, []))] = False
        masks[name] = mask
        for param in model.get_submodule(name).parameters():
            param.data = layout.mask_rows(param.data, mask)
    return masks


def silence_neurons(model, numbers):
    """Zero the rows of so many neurons, drawn at random, `{index of the layer: number}`; return the masks.

    A single number counts for all layers.
    """
    masks = {}
    generator = torch.Generator().manual_seed(2)
    for index, block in enumerate(find_blocks(model)):
        first = model.get_submodule(block.mlp_layers[0])
        mask = torch.ones(first.out_features, dtype=torch.bool)
        number = numbers if isinstance(numbers, int) else numbers.get(index, 0)
        mask[torch.randperm(first.out_features, generator=generator)[:number]] = False
        masks[block.mlp_layers[0]] = mask
        for param in first.parameters():
            param.data[~mask] = 0
    return masks


def neurons_off(name):
    """A number of neurons that a family's configuration can lose: DINOv2 has 4 x 24."""
    return 48 if name.startswith("dinov2") else 7
