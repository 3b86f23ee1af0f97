"""What is written beside an adapter's weights, and the warning about one that was to switch something off."""

import warnings

import pytest
import torch

from peft_heads import HeadMaskedLoraConfig
from peft_heads.adapter_folder.contents import FolderContents
from peft_heads.adapter_folder.saving import write_contents


@pytest.mark.parametrize("heads, neurons", [(False, True), (True, False), (False, False)])
def test_a_speed_is_reached_by_heads_or_neurons(tmp_path, heads, neurons):
    """Either suffices; a warning comes where neither is off."""
    contents = FolderContents(
        masks={"q": torch.tensor([not heads, True])},
        neuron_masks={"fc1": torch.tensor([not neurons, True, True])},
        model_class="ViTForImageClassification",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_contents(tmp_path, HeadMaskedLoraConfig(target_speed=1.5), contents)
    expected = [] if heads or neurons else ["is to deactivate heads", "is to switch neurons off"]
    assert len(caught) == len(expected)
    assert all(text in str(warning.message) for text, warning in zip(expected, caught, strict=True))
