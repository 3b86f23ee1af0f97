"""The RLRR layers: rescaled matrices, and scaled and shifted channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...functional.rescaled_operation import Change, ConvolutionOperation, LinearOperation, rescaled_operation
from ...functional.rescaling import delta
from ...functional.rows import per_row, without_rows
from ...heads.layout import ProjectionLayout
from ...heads.protocol import ScoredParameter
from ..common.head_mask import HeadMask, HeadMaskedLayer
from .base_layer import RLRRLayer
from .config import RLRRConfig


# Initial deviation of γ and β, which the paper gives, and size of the factors' entries, which it does not.
SCALE_STD, FACTOR_SIZE = 0.02, 0.02


class RLRRLinear(HeadMaskedLayer, RLRRLayer):
    """A linear layer that acts as `(W + (S_out S_in) ⊙ W) x + b + f`.

    On a query or value projection it may carry one binary mask entry per attention head. From the moment a head is
    deactivated its rows of `S_out` and entries of f count as zeros: the frozen weight and bias act alone there.
    """

    head_masks_name = "rlrr_head_mask"

    @property
    def in_features(self) -> int:
        return self.get_base_layer().in_features

    @property
    def out_features(self) -> int:
        return self.get_base_layer().out_features

    @property
    def operation(self) -> LinearOperation:
        return LinearOperation()

    def create_parameters(self, adapter_name: str, config: RLRRConfig, layout: ProjectionLayout | None) -> None:
        rows, columns = self.operation.matrix(self.get_base_layer().weight.detach()).shape
        if config.left:
            self.rlrr_left[adapter_name] = nn.Parameter(torch.empty(rows, config.r))
        if config.right:
            self.rlrr_right[adapter_name] = nn.Parameter(torch.empty(config.r, columns))
        if config.shift_without_bias or self.frozen_bias() is not None:
            self.rlrr_shift[adapter_name] = nn.Parameter(torch.zeros(self.get_base_layer().weight.shape[0]))
        if layout is not None:
            self.head_layout[adapter_name] = layout
            if config.masks_heads:
                self.rlrr_head_mask[adapter_name] = HeadMask(layout.num_heads)
        self.reset_parameters(adapter_name, config)

    def reset_parameters(self, adapter_name: str, config: RLRRConfig) -> None:
        factors = [factor[adapter_name] for factor in (self.rlrr_left, self.rlrr_right) if adapter_name in factor]
        for factor in factors:
            if config.init == "normal":
                nn.init.normal_(factor, std=FACTOR_SIZE)
            elif config.init == "uniform":
                nn.init.uniform_(factor, -FACTOR_SIZE, FACTOR_SIZE)
            elif config.init == "constant":
                nn.init.constant_(factor, FACTOR_SIZE if config.residual else 1.0)
            else:
                nn.init.kaiming_uniform_(factor)
        if config.init == "zero":
            nn.init.zeros_(factors[0])

    # The protocol of heads/protocol.py

    def scored_parameters(self, adapter_name: str) -> list[ScoredParameter]:
        """`S_out` (out, r) and f (out,); `S_in` is shared by all heads."""
        factors = [factor for factor in (self.rlrr_left, self.rlrr_shift) if adapter_name in factor]
        return [ScoredParameter(factor[adapter_name]) for factor in factors]

    def active_rows(self, adapter_name: str) -> torch.Tensor:
        """bool (out,), True = the adapter changes the row: all but those of deactivated heads."""
        return ~self.deactivated_rows(adapter_name)

    def mask_rows(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        """`rows` (out, ...) with those of deactivated heads replaced by zero."""
        if adapter_name not in self.rlrr_head_mask:
            return rows
        return without_rows(rows, self.deactivated_rows(adapter_name))

    # How the adapters act

    def factors(self, adapter_name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`S_out` (out, r), zero for deactivated heads, and `S_in` (r, in); None for a factor that is not there."""
        left = self.rlrr_left[adapter_name] if adapter_name in self.rlrr_left else None
        right = self.rlrr_right[adapter_name] if adapter_name in self.rlrr_right else None
        return left if left is None else self.mask_rows(adapter_name, left), right

    def shift(self, adapter_name: str) -> torch.Tensor | None:
        """f (out,), zero for deactivated heads; None if there is none."""
        if adapter_name not in self.rlrr_shift:
            return None
        return self.mask_rows(adapter_name, self.rlrr_shift[adapter_name])

    def summed_shift(self, adapter_names: list[str]) -> torch.Tensor | None:
        """The sum of several adapters' f; None if none has one."""
        shifts = [shift for name in adapter_names if (shift := self.shift(name)) is not None]
        return sum(shifts[1:], start=shifts[0]) if shifts else None

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's change of the frozen weight, of the same shape, in the wider dtype of the two."""
        weight = self.frozen_weight()
        change = delta(self.operation.matrix(weight), *self.factors(adapter), self.rlrr_variant[adapter])
        return self.operation.weight(change, weight.shape)

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        weight, bias = self.frozen_weight(), self.frozen_bias()
        is_frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if self.must_be_called:
            return self.call_base_layer(x, adapter_names)
        if is_frozen:
            changes = [Change(*self.factors(name), self.rlrr_variant[name]) for name in adapter_names]
            return rescaled_operation(x, weight, bias, changes, self.summed_shift(adapter_names), self.operation)
        changed = self.changed_tensors(adapter_names)
        operation = self.operation
        return operation(operation.prepare(x), changed["weight"], changed.get("bias"))

    def changed_tensors(self, adapter_names: list[str]) -> dict[str, torch.Tensor]:
        weight, bias = self.frozen_weight(), self.frozen_bias()
        changed = {"weight": sum((self.get_delta_weight(name) for name in adapter_names), start=weight)}
        shift = self.summed_shift(adapter_names)
        if shift is not None:
            changed["bias"] = shift if bias is None else bias + shift
        elif bias is not None:
            changed["bias"] = bias
        return {name: tensor.to(weight.dtype) for name, tensor in changed.items()}


