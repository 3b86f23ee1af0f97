"""Which output rows of a projection belong to which attention head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..functional.rows import without_rows


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one query, key or value.

    Its `num_heads * head_dim` output rows are consecutive blocks of `head_dim` rows; block `i` is head `i`
    (`interleaved_projections` finds the exceptions). The rows are a projection of their own or a part of a fused `qkv`.

    Attributes:
        role: `"query"`, `"key"`, `"value"`, or `"projection"` where only `num_heads=` says that there are heads;
            `"neuron"` for the first layer of an MLP, each row of which is a unit of its own.
        num_heads: Number of heads.
        head_dim: Rows per head.
        first_row: Index of the first of the rows in the layer's output.
    """

    role: str
    num_heads: int
    head_dim: int
    first_row: int = 0

    @property
    def unit(self) -> str:
        """What one entry of a mask stands for, in messages."""
        return "neuron" if self.role == "neuron" else "head"

    @property
    def num_rows(self) -> int:
        return self.num_heads * self.head_dim

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of these heads: (out_features, ...) of the whole layer to (num_rows, ...)."""
        return tensor[self.first_row : self.first_row + self.num_rows]

    def expand(self, per_head: torch.Tensor) -> torch.Tensor:
        """One value per head, shape (num_heads,), to one per row, shape (num_rows,).

        Example:
            >>> layout = HeadLayout(role="query", num_heads=3, head_dim=4)
            >>> layout.expand(torch.tensor([True, False, True])).int().tolist()
            [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
        """
        return per_head.repeat_interleave(self.head_dim)

    def sum_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Sum over each head's rows: (num_rows, ...) to (num_heads,)."""
        return rows.reshape(self.num_heads, -1).sum(dim=1)


@dataclass(frozen=True)
class ProjectionLayout:
    """The heads of one linear layer that an adapter may change: all of its rows, or parts of a fused `qkv`.

    A mask of the layer is a bool tensor (num_heads,), the heads of all parts one after the other, True = active. Rows
    outside the parts (the keys of a fused projection of which q and v are adapted) never change.

    Example, a fused projection with 2 heads of one row each, of which q and v are adapted:
        >>> parts = (HeadLayout("query", 2, 1), HeadLayout("value", 2, 1, first_row=4))
        >>> layout = ProjectionLayout(out_features=6, parts=parts)
        >>> layout.active_rows(torch.tensor([True, False, True, True])).int().tolist()
        [1, 0, 0, 0, 1, 1]
        >>> list(layout.named_parts("blocks.0.attn.qkv"))
        ['blocks.0.attn.qkv.q', 'blocks.0.attn.qkv.v']
    """

    out_features: int
    parts: tuple[HeadLayout, ...]

    @property
    def num_heads(self) -> int:
        """Heads of all parts together."""
        return sum(part.num_heads for part in self.parts)

    @property
    def has_neurons(self) -> bool:
        """Whether these are the neurons of an MLP instead of heads."""
        return any(part.unit == "neuron" for part in self.parts)

    @property
    def is_fused(self) -> bool:
        return len(self.parts) != 1 or self.parts[0].num_rows != self.out_features

    @property
    def covers_all_rows(self) -> bool:
        return sum(part.num_rows for part in self.parts) == self.out_features

    def restricted_to(self, roles: str) -> ProjectionLayout:
        """Only the parts of a fused projection whose initials are in `roles`, e.g. `"qv"`; others come back as are."""
        if not self.is_fused:
            return self
        return ProjectionLayout(self.out_features, tuple(part for part in self.parts if part.role[0] in roles))

    def named_parts(self, name: str) -> dict[str, HeadLayout]:
        """`{name: part}` of a projection, `{name.q: part, name.v: part}` of a fused one called `name`."""
        if not self.is_fused:
            return {name: self.parts[0]}
        return {f"{name}.{part.role[0]}": part for part in self.parts}

    def split(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """A mask of the layer, (num_heads,), as one mask per part."""
        return list(mask.split([part.num_heads for part in self.parts]))

    def active_rows(self, mask: torch.Tensor) -> torch.Tensor:
        """bool (out_features,), True where the adapter may change the row: it belongs to an active head."""
        return self.rows_of(mask)

    def deactivated_rows(self, mask: torch.Tensor) -> torch.Tensor:
        """bool (out_features,), True where the row belongs to a deactivated head."""
        return self.rows_of(~mask)

    def mask_rows(self, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Replace the rows that the adapter must not change by zero.

        Args:
            rows: (out_features, ...), e.g. the weight or the bias of `lora_B`.
            mask: bool (num_heads,), True = active.
        """
        return without_rows(rows, ~self.active_rows(mask))

    def rows_of(self, heads: torch.Tensor, outside: bool = False) -> torch.Tensor:
        """Whether each row belongs to one of the chosen heads.

        Args:
            heads: bool (num_heads,), True for the chosen heads.
            outside: Value for the rows outside the parts.

        Returns:
            bool (out_features,).
        """
        if not self.is_fused:
            return self.parts[0].expand(heads)
        pieces, row = [], 0
        for part, chosen in zip(self.parts, self.split(heads), strict=True):
            pieces += [heads.new_full((part.first_row - row,), outside), part.expand(chosen)]
            row = part.first_row + part.num_rows
        return torch.cat([*pieces, heads.new_full((self.out_features - row,), outside)])
