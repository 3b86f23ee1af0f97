"""Configuration of RLRR."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

from ..._compat.peft import add_peft_type
from ...functional.rescaling import Rescaling
from ..common.folder_config import AdapterFolderConfig
from ..common.head_selection import HeadSelectionConfig
from ..common.setting_types import check_choice
from .card import CARD


INITS = ("kaiming", "normal", "zero", "constant", "uniform")


@dataclass
class RLRRConfig(HeadSelectionConfig, AdapterFolderConfig, PeftConfig):
    """Configuration of an [`RLRRModel`]: residual low-rank rescaling of frozen weights.

    A frozen layer `W x + b` acts as `(W + (S_out S_in) ⊙ W) x + b + f`; norms and the patch embedding's output are
    scaled and shifted per channel, `y ⊙ γ + β`. Without `target_modules` every linear layer of every block of the image
    backbone is rescaled (query, key, value, attention output, both MLP layers); of a convolutional network every
    convolution and linear layer. Without `modules_to_save`, the classifier is trained and saved
    (`modules_to_save=[]` opts out).

    Which initialisation: the paper's, `"kaiming"`, does *not* begin with the pre-trained model (the factors' product
    reaches ±0.2 at a width of 768; with `S_out` alone ±2.4); its accuracies are those of this start. `"zero"` begins exactly with the
    pre-trained model, as LoRA does: choose it where the start must not disturb what the model knows (few steps, large
    models, comparisons with LoRA).

    Args:
        r (`int`):
            Rank of the factors, `S_out` (out, r) and `S_in` (r, in). The paper's method has 1.
        left (`bool`):
            Whether there is `S_out`, the left factor, which scales the rows of `W` as `torch.nn.Linear` holds it (the
            paper writes x W, the transpose). Without it the rows of `S_in` alone scale the columns.
        right (`bool`):
            Whether there is `S_in`, the right factor, which scales the columns.
        residual (`bool`):
            Whether `W` stays beside the rescaled weight; without, `W' = (S_out S_in) ⊙ W` (the paper's ablation).
        rescale_weight (`bool`):
            Whether the product multiplies `W`; without, `W' = W + S_out S_in`: LoRA of rank r with a trained bias.
        norms (`bool`):
            Whether the layer norms of the blocks and the final one are adapted (γ and β) without `target_modules`; of a
            convolutional network all layer norms. Batch norms never are.
        patch_embedding (`bool`):
            Whether the patch embedding's output gets γ and β. Where `target_modules` names the patch embedding and this
            is off, it is rescaled like any other convolution.
        init (`"kaiming"`, `"normal"`, `"zero"`, `"constant"` or `"uniform"`):
            Kaiming-uniform (fan-in) factors; normal with deviation 0.02; `S_out` zero and `S_in` Kaiming-uniform (both
            zero would have no gradient; with one factor alone that one is zero); all 0.02, or without residual 1 (rank 1
            alone); uniform in ±0.02. f is 0 always. γ ~ N(1, 0.02) and β ~ N(0, 0.02), but 1 and 0 with
            `"zero"`.
        shift_without_bias (`bool`):
            Whether layers without a bias get f as well. It becomes a bias when the adapter is merged, for which not
            every checkpoint format has a place (SwinV2's keys).
        target_modules (`str` or `list[str]`, *optional*):
            Names of the modules, or a regular expression. Linear layers and convolutions are rescaled, layer norms (and
            the patch embedding) scaled and shifted.
        exclude_modules (`str` or `list[str]`, *optional*):
            Modules to leave alone.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained in full.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Numbers of the blocks to adapt; what belongs to no block (final norm, patch embedding) is then left alone,
            unless `target_modules` names it in full.
        layers_pattern (`str` or `list[str]`, *optional*):
            Name of the stack that `layers_to_transform` counts.
        ne, ratio, granularity, joint, criterion, mask_seed, num_heads:
            Deactivation of heads on q and v, as of [`HeadMaskedLoraConfig`]: a head's parameters are its rows of
            `S_out` and entries of f. A deactivated head keeps its pre-trained weight. By default no head is.

    Raises:
        ValueError: An argument is out of its range, or two contradict each other.
    """

    r: int = field(default=1, metadata={"help": "Rank of the factors."})
    left: bool = field(default=True, metadata={"help": "Whether there is S_out, which scales rows."})
    right: bool = field(default=True, metadata={"help": "Whether there is S_in, which scales columns."})
    residual: bool = field(default=True, metadata={"help": "Whether the frozen weight stays beside the rescaled one."})
    rescale_weight: bool = field(default=True, metadata={"help": "Multiply the frozen weight, or add to it (LoRA)."})
    norms: bool = field(default=True, metadata={"help": "Scale and shift layer norms."})
    patch_embedding: bool = field(default=True, metadata={"help": "Scale and shift the patch embedding's output."})
    init: Literal["kaiming", "normal", "zero", "constant", "uniform"] = field(
        default="kaiming", metadata={"help": "Initialisation; zero begins with the pre-trained model."}
    )
    shift_without_bias: bool = field(default=True, metadata={"help": "Shift layers that have no bias as well."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt; those of all blocks if not given."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full; the classifier if not given."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the stack of blocks."})

    card = CARD

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("RLRR")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        check_choice(self, "init", INITS)
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"r is the rank of the factors, an integer of at least 1; got {self.r!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} cannot be combined with a regular expression in "
                f"target_modules ({self.target_modules!r}): let the expression say the layers, or give a list"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} goes with layers_to_transform; give both")
        self._check_variant()

    @property
    def variant(self) -> Rescaling:
        return Rescaling(self.residual, self.rescale_weight)

    @property
    def noted_settings(self) -> dict[str, bool]:
        """What stands among the weights, because it changes what they mean and shows in none of them."""
        return {"residual": self.residual, "rescale_weight": self.rescale_weight}

    def _check_variant(self) -> None:
        """Raise ValueError for combinations that mean nothing."""
        if not (self.left or self.right):
            raise ValueError("left=False with right=False: nothing is left that rescales; keep one of the two")
        if not self.residual and not self.rescale_weight:
            raise ValueError(
                "residual=False with rescale_weight=False: nothing of the pre-trained weight would be left; drop one"
            )
        one_sided = not (self.left and self.right)
        side = "left" if self.right else "right"
        if one_sided and not self.rescale_weight:
            raise ValueError(
                f"{side}=False with rescale_weight=False: LoRA's update is the product of two factors; drop one"
            )
        if one_sided and self.r > 1:
            raise ValueError(f"{side}=False with r={self.r}: one factor alone has rank 1; pass r=1, or both factors")
        if not self.residual and self.init == "zero":
            raise ValueError(
                "init='zero' with residual=False: training would begin with zero weights; choose another init "
                "('constant' with r=1 begins with the pre-trained weights), or residual=True"
            )
        if self.init == "constant" and self.r > 1:
            raise ValueError(
                f"init='constant' with r={self.r}: equal factors have equal gradients, and their product would keep rank "
                "1 for ever; choose another init ('kaiming', 'normal', 'uniform', 'zero'), or r=1"
            )
        if self.masks_heads and not self.residual:
            raise ValueError(
                "head masks cannot be combined with residual=False: a deactivated head would get its pre-trained weight "
                "back, but it is scored by what happens when its weight becomes zero; pass ne=0, or residual=True"
            )
        if self.masks_heads and not self.left:
            raise ValueError(
                "head masks cannot be combined with left=False: a head's parameters are its rows of S_out; pass ne=0, "
                "or left=True"
            )
