import pytest
import tiny
import torch
import transformers
from peft import get_peft_model

from peft_heads import HeadMaskedLoraConfig
from peft_heads.backbones.operations import count_operations
from peft_heads.scoring.speed import SpeedBudget


def clip():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32}
    text = {**sizes, "vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 4}, text_config=text, num_labels=3
    )
    return transformers.CLIPForImageClassification(config)


def test_the_numbers_reach_the_speed():
    model = tiny.make("vit")
    heads, neurons = ([torch.rand(units) for _ in range(2)] for units in (6, 32))
    for target in (1.2, 2.0, 4.0):
        for whole in (model, get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))):
            cut = SpeedBudget(whole, target).choose(heads, neurons)
            assert cut.speed == count_operations(model).speed(cut.num_heads, cut.num_neurons) >= target


def test_where_heads_cannot_go_neurons_do():
    model = clip()
    bound = count_operations(model).speed(6, 1)
    cut = SpeedBudget(model, 1.2).choose([torch.zeros(6)] * 2, [torch.ones(32)] * 2)
    assert cut.num_heads == 6 and 1.2 <= cut.speed < bound
    with pytest.raises(
        ValueError, match=rf"target_speed=3 cannot be reached, at most {bound:.3g} \(no heads can be removed:"
    ):
        SpeedBudget(model, 3.0)


def test_a_model_whose_layers_differ():
    with pytest.raises(ValueError, match="operations of a SwinForImageClassification cannot be counted by numbers"):
        SpeedBudget(tiny.make("swin"), 1.5)
