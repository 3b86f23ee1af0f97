"""The settings that say which attention heads an adapter deactivates, alike in every method that has heads."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ..._compat.peft import is_reading_config
from ...heads.criterion_registry import CRITERIA
from ...heads.selection import GRANULARITIES, check_head_count
from .setting_types import check_choice


class UnknownCriterion(str):
    """The criterion of a saved configuration that nobody has registered here.

    The masks of the adapter are decided, so it loads, and its configuration may be copied; only a selection needs more.
    """


@dataclass(kw_only=True)
class HeadSelectionConfig:
    """Mixed into the configuration of a method whose heads can be deactivated, before [`AdapterFolderConfig`].

    Its fields are given by name alone, so that they move none of the fields of the method.

    Args:
        ne: Number of heads to deactivate in each group of heads. Defaults to `default_ne` unless `ratio` is given.
        ratio: Share of a group's heads to deactivate instead of `ne`, for models whose stages differ in heads:
            `floor(ratio * num_heads)`.
        granularity: Whether scores are summed over all layers with the same number of heads, which then share the
            deactivated heads, or each layer chooses its own.
        joint: Whether the q and v of a layer share one mask, chosen by the sum of their scores.
        criterion: Name of the score of a head. The heads with the lowest scores are deactivated.
        mask_seed: Seed of the criterion `"random"`.
        num_heads: Number of heads where the model does not say it, or says it wrongly: one number, or one per module
            name pattern (read like `rank_pattern`).

    Attributes:
        default_ne: The method's `ne` where neither `ne` nor `ratio` is given.
        mask_scope: What a deactivated head loses: its part of the adapter (`"adapter"`), or all of its output
            (`"head"`). A method that offers both has a field of this name.
        target_speed: How many times fewer operations a pruned model is to need, in place of `ne` and `ratio`. A method
            that prunes has a field of this name.

    Raises:
        ValueError: A setting is out of its range.
    """

    ne: int | None = field(default=None, metadata={"help": "Heads to deactivate in each group; 0 deactivates none."})
    ratio: float | None = field(default=None, metadata={"help": "Share of heads to deactivate, instead of `ne`."})
    granularity: Literal["global", "layer"] = field(
        default="global", metadata={"help": "Deactivate the same heads in all layers, or choose in each layer."}
    )
    joint: bool = field(default=True, metadata={"help": "Whether q and v of a layer share one mask."})
    criterion: str = field(
        default="absolute",
        metadata={"help": "Score of a head; the heads with the lowest are deactivated.", "choices": CRITERIA},
    )
    mask_seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the criterion 'random'; the benchmark mixes it with task and seed.",
            "on_card": False,
        },
    )
    num_heads: int | dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Number of heads, or one per module name pattern, where detection fails.",
            "on_card": False,
        },
    )

    default_ne: ClassVar[int] = 0
    mask_scope = "adapter"  # no annotation: it is a field of the methods that offer a choice
    target_speed = None  # as well: of the methods that prune

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ne is None and self.ratio is None and self.target_speed is None:
            self.ne = self.default_ne
        self.check_heads()

    @property
    def masks_heads(self) -> bool:
        """Whether heads are going to be deactivated: False for `ne=0` and `ratio=0`."""
        return bool(self.ne or self.ratio or self.target_speed)

    @property
    def selection_settings(self) -> dict[str, Any]:
        """What decides which heads are deactivated, and what that means, as a report of their scores notes it."""
        settings = {name: getattr(self, name) for name in HEAD_SELECTION if name != "num_heads"}  # a fact of the model
        return {**settings, "mask_scope": self.mask_scope}

    def check_heads(self) -> None:
        """Raise ValueError unless what says which heads are deactivated is in its range."""
        if self.target_speed is None:  # which chooses the number of heads
            check_head_count(self.ne, self.ratio)
        check_choice(self, "granularity", GRANULARITIES)
        self._check_criterion()
        numbers = self.num_heads.values() if isinstance(self.num_heads, dict) else [self.num_heads]
        if self.num_heads is not None and not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(
                f"num_heads must be a positive integer, or one per module pattern; got {self.num_heads!r}"
            )

    def _check_criterion(self) -> None:
        """Raise ValueError for an unknown criterion; that of a saved configuration is a warning."""
        if is_reading_config() and type(self.criterion) is str and self.criterion not in CRITERIA:
            warnings.warn(
                f"the saved configuration has the criterion {self.criterion!r}, which is not registered here. The adapter "
                "loads, with the masks that were saved; before heads are selected by that criterion, import the plugin "
                "that registers it (on the command line: --plugin MODULE)"
            )
            self.criterion = UnknownCriterion(self.criterion)
        if not isinstance(self.criterion, UnknownCriterion):
            check_choice(self, "criterion", tuple(CRITERIA))


# Names of the settings, and of those that a model card lists.
HEAD_SELECTION = tuple(f.name for f in fields(HeadSelectionConfig))
ON_CARD = tuple(f.name for f in fields(HeadSelectionConfig) if f.metadata.get("on_card", True))
