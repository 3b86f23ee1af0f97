"""Which modules of a model are norms, and which batch norm takes the output of which layer."""

from __future__ import annotations

from torch import nn

from ..heads.traversal import named_targets


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Modules that call a layer, then the batch norm, and nothing between: `{(class, layer): batch norm}`.
_BEFORE_BATCH_NORM = {
    (module, "convolution"): "normalization"
    for module in (
        *("ResNetConvLayer", "ResNetShortCut", "RegNetConvLayer", "RegNetShortCut"),
        *("MobileViTConvLayer", "MobileViTV2ConvLayer", "HGNetV2ConvLayer"),
        *("MobileNetV1ConvLayer", "MobileNetV2ConvLayer"),
    )
} | {("LevitConvEmbeddings", "convolution"): "batch_norm", ("MLPLayerWithBN", "linear"): "batch_norm"}


def normalises(module: nn.Module) -> bool:
    """Whether a module normalises its input by the input's own statistics.

    Batch normalisation does not: its statistics are those of the data set.
    """
    return "Norm" in type(module).__name__ and not isinstance(module, _BATCH_NORMS)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises its input and has parameters by which it scales the result."""
    return normalises(module) and any(True for _ in module.parameters(recurse=False))


def batch_norms(model: nn.Module) -> list[str]:
    """Names of the batch normalisations of a model, whose running statistics move while it trains."""
    return [name for name, module in named_targets(model) if isinstance(module, _BATCH_NORMS)]


def following_batch_norm(model: nn.Module, name: str) -> str | None:
    """Name of the batch norm that alone takes the output of a layer; None if none is known."""
    parent, _, child = name.rpartition(".")
    norm_name = _BEFORE_BATCH_NORM.get((type(model.get_submodule(parent)).__name__, child))
    norm = getattr(model.get_submodule(parent), norm_name or "", None)
    norm = getattr(norm, "original_module", norm)  # of one that is trained in full
    return f"{parent}.{norm_name}" if getattr(norm, "running_mean", None) is not None else None
