"""A tiny model of every family, made from its configuration, and a description of its attention layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn


IMAGE_SIZE = 32
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 16,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 16,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "projection_size": 24,
}
SWIN = {"embed_dim": 12, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2, "image_size": IMAGE_SIZE}
PYRAMID = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [4, 8, 16, 16],
    "num_attention_heads": [1, 2, 4, 4],
    "mlp_ratios": [1, 1, 1, 1],
}
LABELS = {"num_labels": 3}


@dataclass(frozen=True)
class Family:
    """How a family is built, and what the tests expect to find in it.

        Attributes:
            make: Builds the model.
    prefix: Beginning of the names of adapted projections.
            projections: Last components of the adapted projections, in the order query, value; one name if fused.
            output: Name, within the attention layer, of the module that takes the heads' outputs side by side.
            classifiers: Modules trained from scratch.
            heads: Numbers of heads, ascending.
            layers: Number of attention layers that are adapted.
    """

    make: Callable[[], nn.Module]
    prefix: str
    projections: tuple[str, ...] = ("q_proj", "v_proj")
    output: str = "o_proj"
    classifiers: tuple[str, ...] = ("classifier",)
    heads: tuple[int, ...] = (6,)
    layers: int = 4


def _hf(class_name: str, config_name: str, *args: Any, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, class_name)(getattr(hf, config_name)(**config), *args)


def _two_towers(class_name: str, config_name: str, **config: Any) -> Callable[[], nn.Module]:
    vision = {**VIT, "projection_size": 24}
    if "Siglip2" in class_name:
        del vision["image_size"]
        vision["num_patches"] = (IMAGE_SIZE // VIT["patch_size"]) ** 2
    return _hf(class_name, config_name, text_config=TEXT, vision_config=vision, **config)


def _sam() -> nn.Module:
    return hf.SamModel(
        hf.SamConfig(
            vision_config={
                "hidden_size": 24,
                "output_channels": 8,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
                "mlp_dim": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 4,
            },
            prompt_encoder_config={"hidden_size": 8, "image_size": IMAGE_SIZE, "patch_size": 8},
            mask_decoder_config={"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
        )
    )


def _timm_wrapper(class_name: str, architecture: str, **model_args: Any) -> Callable[[], nn.Module]:
    return _hf(class_name, "TimmWrapperConfig", architecture=architecture, model_args=model_args, **LABELS)


def _timm(module: str, class_name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import importlib

        return getattr(importlib.import_module(f"timm.models.{module}"), class_name)(**arguments)

    return make


class FusedAttention(nn.Module):
    """timm's attention: one projection for q, k and v, its rows in this order, each with its heads side by side."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (batch, num_heads, tokens, head_dim)
        context = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(context.transpose(1, 2).reshape(batch, tokens, dim))


class FusedBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), FusedAttention(dim, num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(self.norm(x))


class FusedViT(nn.Module):
    """A model with the structure and the names of timm's VisionTransformer, or, with stages, of its Swin."""

    def __init__(self, num_heads: tuple[int, ...] = (6, 6), dim: int = 24, num_classes: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.blocks = nn.Sequential(*[FusedBlock(dim, heads) for heads in num_heads])
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2)).mean(dim=1))


_BEIT_SEGMENTATION = {**VIT, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 8}
_UPERNET_SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 4],
    "window_size": 2,
    "patch_size": 2,
    "image_size": IMAGE_SIZE,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_OLD = ("query", "value")
_FUSED = ("qkv",)
_HIERA = {
    "embed_dim": 8,
    "image_size": [IMAGE_SIZE, IMAGE_SIZE],
    "patch_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 4],
    "embed_dim_multiplier": 2.0,
    "num_query_pool": 1,
    "query_stride": [2, 2],
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, False, False],
}
_TIMM_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": (1, 1),
    "num_heads": (2, 4),
    "window_size": 4,
}
_TIMM_VIT = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 6}

# transformers 5.9 and later has one module in place of four
_FPN = ("fpn",) if hasattr(hf.models.beit.modeling_beit, "BeitFPNNeck") else ("fpn1", "fpn2")

