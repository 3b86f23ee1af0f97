import numpy as np
import pytest
import torch

from peft_heads.scoring.plotting import figure_bytes, plot_head_scores


SCORES = {
    "vit.layers.0.attention.q_proj": torch.tensor([1.0, 2.0, 3.0]),
    "vit.layers.0.attention.v_proj": torch.tensor([1.0, 1.0, 1.0]),
    "vit.layers.1.attention.q_proj": torch.tensor([5.0, 6.0]),
}
MASKS = {name: torch.ones(len(score), dtype=torch.bool) for name, score in SCORES.items()}
MASKS["vit.layers.0.attention.v_proj"][2] = False


@pytest.mark.parametrize(
    ("joint", "grid", "cross"),
    [
        (True, [[2, 3, 4], [5, 6, np.nan]], [(2, 0)]),
        (False, [[1, 2, 3], [1, 1, 1], [5, 6, np.nan]], [(2, 1)]),
    ],
)
def test_layers_by_heads(joint, grid, cross):
    axes = plot_head_scores(SCORES, MASKS, joint=joint, title="A title").axes[0]
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), grid)
    assert axes.collections[0].get_offsets().tolist() == [list(map(float, c)) for c in cross]
    assert axes.get_title(loc="left") == "A title"
    assert axes.get_yticklabels()[0].get_text().startswith("layers.0")


def test_without_masks_and_without_pyplot():
    import sys

    figure = plot_head_scores(SCORES)
    assert not figure.axes[0].collections
    assert figure_bytes(figure).startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules
