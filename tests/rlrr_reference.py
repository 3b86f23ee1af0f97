"""RLRR written out plainly: by the paper's formulas, the acting weights of a model from its frozen ones."""

import torch


def acting(base, adapter, variant=(True, True), off=None):
    """Return `{parameter name: tensor}` of a plain model that acts like an adapted one.

    Args:
        base: The state dict of the frozen model.
        adapter: `{key: tensor}` of the adapter, keys as in its file without `base_model.model.`.
        variant: (residual, rescale_weight).
        off: `{projection: rows of deactivated heads}`.
    """
    result = dict(base)
    modules = {key.rpartition(".rlrr_")[0] for key in adapter if ".rlrr_" in key}
    for name in modules:
        left, right, change_of_scale, shift = (
            adapter.get(f"{name}.rlrr_{part}") for part in ("left", "right", "scale_delta", "shift")
        )
        weight, bias = base[f"{name}.weight"], base.get(f"{name}.bias")
        zeros = torch.zeros(weight.shape[0], dtype=weight.dtype)
        bias = zeros if bias is None else bias
        if change_of_scale is not None:
            scale = 1 + change_of_scale
            result[f"{name}.weight"] = torch.stack([row * s for row, s in zip(weight, scale, strict=True)])
            result[f"{name}.bias"] = bias * scale + shift
            continue
        k = weight.shape[2] if weight.dim() == 4 else 1
        rows, columns = weight.shape[0] * k, weight.shape[1] * k
        left = torch.ones(rows, 1, dtype=weight.dtype) if left is None else left
        right = torch.ones(1, columns, dtype=weight.dtype) if right is None else right
        keep = torch.ones(rows, 1, dtype=weight.dtype)
        keep[(off or {}).get(name, [])] = 0
        product = sum(torch.outer(left[:, i], right[i]) for i in range(left.shape[1])) * keep
        if weight.dim() == 4:  # [o, i, a, b] stands at [o·k + a, i·k + b] of the matrix
            product = product.reshape(weight.shape[0], k, weight.shape[1], k).transpose(1, 2)
        residual, rescale_weight = variant
        change = product * weight if rescale_weight else product
        result[f"{name}.weight"] = weight + change if residual else change
        result[f"{name}.bias"] = bias + (0 if shift is None else shift * keep[::k, 0])
    for key, tensor in adapter.items():
        if ".rlrr_" not in key:
            result[key] = tensor
    return result
