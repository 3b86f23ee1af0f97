import doctest
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_heads.heads.layout import HeadLayout


@pytest.mark.parametrize("module", ["layout", "maskable", "scores", "selection"])
def test_doctests(module):
    module = importlib.import_module(f"peft_heads.heads.{module}")
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0 and results.failed == 0


@given(num_heads=st.integers(1, 8), head_dim=st.integers(1, 5), width=st.integers(1, 4), data=st.data())
def test_mask_rows_and_sum_rows(num_heads, head_dim, width, data):
    layout = HeadLayout("query", num_heads, head_dim)
    rows = torch.arange(1.0, num_heads * head_dim * width + 1).view(-1, width)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_heads, max_size=num_heads)))
    masked = layout.mask_rows(rows, mask)
    for row in range(num_heads * head_dim):
        expected = rows[row] if mask[row // head_dim] else torch.zeros(width)
        assert torch.equal(masked[row], expected)
    for head in range(num_heads):
        assert layout.sum_rows(rows)[head] == rows[head * head_dim : (head + 1) * head_dim].sum()


def test_mask_rows_clears_what_is_not_finite():
    layout = HeadLayout("query", 2, 1)
    rows = torch.tensor([float("nan"), 1.0])
    assert layout.mask_rows(rows, torch.tensor([False, True])).tolist() == [0.0, 1.0]
