import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_heads.heads.layout import HeadLayout, ProjectionLayout


@given(
    num_heads=st.integers(1, 6),
    head_dim=st.integers(1, 4),
    width=st.integers(1, 3),
    roles=st.sampled_from(["plain", "qkv", "qv", "k", "v"]),
    data=st.data(),
)
def test_rows_of_heads(num_heads, head_dim, width, roles, data):
    """Compared with loops over rows: a separate projection, and the parts of a fused one."""
    size = num_heads * head_dim
    if roles == "plain":
        layout = ProjectionLayout(size, (HeadLayout("query", num_heads, head_dim),))
        parts = [0]
    else:
        parts = ["qkv".index(initial) for initial in roles]
        whole = (HeadLayout(role, num_heads, head_dim, i * size) for i, role in enumerate(("query", "key", "value")))
        layout = ProjectionLayout(3 * size, tuple(whole)).restricted_to(roles)
    mask = data.draw(st.lists(st.booleans(), min_size=len(parts) * num_heads, max_size=len(parts) * num_heads))
    rows = torch.arange(1.0, layout.out_features * width + 1).view(-1, width)

    masked = layout.mask_rows(rows, torch.tensor(mask))
    off = layout.deactivated_rows(torch.tensor(mask))
    for row in range(layout.out_features):
        part, row_in_part = divmod(row, size)
        active = None  # not adapted
        if part in parts:
            active = mask[parts.index(part) * num_heads + row_in_part // head_dim]
        assert torch.equal(masked[row], rows[row] if active else torch.zeros(width))
        assert off[row] == (active is False)
        bias = layout.mask_rows(rows[:, 0], torch.tensor(mask))
        assert bias[row] == masked[row, 0]

    assert layout.num_heads == len(mask)
    assert layout.is_fused == (roles != "plain")
    assert layout.covers_all_rows == (roles in ("plain", "qkv"))
    assert list(layout.named_parts("a.b")) == (["a.b"] if roles == "plain" else [f"a.b.{i}" for i in roles])
    for i, (part, part_mask) in enumerate(zip(layout.parts, layout.split(torch.tensor(mask)), strict=True)):
        assert part_mask.tolist() == mask[i * num_heads : (i + 1) * num_heads]
        start = parts[i] * size
        assert torch.equal(part.rows(rows), rows[start : start + size])
        for head in range(num_heads):
            head_rows = rows[start + head * head_dim : start + (head + 1) * head_dim]
            assert part.sum_rows(part.rows(rows))[head] == head_rows.sum()


def test_mask_rows_clears_what_is_not_finite():
    layout = ProjectionLayout(2, (HeadLayout("query", 2, 1),))
    rows = torch.tensor([float("nan"), 1.0])
    assert layout.mask_rows(rows, torch.tensor([False, True])).tolist() == [0.0, 1.0]