def _of_base_layer(name: str) -> property:
    return property(lambda layer: getattr(layer.get_base_layer(), name))


class RLRRConv2d(RLRRLinear):
    """A convolution whose kernels, laid out as a matrix (out·k, in·k), are rescaled."""

    # Models read these of their convolutions, for instance MobileNet, which pads by them.
    kernel_size, stride, dilation = map(_of_base_layer, ("kernel_size", "stride", "dilation"))

    @property
    def in_features(self) -> int:
        return self.get_base_layer().in_channels

    @property
    def out_features(self) -> int:
        return self.get_base_layer().out_channels

    @property
    def operation(self) -> ConvolutionOperation:
        return ConvolutionOperation(self.get_base_layer())

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if x.dim() == 3:  # an image by itself, as torch.nn.Conv2d takes it
            return self.adapted_forward(x.unsqueeze(0), adapter_names).squeeze(0)
        return super().adapted_forward(x, adapter_names)


class RLRRScale(RLRRLayer):
    """A layer whose output is scaled and shifted per channel, `y ⊙ γ + β`: a layer norm, or the patch embedding.

    A layer norm does so by its own weight and bias, at no cost per token.
    """

    def create_parameters(self, adapter_name: str, config: RLRRConfig, layout: ProjectionLayout | None) -> None:
        channels = self.get_base_layer().weight.shape[0]
        self.rlrr_scale_delta[adapter_name] = nn.Parameter(torch.zeros(channels))
        if config.shift_without_bias or self.frozen_bias() is not None:
            self.rlrr_shift[adapter_name] = nn.Parameter(torch.zeros(channels))
        if config.init != "zero":
            nn.init.normal_(self.rlrr_scale_delta[adapter_name], std=SCALE_STD)
            if adapter_name in self.rlrr_shift:
                nn.init.normal_(self.rlrr_shift[adapter_name], std=SCALE_STD)

    def scale_and_shift(self, adapter_names: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """γ and β, (channels,), of the adapters together; None where no adapter has a β."""
        scale = sum((self.rlrr_scale_delta[name] for name in adapter_names), start=1)
        shifts = [self.rlrr_shift[name] for name in adapter_names if name in self.rlrr_shift]
        return scale, sum(shifts[1:], start=shifts[0]) if shifts else None

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        base_layer = self.get_base_layer()
        if isinstance(base_layer, nn.LayerNorm):
            if type(base_layer) is not nn.LayerNorm or self.must_be_called:
                return self.call_base_layer(x, adapter_names)
            changed = self.changed_tensors(adapter_names)
            return F.layer_norm(x, base_layer.normalized_shape, **changed, eps=base_layer.eps)
        scale, shift = self.scale_and_shift(adapter_names)
        y = self.base_layer(x)
        if isinstance(base_layer, nn.Conv2d):
            scale, shift = scale.view(-1, 1, 1), None if shift is None else shift.view(-1, 1, 1)
        return (y * scale if shift is None else torch.addcmul(shift, y, scale)).to(y.dtype)

    def changed_tensors(self, adapter_names: list[str]) -> dict[str, torch.Tensor]:
        weight, bias = self.frozen_weight(), self.frozen_bias()
        scale, shift = self.scale_and_shift(adapter_names)
        changed = {"weight": weight * per_row(scale, weight)}
        parts = [shift] if shift is not None else []
        parts += [bias * scale] if bias is not None else []
        if parts:
            changed["bias"] = sum(parts[1:], start=parts[0])
        return {name: tensor.to(weight.dtype) for name, tensor in changed.items()}
