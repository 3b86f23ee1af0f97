"""Configuration of head-masked LoRA."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Literal

from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from ..._compat.peft import add_peft_type
from ...functional.quantization import BITS
from ..common.folder_config import AdapterFolderConfig, check_file, source_of
from ..common.head_selection import HeadSelectionConfig
from ..common.pruning_settings import PruningConfig
from .card import CARD


FUSED_PARTS = ("qkv", "qk", "qv", "kv", "q", "k", "v")
# Options of LoRA that a head mask would make wrong, with the reason. An initialisation that moves part of the base
# weight into the adapter would lose that part of the *pre-trained* weight with the head.
_CHANGES_BASE_WEIGHT = "it moves part of the pre-trained weight into the adapter, which a deactivated head would lose"
_ADDS_IN_PLACE = "it adds to the layer's output in place, so that a deactivated head cannot be taken out again"
_TRAINS_BASE_BIAS = "it trains the frozen projection's bias, also of deactivated heads"
_WRONG_FOR_FROZEN_ROWS = (_CHANGES_BASE_WEIGHT, _ADDS_IN_PLACE)
_INCOMPATIBLE_INITS = {
    "pissa": _CHANGES_BASE_WEIGHT,
    "olora": _CHANGES_BASE_WEIGHT,
    "corda": _CHANGES_BASE_WEIGHT,
    "lora_ga": _CHANGES_BASE_WEIGHT,
    "loftq": _CHANGES_BASE_WEIGHT,
    "mica": "it freezes lora_B, whose gradient scores the heads",
}
_INCOMPATIBLE_FIELDS = {
    "kasa_config": _CHANGES_BASE_WEIGHT,
    "use_bdlora": _ADDS_IN_PLACE,
    "alora_invocation_tokens": _ADDS_IN_PLACE,
    "layer_replication": "the copies of a layer would carry no masks",
    "arrow_config": "it routes between several adapters, each with heads of its own",
}
# Options of LoRA that apply lora_A and lora_B by code of their own: it would read the full-precision weights, and know
# of no dropout between the two.
_APPLY_FACTORS = (
    "use_dora",
    "kasa_config",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "use_qalora",
    "target_parameters",
)
FULL_PRECISION = 32


@dataclass(kw_only=True)
class HeadMaskedLoraConfig(PruningConfig, HeadSelectionConfig, AdapterFolderConfig, LoraConfig):
    """Configuration of a [`HeadMaskedLoraModel`]: LoRA whose update is switched off, head by head.

    Says *what* is deactivated and is saved with the adapter; *when* is said by [`TaylorHeadScorer`]. Everything that
    [`LoraConfig`] takes is taken as well. Without `target_modules`, the query and value projections of every
    attention layer are adapted; without `modules_to_save`, the classifier is trained and saved
    (`modules_to_save=[]` opts out).

    Methods: HEAT and Heart-LoRA.

    Args:
        ne (`int`, *optional*):
            Heads to deactivate in each group of heads; 0 is plain LoRA. 1 unless `ratio` or `target_speed` is given.
        ratio (`float`, *optional*):
            Share of a group's heads to deactivate instead of `ne`, for models whose stages differ in heads:
            `floor(ratio * num_heads)`.
        granularity (`"global"` or `"layer"`):
            Whether scores are summed over all layers with the same number of heads, which then share the deactivated
            heads (Heart-LoRA), or each layer chooses its own (Heart-LoRA†).
        joint (`bool`):
            Whether the q and v of a layer share one mask, chosen by the sum of their scores.
        criterion (`str`):
            Responsiveness of a head: `"absolute"`, `"positive"`, `"negative"` (first-order Taylor scores),
            `"weight_norm"`, `"grad_norm"`, or the baselines `"random"`, `"front"` and `"most_responsive"` (the reverse
            of `"absolute"`). The lowest are deactivated.
        mask_scope (`"adapter"` or `"head"`):
            What is zero for a deactivated head: the adapter's delta, or the projection's whole output, bias included.
            Defaults to `"head"` if neurons are pruned, else to `"adapter"`.
        neuron_ratio (`float`, *optional*):
            Share of each MLP's neurons to switch off, so that they can be removed (`export --to pruned`). Without
            `target_modules`, all linear layers of the blocks are adapted then; heads are masked on q and v alone.
        neuron_criterion (`str`):
            Score of a neuron; the neurons with the lowest are switched off. See [`PruningConfig`].
        target_speed (`float`, *optional*):
            At least so many times fewer operations, instead of `ne`, `ratio` and `neuron_ratio`.
        mask_seed (`int`):
            Seed of the criterion `"random"`.
        num_heads (`int` or `dict[str, int]`, *optional*):
            Number of heads where the model does not say it, or says it wrongly: one number, or one per module name
            pattern (read like `rank_pattern`).
        fused_parts (`str`):
            Which parts of a fused `qkv` projection are adapted (and scored and masked), by their initials. The others
            never change. `"qkv"` adapts the whole, as stock LoRA does.
        adapter_bits (`int`):
            1, 2, 4 or 8: `lora_A` and `lora_B` act by their quantised values, of that many bits per entry, and are
            trained through the quantiser (Bi-LoRA); 32 is LoRA as it is. The mean and the deviation are those of the
            rows that the adapter has, without deactivated heads. What is saved, and what optimizers see, are the
            full-precision weights, so that training can go on; `lora_bias` stays in full precision. `lora_A` is
            initialised as by LoRA (`True` or `"gaussian"`), `lora_B` by a normal with deviation 0.001 cut off at
            ±0.002, since zeros have no deviation. Passes without gradients see every change of the weights. Passes
            with gradients see one that was written through `.data` from the next optimizer step, or change of mode
            (`model.train()`, `model.eval()`), on; before that call `model.forget_codes(adapter_name)`.
        classifier_bits (`int`):
            The same for the weight of the trained classifier; its bias stays in full precision.
        bottleneck_dropout (`float`):
            Dropout between `lora_A` and `lora_B`, on the r values of a token, as in Bi-LoRA and HEAT (0.1 there), with
            any `adapter_bits`. PEFT's `lora_dropout` drops the input of `lora_A`; both may be given.
        packed (`bool`):
            Whether the adapter is what its packed file says, codes, mean and deviation, and is saved so; set by
            [`pack_adapter`] and by loading, never by hand. Ends with the first step of training, which goes on from
            full-precision weights with the same codes.

    Raises:
        ValueError: An argument is out of its range, or an option of LoRA is asked for that head masks would make
            wrong.
    """

    fused_parts: str = field(
        default="qv", metadata={"help": "The parts of a fused qkv projection to adapt, by their initials."}
    )
    adapter_bits: Literal[1, 2, 4, 8, 32] = field(
        default=FULL_PRECISION,
        metadata={"help": "Bits per weight of lora_A and lora_B: 1, 2, 4, 8, or 32, not quantised."},
    )
    classifier_bits: Literal[1, 2, 4, 8, 32] = field(
        default=FULL_PRECISION,
        metadata={"help": "Bits per weight of the classifier: 1, 2, 4, 8, or 32, not quantised."},
    )
    bottleneck_dropout: float = field(
        default=0.0, metadata={"help": "Dropout between lora_A and lora_B; lora_dropout is the one before lora_A."}
    )
    packed: bool = field(default=False, metadata={"help": "Set by pack_adapter: codes are saved, a byte for eight."})

    card = CARD
    default_ne = 1

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("HEAD_MASKED_LORA")
        if not isinstance(self.fused_parts, str) or self.fused_parts not in FUSED_PARTS:
            raise ValueError(f"fused_parts must be one of {', '.join(FUSED_PARTS)}; got {self.fused_parts!r}")
        for name in ("adapter_bits", "classifier_bits"):
            if type(getattr(self, name)) is not int or getattr(self, name) not in (*BITS, FULL_PRECISION):
                allowed = ", ".join(map(str, (*BITS, FULL_PRECISION)))
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")
        dropout = self.bottleneck_dropout
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"bottleneck_dropout must be in [0, 1); got {dropout!r}")
        self.check_compatible()

    @property
    def quantizes(self) -> bool:
        """Whether the adapter acts by quantised weights."""
        return self.adapter_bits != FULL_PRECISION

    @property
    def has_few_bits(self) -> bool:
        """Whether anything of the adapter is quantised: its factors, or the classifier."""
        return self.quantizes or self.classifier_bits != FULL_PRECISION

    @property
    def noted_settings(self) -> dict[str, bool]:
        """What stands among the weights, because it changes what they mean and shows in none of them.

        Packed codes say themselves how many bits they have. Of an adapter that is packed, where bytes count, the scope
        "adapter" is what no note says.
        """
        scope = {"mask_scope=head": self.mask_scope == "head"}
        if self.packed:
            return scope
        return {
            **scope,
            **{f"adapter_bits={bits}": self.adapter_bits == bits for bits in BITS},
            **{f"classifier_bits={bits}": self.classifier_bits == bits for bits in BITS},
        }

    @property
    def changes_lora(self) -> bool:
        """Whether every layer of the adapter, with heads or without, does something else than stock LoRA."""
        return self.quantizes or self.bottleneck_dropout > 0

    @property
    def changes_base_weight(self) -> str | None:
        """The option by which a part of the pre-trained weight is in the adapter instead of in the model, if any."""
        init = self.init_lora_weights
        for name, reason in _INCOMPATIBLE_INITS.items():
            if reason == _CHANGES_BASE_WEIGHT and isinstance(init, str) and init.lower().startswith(name):
                return f"init_lora_weights={init!r}"
        return "kasa_config" if self.kasa_config else None

    @property
    def init_weights(self):
        """The name under which PEFT's method-independent code looks for `init_lora_weights`."""
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value):
        self.init_lora_weights = value

    @classmethod
    def from_lora(cls, model_id: str | os.PathLike, **kwargs) -> HeadMaskedLoraConfig:
        """The configuration of a stock LoRA adapter, as one of ours with `ne=0`.

        `PeftModel.from_pretrained(model, path, config=HeadMaskedLoraConfig.from_lora(path))` loads a stock adapter
        so that it can stand beside head-masked ones (PEFT refuses adapters of different types on one model).

        Args:
            model_id: Folder or Hub repository of the adapter.
            kwargs: Passed to `PeftConfig.from_pretrained` (`revision`, `token`, `subfolder`, …).

        Raises:
            ValueError: The adapter is not a stock LoRA adapter.
        """
        check_file(model_id, kwargs.get("subfolder"), LoraConfig)
        lora = PeftConfig.from_pretrained(os.fspath(model_id), **kwargs)
        if lora.peft_type != PeftType.LORA:
            raise ValueError(f"{model_id} holds an adapter of type {lora.peft_type.value}, not a LORA adapter")
        names = {f.name for f in fields(LoraConfig)} - {"peft_type"}
        # None would be read as "find the classifier", which a stock adapter then does not hold
        lora.modules_to_save = lora.modules_to_save or []
        config = cls(ne=0, fused_parts="qkv", **{name: getattr(lora, name) for name in names})
        config.carried.is_stock = True
        config.carried.source = source_of(cls, model_id, kwargs.pop("subfolder", None), kwargs)
        return config

    def check_compatible(self, freezes_rows: bool = False) -> None:
        """Raise ValueError if an option of LoRA is set that the adapter would make wrong.

        Args:
            freezes_rows: Whether the adapter leaves parts of a fused projection alone, which it can without masks.
        """
        self._check_factors()
        init = self.init_lora_weights
        problems = [
            (f"init_lora_weights={init!r}", reason)
            for name, reason in _INCOMPATIBLE_INITS.items()
            if isinstance(init, str) and init.lower().startswith(name)
        ]
        problems += [(name, why) for name, why in _INCOMPATIBLE_FIELDS.items() if getattr(self, name, None)]
        if self.bias != "none":
            problems.append((f"bias={self.bias!r}", _TRAINS_BASE_BIAS))
        if self.prunes_neurons:
            combined, way_out = "neuron masks", "leave neuron_ratio and target_speed out"
        elif self.masks_heads:
            combined, way_out = "head masks", "pass ne=0"
        elif freezes_rows:
            combined = f"fused_parts={self.fused_parts!r} on a fused projection"
            way_out = 'pass fused_parts="qkv" (with ne=0)'
            problems = [(name, reason) for name, reason in problems if reason in _WRONG_FOR_FROZEN_ROWS]
        else:
            return
        for option, reason in problems:
            raise ValueError(f"{option} cannot be combined with {combined}: {reason}; drop it, or {way_out}")

    def _check_factors(self) -> None:
        """Raise ValueError if an option is set that passes by quantised weights and the dropout between them."""
        if not self.changes_lora:
            return
        ours = "adapter_bits" if self.quantizes else "bottleneck_dropout"
        init = self.init_lora_weights
        for name in _APPLY_FACTORS:
            if getattr(self, name, None):
                raise ValueError(
                    f"{name} cannot be combined with {ours}={getattr(self, ours)}: it applies lora_A and lora_B by "
                    f"code of its own, which {ours} does not reach; drop one of the two"
                )
        if self.quantizes and isinstance(init, str) and init.lower() != "gaussian":
            raise ValueError(
                f"init_lora_weights={init!r} cannot be combined with adapter_bits={self.adapter_bits}: what it "
                "computes would not outlive the rounding, or its zeros in lora_B have no deviation to quantise by; "
                "use True, 'gaussian' or False, or adapter_bits=32"
            )
