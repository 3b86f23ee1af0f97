import os


# set before any Hugging Face library is imported: no test may use the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch


# the models are tiny: a second thread costs more than it gives
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["vit", "swin"])
def backbone(request):
    """Name of a backbone; `tiny.make(name)` builds it."""
    return request.param


@pytest.fixture
def forget_criteria():
    """Remove the criteria that a test registers, after the test."""
    from peft_heads.heads.criterion_registry import _TABLE

    before = dict(_TABLE)
    yield
    _TABLE.clear()
    _TABLE.update(before)
