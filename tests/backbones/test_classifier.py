"""The classifier is found wherever a model of transformers has it, and no loss module instead."""

import warnings

import backbones
import pytest
import tiny
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_heads import HeadMaskedLoraConfig
from peft_heads.backbones.classifier import classifier_names, is_loss, label_sized_modules


SWIN = {**backbones._UPERNET_SWIN, "embed_dim": 8}


def test_the_classifier_beside_the_backbone():
    assert classifier_names(tiny.make("vit")) == ["classifier"]
    assert classifier_names(hf.ViTModel(tiny.make("vit").config, add_pooling_layer=False)) == []
    assert classifier_names(tiny.make("vit", num_labels=0)) == []  # nn.Identity


def test_classifiers_that_cannot_be_wrapped_whole():
    model = nn.Module()
    model.head = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()])  # is never called itself
    assert classifier_names(model) == ["head.0", "head.1"]

    model = nn.Module()
    model.block = nn.ModuleDict({"subhead": nn.Linear(2, 2)})  # ends with "head"
    model.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert classifier_names(model) == ["head.0"]
    model.block = nn.Linear(2, 2)
    assert classifier_names(model) == ["head"]


def test_a_trained_classifier_is_found_again():
    model = get_peft_model(
        tiny.make("vit"), LoraConfig(target_modules=tiny.now(["q_proj"]), modules_to_save=["classifier"])
    )
    assert classifier_names(model.get_base_model()) == ["classifier"]


def perceiver(num_labels=3, d_latents=32):
    config = hf.PerceiverConfig(
        num_latents=4, d_latents=d_latents, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=4,
        num_cross_attention_heads=4, image_size=16, num_labels=num_labels,
    )  # fmt: skip
    return hf.PerceiverForImageClassificationLearned(config)


def oneformer():
    config = hf.OneFormerConfig(
        backbone_config=hf.SwinConfig(**SWIN), hidden_dim=32, conv_dim=32, mask_dim=32, encoder_layers=1,
        decoder_layers=2, num_queries=5, num_attention_heads=4, dim_feedforward=32, encoder_feedforward_dim=32,
        num_labels=3, text_encoder_width=32, text_encoder_num_layers=1, text_encoder_vocab_size=99,
        text_encoder_context_length=8, text_encoder_n_ctx=2,
    )  # fmt: skip
    return hf.OneFormerForUniversalSegmentation(config)


def rt_detr():
    resnet = hf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.RTDetrConfig(
        backbone_config=resnet, encoder_hidden_dim=32, encoder_in_channels=[8] * 3, decoder_in_channels=[32] * 3,
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_labels=3, freeze_backbone_batch_norms=False,
    )  # fmt: skip
    return hf.RTDetrForObjectDetection(config)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (perceiver, {"perceiver.decoder.decoder.final_layer"}),
        (lambda: perceiver(num_labels=32), {"perceiver.decoder.decoder.final_layer"}),  # as many as channels
        (oneformer, {"model.transformer_module.decoder.class_embed"}),
    ],
)
def test_a_classifier_inside_the_backbone(make, expected):
    model = make()
    assert set(classifier_names(model)) == expected
    model = get_peft_model(model, HeadMaskedLoraConfig(ne=0))
    trained = {name for name, param in model.named_parameters() if param.requires_grad and "lora_" not in name}
    assert trained == {
        f"base_model.model.{n}.modules_to_save.default.{p}" for n in expected for p in ("weight", "bias")
    }
    assert set(classifier_names(model.get_base_model())) == expected  # for a second adapter


def test_all_classifiers_of_a_detector():
    names = classifier_names(rt_detr())
    assert {"model.enc_score_head", "model.denoising_class_embed"} <= set(names)
    assert {f"model.decoder.class_embed.{i}" for i in range(2)} <= set(names) or {"class_embed.0"} <= set(names)


def test_random_numbers_are_left_alone():
    model = Drawing(Config())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert classifier_names(model) == ["backbone.new"]
    assert torch.equal(torch.rand(3), expected)


class Labelled(nn.Module):
    """A model with the attributes of transformers' models, whose classifier cannot be found."""

    base_model_prefix = "backbone"

    def __init__(self, config=None):
        super().__init__()
        if config is not None and config.fails:
            raise RuntimeError
        self.config = config
        self.backbone = backbones.FusedViT((6,), num_classes=0)
        self.backbone.prompts = nn.Parameter(torch.zeros(2, 24 if config is None else config.num_labels))

    def forward(self, x, labels=None):
        return self.backbone(x)


class Drawing(Labelled):
    """A module that draws random numbers on the CPU while it is built, on any device."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone.new = nn.Embedding(config.num_labels, 4)
        torch.rand(1, device="cpu")


class Config:
    def __init__(self, fails=False):
        self.num_labels, self.fails = 7, fails

    def to_dict(self):
        return {}


def test_a_warning_where_none_is_found():
    model = Labelled()
    model.config = Config(fails=True)
    with pytest.warns(UserWarning, match=r"no classifier was found in Labelled.*modules_to_save="):
        get_peft_model(model, HeadMaskedLoraConfig(ne=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Labelled()
        model.config = Config(fails=True)
        get_peft_model(model, HeadMaskedLoraConfig(ne=1, modules_to_save=[]))


def test_a_warning_where_peft_cannot_train_it():
    with pytest.warns(UserWarning, match=r"backbone\.prompts of Labelled depend on the number of labels, but PEFT"):
        assert classifier_names(Labelled(Config())) == []


def test_a_model_that_cannot_be_built_again():
    model = Labelled(Config())
    model.config.fails = True
    assert label_sized_modules(model, []) == ([], [])


def test_what_is_a_loss():
    assert is_loss(nn.CrossEntropyLoss()) and not is_loss(nn.Linear(2, 2))


def test_timm_s_own_word():
    model = backbones.FusedViT((6,))
    model.fc, model.head = model.head, nn.Identity()
    assert classifier_names(model) == []
    model.get_classifier = lambda: model.fc
    assert classifier_names(model) == ["fc"]
