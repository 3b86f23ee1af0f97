"""Weights cut out of those of the whole model."""

import pytest
import torch

from peft_heads.convert.slices import slice_heads, slice_neurons


def test_slicing_knows_rows_from_heads():
    kept = {"blocks.0.attn": torch.tensor([True, False, True]), "blocks.1.attn": torch.tensor([False, True, True])}
    weights = {
        "blocks.0.attn.v.weight": torch.arange(12).view(6, 2),
        "blocks.0.output.weight": torch.arange(12).view(2, 6),
        "blocks.1.bias_table": torch.arange(6).view(2, 3),
        "norm": torch.arange(6),
    }
    shapes = [(4, 2), (2, 4), (2, 2), (6,)]
    smaller = {key: torch.empty(shape) for key, shape in zip(weights, shapes, strict=True)}
    sliced = slice_heads(weights, smaller, kept, head_dim=2)
    assert sliced["blocks.0.attn.v.weight"].tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert sliced["blocks.0.output.weight"].tolist() == [[0, 1, 4, 5], [6, 7, 10, 11]]
    assert sliced["blocks.1.bias_table"].tolist() == [[1, 2], [4, 5]]
    assert sliced["norm"].tolist() == list(range(6))
    with pytest.raises(ValueError, match="bias_table is shared by layers that keep different heads"):
        slice_heads({"bias_table": torch.zeros(2, 3)}, {"bias_table": torch.zeros(2, 2)}, kept, 2)
    with pytest.raises(ValueError, match=r"blocks.0.mlp is \(5,\), and \(4,\) with fewer heads"):
        slice_heads({"blocks.0.mlp": torch.zeros(5)}, {"blocks.0.mlp": torch.zeros(4)}, kept, 2)


def test_neurons_are_rows_of_the_first_layer_and_columns_of_the_second():
    weights = {
        "a.up.weight": torch.arange(6).view(3, 2),
        "a.up.bias": torch.arange(3),
        "a.down.weight": torch.arange(6).view(2, 3),
        "a.down.bias": torch.arange(2),
        "b.up.weight": torch.arange(6).view(3, 2),  # without a bias
        "b.down.weight": torch.arange(6).view(2, 3),
    }
    kept = {
        ("a.up", "a.down"): torch.tensor([True, False, True]),
        ("b.up", "b.down"): torch.tensor([False, True, True]),
    }
    sliced = {key: weight.tolist() for key, weight in slice_neurons(weights, kept).items()}
    assert sliced == {
        "a.up.weight": [[0, 1], [4, 5]],
        "a.up.bias": [0, 2],
        "a.down.weight": [[0, 2], [3, 5]],
        "a.down.bias": [0, 1],
        "b.up.weight": [[2, 3], [4, 5]],
        "b.down.weight": [[1, 2], [4, 5]],
    }
