"""Every method of PEFT with `--method peft`: it trains its own targets, or is refused in one line."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from backbones import FusedViT
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from peft_heads.methods import MethodSettings, apply_method, check_method


# Settings without which the tiny ViT is too small, or which have no default.
SETTINGS = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 8},
}
REFUSED = {
    "ADAPTION_PROMPT": "adds text tokens: it does not work on image classifiers",
    "CARTRIDGE": "adds text tokens: it does not work on image classifiers",
    "CPT": "only supports task_type = CAUSAL_LM",
    "MULTITASK_PROMPT_TUNING": "adds text tokens: it does not work on image classifiers",
    "POLY": "asks for task_ids with every batch: it does not work on image classifiers",
    "PREFIX_TUNING": "adds text tokens: it does not work on image classifiers",
    "PROMPT_TUNING": "adds text tokens: it does not work on image classifiers",
    "P_TUNING": "adds text tokens: it does not work on image classifiers",
    "SHADOW": "runs a smaller language model beside a decoder: it does not work on image classifiers",
    "TRAINABLE_TOKENS": "trains rows of the embedding of text tokens: it does not work on image classifiers",
    "XLORA": "mixes saved adapters of a language model: it does not work on image classifiers",
}
OWN_TARGETS = {"LN_TUNING": "layernorm", "RLRR": ""}


def applied(peft_type, model=None, **settings):
    config = {"peft_type": peft_type, **SETTINGS.get(peft_type, {}), **settings}
    method = MethodSettings("peft", {"peft_config": json.dumps(config)})
    check_method(method)
    return apply_method(tiny.make("vit") if model is None else model, method)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # LN tuning, of the layer norm
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:CUDA is not available")  # BOFT
@pytest.mark.filterwarnings(
    "ignore:Setting boft_n_butterfly", "ignore:Invalid `oft_block_size`"
)  # sizes for 24 channels
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # FRoD
@pytest.mark.parametrize("peft_type", [str(t.value) for t in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_method_of_peft(peft_type):
    torch.manual_seed(0)
    if peft_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[peft_type]) as error:
            applied(peft_type)
        assert "\n" not in str(error.value)
        return
    model, _ = applied(peft_type)
    model.train()(**tiny.batch()).loss.backward()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert not [name for name, param in trained.items() if param.grad is None]
    heads = {name for name in trained if ".classifier." in name}
    assert len(heads) == 2
    where = OWN_TARGETS.get(peft_type, tiny.now("q_proj") + "|" + tiny.now("v_proj")).split("|")
    assert set(trained) > heads and all(any(part in name for part in where) for name in set(trained) - heads)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_ln_tuning_trains_the_norms_of_the_backbone():
    trained = sum(p.numel() for p in applied("LN_TUNING")[0].parameters() if p.requires_grad)
    assert trained == 5 * 2 * 24 + 75  # two norms in two blocks, and the final one
    with pytest.raises(ValueError, match=r"LN_TUNING trains norms, but target_modules means vit\..*\(Linear\)"):
        applied("LN_TUNING", target_modules=tiny.now(["q_proj"]))
    applied("LN_TUNING", target_modules=["layernorm_before"])
    with pytest.raises(ValueError, match="no layer norm was recognised in Sequential"):
        applied("LN_TUNING", nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


def test_a_method_of_peft_on_a_projection_that_is_never_called():
    model = FusedViT()
    model.blocks[1].attn.q_bias = nn.Parameter(torch.zeros(24))  # as timm's BEiT has it
    with pytest.raises(ValueError, match=r"attn.qkv: the attention layer reads the weight"):
        applied("LORA", model)


def test_what_peft_stumbles_over_is_one_line(monkeypatch):
    def stumble(*args):
        raise NotImplementedError

    monkeypatch.setattr("peft_heads.methods.get_peft_model", stumble)
    with pytest.raises(ValueError, match="^peft: NotImplementedError$"):
        applied("LORA")


def test_adalora_allocates_its_ranks():
    """PEFT leaves it to the training loop to call for the allocation."""
    model, (allocator,) = applied("ADALORA", total_step=4, init_r=4, target_r=1)
    assert tiny.train(model, steps=1)
    ranks = []
    for step in range(5):
        model(**tiny.batch()).loss.backward()
        allocator.on_optimizer_step(None, SimpleNamespace(global_step=step), None)
        ranks.append(sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "lora_E" in n))
    assert ranks[-1] < ranks[0]
