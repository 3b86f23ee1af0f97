"""Which output rows of a projection belong to which attention head."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one query, key or value projection.

    The `num_heads * head_dim` output rows of the projection are `num_heads` consecutive blocks of `head_dim` rows;
    block `i` is head `i`, as in every attention layer of transformers.

    Example:
        >>> layout = HeadLayout(role="query", num_heads=3, head_dim=4)
        >>> layout.out_features
        12
        >>> layout.expand(torch.tensor([True, False, True])).int().tolist()
        [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    """

    role: str
    num_heads: int
    head_dim: int

    @property
    def out_features(self) -> int:
        return self.num_heads * self.head_dim

    def expand(self, per_head: torch.Tensor) -> torch.Tensor:
        """One value per head, shape (num_heads,), to one per output row, shape (out_features,)."""
        return per_head.repeat_interleave(self.head_dim)

    def mask_rows(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Replace the rows of deactivated heads by zero.

        `torch.where` rather than a product: a row that has become inf or nan is zero as well, and the gradient of a
        replaced row is exactly zero. An active row comes back unchanged, bit for bit.

        Args:
            rows: (out_features, ...), e.g. the weight or the bias of `lora_B`.
            mask: bool (num_heads,), True = active.
        """
        heads = rows.reshape(self.num_heads, self.head_dim, -1)  # (H, d, …)
        return torch.where(mask.view(-1, 1, 1), heads, 0).view(rows.shape)

    def sum_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum over each head's rows: (out_features, ...) to (num_heads,)."""
        return rows.reshape(self.num_heads, -1).sum(dim=1)
