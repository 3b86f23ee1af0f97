"""The part of a model that sees the images, in models that have other parts."""

import pytest
import transformers as hf
from peft import get_peft_model

from peft_heads import HeadMaskedLoraConfig
from peft_heads.heads.detect import resolve_heads


V = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32}
V["patch_size"] = 8
T = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}


def text(model_type, **config):
    return {**T, "num_key_value_heads": 2, "model_type": model_type, **config}


AROUND_A_VISION_TOWER = {
    "paligemma": lambda: hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config={**V, "model_type": "siglip_vision_model"},
            text_config=text("gemma", head_dim=8),
            projection_dim=32,
        )
    ),
    "git": lambda: hf.GitForCausalLM(hf.GitConfig(vision_config=V, **T)),
    "idefics": lambda: hf.IdeficsForVisionText2Text(
        hf.IdeficsConfig(vision_config={"embed_dim": 32, **V}, **T, use_resampler=False)
    ),
    "ovis2": lambda: hf.Ovis2ForConditionalGeneration(
        hf.Ovis2Config(
            vision_config={**V, "hidden_stride": 1, "vocab_size": 99, "num_visual_indicator_tokens": 5},
            text_config=text("qwen2"),
            hidden_size=32,
            vocab_size=99,
        )
    ),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config={**V, "model_type": "clip_vision_model"}, text_config=text("llama"))
    ),
}


@pytest.mark.parametrize("make", AROUND_A_VISION_TOWER.values(), ids=AROUND_A_VISION_TOWER)
def test_a_model_around_the_vision_tower_is_no_text_tower(make):
    model = make()
    seeing = [name for name in resolve_heads(model) if "vision" in name or "image_encoder" in name]
    model = get_peft_model(model, HeadMaskedLoraConfig(ne=1))
    adapted = [name for name, part in model.get_base_model().named_modules() if hasattr(part, "head_layout")]
    assert adapted and set(adapted) < set(seeing) and len(adapted) == len(seeing) * 2 // 3