FAMILIES = {
    "vit": Family(_hf("ViTForImageClassification", "ViTConfig", **VIT, **LABELS), "vit."),
    "vit bare": Family(_hf("ViTModel", "ViTConfig", False, **VIT), "layers.", classifiers=()),
    "vit pretraining": Family(_hf("ViTForMaskedImageModeling", "ViTConfig", **VIT), "vit.", classifiers=()),
    "deit": Family(_hf("DeiTForImageClassification", "DeiTConfig", **VIT, **LABELS), "deit."),
    "deit with teacher": Family(
        _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT, **LABELS),
        "deit.",
        classifiers=("cls_classifier", "distillation_classifier"),
    ),
    "beit": Family(_hf("BeitForImageClassification", "BeitConfig", **VIT, **LABELS), "beit."),
    "beit relative bias": Family(
        _hf("BeitForImageClassification", "BeitConfig", **VIT, **LABELS, use_relative_position_bias=True), "beit."
    ),
    "beit segmentation": Family(
        _hf("BeitForSemanticSegmentation", "BeitConfig", **_BEIT_SEGMENTATION, **LABELS),
        "beit.",
        classifiers=(*_FPN, "decode_head", "auxiliary_head"),
    ),
    "dinov2": Family(_hf("Dinov2ForImageClassification", "Dinov2Config", **VIT, **LABELS), "dinov2."),
    "dinov2 with registers": Family(
        _hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **VIT, **LABELS),
        "dinov2_with_registers.",
    ),
    "dinov3": Family(_hf("DINOv3ViTModel", "DINOv3ViTConfig", **VIT), "model.", classifiers=()),
    "vit mae": Family(_hf("ViTMAEModel", "ViTMAEConfig", **VIT, mask_ratio=0.0), "layers.", classifiers=()),
    "vit mae pretraining": Family(
        _hf(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            **VIT,
            mask_ratio=0.0,
            decoder_num_attention_heads=2,
            decoder_hidden_size=8,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=8,
        ),
        "vit.",
        classifiers=(),
    ),
    "vit msn": Family(_hf("ViTMSNForImageClassification", "ViTMSNConfig", **VIT, **LABELS), "vit."),
    "swin": Family(_hf("SwinForImageClassification", "SwinConfig", **SWIN, **LABELS), "swin.", heads=(2, 4), layers=3),
    "swinv2": Family(
        _hf("Swinv2ForImageClassification", "Swinv2Config", **SWIN, **LABELS),
        "swinv2.",
        _OLD,
        "^output.dense",
        heads=(2, 4),
        layers=3,
    ),
    "clip": Family(_two_towers("CLIPModel", "CLIPConfig"), "vision_model.", output="out_proj", classifiers=()),
    "clip vision": Family(
        _hf("CLIPVisionModel", "CLIPVisionConfig", **VIT), "encoder.", output="out_proj", classifiers=()
    ),
    "clip vision projection": Family(
        _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VIT),
        "vision_model.",
        output="out_proj",
        classifiers=(),
    ),
    "clip classifier": Family(
        _two_towers("CLIPForImageClassification", "CLIPConfig", **LABELS), "vision_model.", output="out_proj"
    ),
    "siglip": Family(_two_towers("SiglipModel", "SiglipConfig"), "vision_model.", output="out_proj", classifiers=()),
    "siglip vision": Family(
        _hf("SiglipVisionModel", "SiglipVisionConfig", **VIT), "encoder.", output="out_proj", classifiers=()
    ),
    "siglip classifier": Family(
        _two_towers("SiglipForImageClassification", "SiglipConfig", **LABELS), "vision_model.", output="out_proj"
    ),
    "siglip2": Family(
        _two_towers("Siglip2Model", "Siglip2Config"), "vision_model.", output="out_proj", classifiers=()
    ),
    "siglip2 classifier": Family(
        _two_towers("Siglip2ForImageClassification", "Siglip2Config", **LABELS), "vision_model.", output="out_proj"
    ),
    "pvt v2": Family(
        _hf("PvtV2ForImageClassification", "PvtV2Config", image_size=IMAGE_SIZE, **PYRAMID, **LABELS),
        "pvt_v2.",
        _OLD,
        "proj",
        heads=(1, 2, 4),
    ),
    "segformer": Family(
        _hf("SegformerForImageClassification", "SegformerConfig", **PYRAMID, **LABELS), "segformer.", heads=(1, 2, 4)
    ),
    "segformer segmentation": Family(
        _hf("SegformerForSemanticSegmentation", "SegformerConfig", **PYRAMID, decoder_hidden_size=8, **LABELS),
        "segformer.",
        classifiers=("decode_head",),
        heads=(1, 2, 4),
    ),
    "upernet swin": Family(
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=hf.SwinConfig(**_UPERNET_SWIN),
                hidden_size=8,
                pool_scales=[1, 2],
                auxiliary_in_channels=32,
                auxiliary_channels=8,
                **LABELS,
            )
        ),
        "backbone.",
        classifiers=("decode_head", "auxiliary_head"),
        heads=(1, 2, 4),
    ),
    "depth anything": Family(
        lambda: hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=hf.Dinov2Config(
                    **VIT, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False
                ),
                patch_size=8,
                reassemble_hidden_size=24,
                neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8,
                head_hidden_size=8,
            )
        ),
        "backbone.",
        classifiers=("neck", "head"),
    ),
    "hiera": Family(
        _hf("HieraForImageClassification", "HieraConfig", **_HIERA, **LABELS),
        "hiera.",
        _FUSED,
        "proj",
        heads=(1, 2, 4),
        layers=3,
    ),
    "sam": Family(_sam, "vision_encoder.", _FUSED, "proj", classifiers=()),
    "fused vit": Family(lambda: FusedViT((6, 6, 6, 6)), "blocks.", _FUSED, "proj", ("head",)),
    "fused vit bare": Family(lambda: FusedViT((6, 6, 6, 6), num_classes=0), "blocks.", _FUSED, "proj", ()),
    "fused swin": Family(lambda: FusedViT((2, 4, 4)), "blocks.", _FUSED, "proj", ("head",), (2, 4), 3),
    "timm vit": Family(
        _timm("vision_transformer", "VisionTransformer", **_TIMM_VIT, num_classes=3),
        "blocks.",
        _FUSED,
        "proj",
        ("head",),
    ),
    "timm swin": Family(
        _timm("swin_transformer", "SwinTransformer", **_TIMM_SWIN, num_classes=3),
        "layers.",
        _FUSED,
        "proj",
        ("head",),
        (2, 4),
        2,
    ),
    "timm wrapper": Family(
        _timm_wrapper("TimmWrapperForImageClassification", "vit_tiny_patch16_224", **_TIMM_VIT),
        "timm_model.",
        _FUSED,
        "proj",
        ("timm_model.head",),
    ),
    "timm wrapper swin": Family(
        _timm_wrapper("TimmWrapperForImageClassification", "swin_tiny_patch4_window7_224", **_TIMM_SWIN),
        "timm_model.",
        _FUSED,
        "proj",
        ("timm_model.head",),
        (2, 4),
        2,
    ),
    "timm wrapper bare": Family(
        _timm_wrapper("TimmWrapperModel", "vit_tiny_patch16_224", **_TIMM_VIT), "timm_model.", _FUSED, "proj", ()
    ),
}


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the inputs of a forward pass: two images, and whatever else the model's class requires."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    name = type(model).__name__
    if not isinstance(model, hf.PreTrainedModel):
        return {"x": images}
    given = {"pixel_values": images}
    if name.startswith("Siglip2"):
        side = IMAGE_SIZE // VIT["patch_size"]
        patches = torch.randn(2, side**2, 3 * VIT["patch_size"] ** 2, generator=generator)
        given = {"pixel_values": patches, "spatial_shapes": torch.tensor([[side, side]] * 2)}
        given["pixel_attention_mask"] = torch.ones(2, side**2, dtype=torch.long)
    if name in ("CLIPModel", "SiglipModel", "Siglip2Model"):
        given["input_ids"] = torch.tensor([[0, 3, 4, 1]] * 2)
    if name == "SamModel":
        given["input_points"] = torch.tensor([[[[8.0, 8.0]]]] * 2)
    if name.startswith("ViTMAE"):
        given["noise"] = torch.linspace(0, 1, (IMAGE_SIZE // VIT["patch_size"]) ** 2).repeat(2, 1)
    return given


def output(model: nn.Module, **given: torch.Tensor) -> torch.Tensor:
    """Return one tensor that depends on the image."""
    result = model(**given)
    if isinstance(result, torch.Tensor):
        return result
    for name in (
        "logits",
        "logits_per_image",
        "reconstruction",
        "pred_masks",
        "predicted_depth",
        "image_embeds",
        "last_hidden_state",
    ):
        if result.get(name) is not None:
            return result[name]
    raise AssertionError(f"no output of {type(model).__name__} among {list(result)}")
