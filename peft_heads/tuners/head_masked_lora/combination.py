"""Sums of head-masked adapters: what PEFT's own arithmetic leaves out, and when there is no sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...heads.traversal import own_modules
from ..common.copies import check_same_heads, classifiers_of_sum, is_copy
from .config import FULL_PRECISION, HeadMaskedLoraConfig
from .layer import HeadMaskedLinear
from .masked_forward import HeadMaskVariant


# Types of combination that are linear in the update or in its factors. The others drop single entries of these.
LINEAR = ("linear", "cat", "svd")
_NEEDS_EQUAL_RANKS = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")


class HeadMaskedSums:
    """The sums of adapters, mixed into the tuner."""

    # an initialisation could change the base weight a second time
    while_copied: ClassVar[dict[str, Any]] = {"init_lora_weights": False}

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **options: Any,
    ) -> None:
        """Combine adapters linearly, as [`peft.LoraModel.add_weighted_adapter`] does, which see for the other arguments.

        One adapter with weight 1 gives an exact copy: rank, scaling, masks, biases, DoRA's magnitudes, the modules that
        it trains in full, and their labels. This is where head-masked LoRA deviates from stock LoRA, also with `ne=0`:
        stock LoRA gives another adapter with rsLoRA, `lora_bias`, DoRA or `rank_pattern`, and the base model's
        classifier.

        The update of a sum of several, biases included, is the sum of the updates: exactly with `"cat"`, and with
        `"svd"` if `svd_rank` suffices; `"linear"` adds the factors, `(Σ √(w s) B)(Σ √(w s) A)`, which is less exact by
        nature. A head is active in the sum where it is in any of the summands. A module that one of them has trained in
        full, such as the classifier, is copied.

        Args:
            adapters: Names of the summands.
            weights: One number for each.
            adapter_name: Name of the sum; nothing is done if it exists. It is not trained until it is set active.
            combination_type: As PEFT has it.
            svd_rank: As PEFT has it; a copy has its adapter's rank.
            options: As PEFT has them.

        Raises:
            ValueError: The adapters cannot be combined. Nothing has changed then.
        """
        options |= {"combination_type": combination_type, "svd_rank": svd_rank}
        self.combine(adapters, weights, adapter_name, **options)

    def check_combination(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        combination_type: str,
        svd_rank: int | None,
        **options: Any,
    ) -> None:
        if is_copy(adapters, weights):
            check_copy(self.peft_config, adapters[0])
        else:
            check_sum(self, self.peft_config, adapters, combination_type)
        _, rank, _ = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        if len(adapters) > 1:
            check_ranks(self, adapters, combination_type, rank)

    def create_sum(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, **options: Any) -> None:
        clear_deactivated(self.model, adapters)
        configs = {name: self.peft_config[name] for name in adapters}
        try:
            for name in configs:
                self.peft_config[name] = summand_config(self.model, configs, adapters, name)
            super().add_weighted_adapter(adapters, weights, adapter_name, **options)
        finally:
            self.peft_config.update(configs)
        complete_sum(self.model, adapters, weights, adapter_name)


def check_copy(configs: dict[str, HeadMaskedLoraConfig], adapter: str) -> None:
    """Raise ValueError if an adapter cannot stand on its model a second time, or be summed."""
    _check_bits(configs, [adapter])
    if configs[adapter].kasa_config:
        raise ValueError(
            f"adapter {adapter!r} cannot be copied: with kasa_config each new adapter takes a part out of the "
            "pre-trained weight; save the adapter and load it into a model of its own"
        )


def check_sum(
    model: nn.Module, configs: dict[str, HeadMaskedLoraConfig], adapters: Sequence[str], combination_type: str
) -> None:
    """Raise ValueError unless the sum of several adapters, or a multiple of one, is an adapter.

    Args:
        model: The model with the adapters in it.
        configs: Their configurations.
        adapters: The summands.
        combination_type: As of `add_weighted_adapter`.
    """
    pruning = next((name for name in adapters if configs[name].prunes_neurons), None)
    if pruning is not None:
        raise ValueError(
            f"adapter {pruning!r} prunes neurons and cannot be combined: its update is not a sum of deltas; merge the "
            "adapters (merge_and_unload), or use them one at a time (set_adapter)"
        )
    if "head" in {configs[name].mask_scope for name in adapters}:
        raise ValueError("adapters with mask_scope='head' cannot be combined: their update is not a sum of deltas")
    _check_bits(configs, adapters)
    for name in adapters:
        if configs[name].changes_base_weight:
            raise ValueError(
                f"adapter {name!r} cannot be combined: {configs[name].changes_base_weight} has moved a part of the "
                "pre-trained weight into it, so that it is no change of that weight. Make plain LoRA of it first "
                "(save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if configs[name].use_dora:
            raise ValueError(
                f"adapter {name!r} has use_dora=True: DoRA normalises the sum of the frozen weight and the update, so "
                "that a multiple of the update, or a sum of several, is no DoRA adapter. One adapter with weight 1 can "
                "be copied; else merge the adapters (merge_and_unload), or use them one at a time (set_adapter)"
            )
        if configs[name].lora_bias and len(adapters) > 1 and combination_type not in LINEAR:
            raise ValueError(
                f"adapter {name!r} has lora_bias=True, for which combination_type={combination_type!r} is not defined: "
                f"it drops entries of lora_A and lora_B; use one of {', '.join(LINEAR)}"
            )
    bits = {name: configs[name].classifier_bits for name in adapters if configs[name].modules_to_save}
    if len(set(bits.values())) > 1:
        raise ValueError(
            f"adapters with different classifier_bits cannot be combined: {bits}; pass modules_to_save=[]"
        )
    for module_name, layer in _lora_layers(model):
        here = [name for name in adapters if name in layer.r]
        for name in here:
            variant = layer.lora_variant.get(name)
            inner = variant.inner if isinstance(variant, HeadMaskVariant) else variant
            if inner is not None and not inner.supports_lora_conversion():
                raise ValueError(
                    f"adapter {name!r} cannot be combined: in {module_name} it is a {type(inner).__name__}, whose update "
                    "is more than lora_B times lora_A"
                )
        layouts = [layer.head_layout[name] for name in here if name in getattr(layer, "head_layout", ())]
        said_by = "other heads (num_heads) or other parts of a fused projection (fused_parts)"
        check_same_heads(module_name, layouts, said_by)


def check_ranks(model: nn.Module, adapters: Sequence[str], combination_type: str, rank: int) -> None:
    """Raise ValueError if adapters of other ranks are to be summed entry by entry, or a layer has too few singular values.

    Args:
        model: The model with the adapters in it.
        adapters: The summands, several.
        combination_type: As of `add_weighted_adapter`.
        rank: The rank of the sum.
    """
    for module_name, layer in _lora_layers(model):
        here = {name: _weights(layer, name) for name in adapters if name in layer.r}
        ranks = {name: down.shape[0] for name, (down, _) in here.items()}
        if combination_type in _NEEDS_EQUAL_RANKS and len(set(ranks.values())) > 1:
            raise ValueError(
                f"combination_type={combination_type!r} needs adapters of the same rank, but in {module_name} they have "
                f"{ranks}; use cat or svd"
            )
        if combination_type.endswith("svd"):
            for down, up in here.values():
                most = min(up.shape[0], down[0].numel())
                if rank > most:
                    raise ValueError(
                        f"combination by svd with rank {rank}: {module_name} has {most} singular values; pass a smaller "
                        "svd_rank, or combination_type='cat'"
                    )


def summand_config(
    model: nn.Module, configs: dict[str, HeadMaskedLoraConfig], adapters: Sequence[str], adapter: str
) -> HeadMaskedLoraConfig:
    """A summand's configuration as PEFT must find it, so that what it makes of it is the sum's.

    PEFT computes the sum's weights for a scaling of 1, which rsLoRA does not have at lora_alpha = r; it takes options
    from the first summand alone; and it joins `target_modules` but not what narrows them.
    """
    changes = {"use_rslora": False, "packed": False, "modules_to_save": classifiers_of_sum(configs, adapters)}
    changes["lora_bias"] = any(configs[name].lora_bias for name in adapters)
    bits = [configs[name].classifier_bits for name in adapters if configs[name].modules_to_save]
    changes["classifier_bits"] = min(bits, default=FULL_PRECISION)
    narrowing = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if any(getattr(configs[name], option) for name in adapters for option in narrowing):
        changes |= dict.fromkeys(narrowing)
        names = {name for name, layer in _lora_layers(model) if any(summand in layer.r for summand in adapters)}
        changes["target_modules"] = names
    return dataclasses.replace(configs[adapter], **changes)


def clear_deactivated(model: nn.Module, adapters: Sequence[str]) -> None:
    """Write zeros into the rows of deactivated heads, which do nothing whatever their value, but would in a sum."""
    for _, layer in _lora_layers(model):
        if isinstance(layer, HeadMaskedLinear):
            for name in set(adapters) & set(layer.head_masks):
                for param in layer.head_parameters(name):
                    param.data = layer.mask_rows(name, param.data)


@torch.no_grad()
def complete_sum(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Give the sum what PEFT does not: biases, the rank that its configuration says, and masks.

    A head is active in the sum where it is in any of the summands.
    """
    for _, layer in _lora_layers(model):
        if adapter_name not in layer.r:
            continue
        summands = [(name, float(weight)) for name, weight in zip(adapters, weights, strict=True) if name in layer.r]
        down, up = _weights(layer, adapter_name)
        missing = layer.r[adapter_name] - down.shape[0]
        if missing > 0:  # rank_pattern
            down.data = torch.cat([down.data, down.new_zeros(missing, *down.shape[1:])])
            up.data = torch.cat([up.data, up.new_zeros(up.shape[0], missing, *up.shape[2:])], dim=1)
        if layer.lora_bias.get(adapter_name) and adapter_name in layer.lora_B:
            bias = layer.lora_B[adapter_name].bias
            bias.zero_()
            for name, weight in summands:
                if layer.lora_B[name].bias is not None:
                    bias += weight * layer.scaling[name] * layer.lora_B[name].bias
        if isinstance(layer, HeadMaskedLinear) and adapter_name in layer.head_masks:
            masks = [layer.get_head_mask(name).cpu() for name, _ in summands if name in layer.head_layout]
            layer.set_head_mask(adapter_name, torch.stack(masks).any(dim=0))


def _check_bits(configs: dict[str, HeadMaskedLoraConfig], adapters: Sequence[str]) -> None:
    bits = {name: configs[name].adapter_bits for name in adapters}
    if any(n != FULL_PRECISION for n in bits.values()):
        raise ValueError(
            f"k-bit adapters cannot be combined (adapter_bits: {bits}): the sum is no k-bit adapter; make plain "
            "LoRA adapters of them first (peft-heads export ADAPTER --to lora DIR)"
        )


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, layer) for name, layer in own_modules(model) if isinstance(layer, LoraLayer))


def _weights(layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(r, in, …)` and `(out, r, …)`."""
    if adapter_name in layer.lora_A:
        return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
