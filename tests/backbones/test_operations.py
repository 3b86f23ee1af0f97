import pytest
import tiny
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peft_heads import HeadMaskedLoraConfig
from peft_heads.backbones.operations import Operations, count_operations
from peft_heads.heads import resolve_heads


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "image_size": 16, "patch_size": 4}
FAMILIES = {
    "ViT": {"intermediate_size": 32},
    "DeiT": {"intermediate_size": 32},
    "Beit": {"intermediate_size": 32},
    "Dinov2": {"mlp_ratio": 4},
    "Dinov2WithRegisters": {"mlp_ratio": 4, "num_register_tokens": 3},
}


def make(family, **settings):
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], "num_labels": 3, **settings})
    return getattr(transformers, f"{family}ForImageClassification")(config)


def make_tower(family, **settings):
    vision = {**SIZES, "intermediate_size": 32, **settings}
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision, text_config={**text, "bos_token_id": 0, "eos_token_id": 1, "vocab_size": 4}, num_labels=3
    )
    return getattr(transformers, f"{family}ForImageClassification")(config)


def counted(model):
    """Multiply-adds of one image as torch counts them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values=tiny.images(1))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_torchs_count_of_a_model_that_is_really_smaller(family):
    model = make(family)
    operations = count_operations(model)
    neurons = {"mlp_ratio": 2} if family.startswith("Dinov2") else {"intermediate_size": 20}
    remain = 48 if family.startswith("Dinov2") else 20
    assert operations.num_heads == 6 and operations.num_neurons == (96 if family.startswith("Dinov2") else 32)
    assert operations.total(6, operations.num_neurons) == counted(model)
    assert operations.total(6, remain) == counted(make(family, **neurons))
    smaller = make(family, **neurons, num_attention_heads=4, head_dim=4)
    if {layout.out_features for layout in resolve_heads(smaller).values()} != {16}:
        pytest.skip(f"transformers {transformers.__version__} cannot say that a {family} has fewer heads")
    assert operations.total(4, remain) == counted(smaller)
    assert operations.speed(4, remain) == counted(model) / counted(smaller)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_vision_towers(family):
    no_head = {"vision_use_head": False} if family == "Siglip" else {}
    model = make_tower(family)
    operations = count_operations(model)
    assert (operations.num_heads, operations.num_neurons) == (6, 32)
    # what is pruned is without SigLIP's pooling head, which no classifier uses
    assert operations.total(6, 32) == counted(make_tower(family, **no_head))
    assert operations.total(6, 20) == counted(make_tower(family, **no_head, intermediate_size=20))


def test_adapters_do_not_count():
    base = tiny.make("vit")
    expected = count_operations(base)
    model = get_peft_model(base, HeadMaskedLoraConfig(ne=1))
    assert count_operations(model) == expected
    assert count_operations(model.base_model.model) == expected
    assert next(model.parameters()).device.type == "cpu"


def test_speed_of_a_base_model():
    """The bound of whole heads alone, and of half of both."""
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig())
    operations = count_operations(model)
    assert operations.speed(12, 3072) == 1
    assert operations.total(12, 3072) == pytest.approx(17.56e9, rel=1e-3)
    assert operations.speed(9, 3072) == pytest.approx(1.10, abs=0.005)
    assert operations.speed(6, 3072) == pytest.approx(1.22, abs=0.005)
    assert operations.speed(6, 1536) == pytest.approx(1.99, abs=0.005)


def test_refusals():
    with pytest.raises(ValueError, match="operations of a Sequential cannot be counted: it has no configuration"):
        count_operations(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="operations of a SwinForImageClassification .* its layers differ in them"):
        count_operations(tiny.make("swin"))


def test_operations_are_linear():
    operations = Operations(num_heads=4, num_neurons=8, fixed=7, per_head=5, per_neuron=3)
    assert operations.total(4, 8) == 51 and operations.total(1, 2) == 18 and operations.speed(1, 2) == 51 / 18
