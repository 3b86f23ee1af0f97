import copy

import pytest
import torch
from torch import nn

from peft_heads.functional.rescaled_operation import (
    Change,
    ConvolutionOperation,
    LinearOperation,
    kernel_to_matrix,
    matrix_to_kernel,
    rescaled_operation,
)
from peft_heads.functional.rescaling import Rescaling, delta, factor_gradients, rescale


VARIANTS = [Rescaling(), Rescaling(residual=False), Rescaling(rescale_weight=False)]
SIDES = ["both", "left", "right"]


def factors(rows, columns, r, sides, dtype=torch.float64):
    left = torch.randn(rows, r, dtype=dtype, requires_grad=True) if sides != "right" else None
    right = torch.randn(r, columns, dtype=dtype, requires_grad=True) if sides != "left" else None
    return left, right


def written_out(W, left, right, variant):
    """Compute the result entry by entry."""
    result = torch.empty_like(W)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            ranks = range((left if left is not None else right.T).shape[1])
            s = sum((1 if left is None else left[i, k]) * (1 if right is None else right[k, j]) for k in ranks)
            if not variant.rescale_weight:
                result[i, j] = W[i, j] + s
            else:
                result[i, j] = (s + 1 if variant.residual else s) * W[i, j]
    return result


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("r", [1, 3])
def test_rescale_entry_by_entry(variant, sides, r):
    W = torch.randn(4, 5, dtype=torch.float64)
    left, right = (None if x is None else x.detach() for x in factors(4, 5, r, sides))
    expected = written_out(W, left, right, variant)
    torch.testing.assert_close(rescale(W, left, right, variant), expected)
    torch.testing.assert_close(delta(W, left, right, variant), expected - W)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_linear_layer(variant, sides, r, bias):
    W = torch.randn(4, 3, dtype=torch.float64)
    b = torch.randn(4, dtype=torch.float64) if bias else None
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    f = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def apply(x, left, right, f):
        return rescaled_operation(x, W, b, [Change(left, right, variant)], f, LinearOperation())

    left, right = factors(4, 3, r, sides)
    assert torch.autograd.gradcheck(apply, (x, left, right, f))
    expected = x @ written_out(W, left, right, variant).T + f + (b if bias else 0)
    torch.testing.assert_close(apply(x, left, right, f), expected)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"groups": 2},
        {"dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_gradients_of_a_convolution(sides, settings):
    layer = nn.Conv2d(2, 4, 3, **settings).double().requires_grad_(False)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    f = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rows, columns = kernel_to_matrix(layer.weight).shape
    left, right = factors(rows, columns, 2, sides)
    operation = ConvolutionOperation(layer)

    def apply(x, left, right, f):
        return rescaled_operation(x, layer.weight, layer.bias, [Change(left, right)], f, operation)

    assert torch.autograd.gradcheck(apply, (x, left, right, f))
    folded = copy.deepcopy(layer)
    matrix = rescale(kernel_to_matrix(layer.weight), left, right, Rescaling()).detach()
    folded.weight.data = matrix_to_kernel(matrix, layer.weight.shape).contiguous()
    folded.bias.data += f.detach()
    torch.testing.assert_close(apply(x, left, right, f), folded(x))


def test_a_kernel_as_a_matrix():
    kernel = torch.randn(4, 3, 2, 5)
    matrix = kernel_to_matrix(kernel)
    assert matrix.shape == (4 * 2, 3 * 5)
    assert matrix[3 * 2 + 1, 2 * 5 + 4] == kernel[3, 2, 1, 4]
    assert torch.equal(matrix_to_kernel(matrix, kernel.shape), kernel)


def test_rows_with_zero_factors_are_the_frozen_ones():
    W = torch.randn(64, 48)
    left, right = torch.randn(64, 2), torch.randn(2, 48)
    left[10:20] = 0
    for variant in (Rescaling(), Rescaling(rescale_weight=False)):
        assert torch.equal(rescale(W, left, right, variant)[10:20], W[10:20])


@pytest.mark.parametrize("variant", VARIANTS[::2], ids=str)
def test_several_adapters(variant):
    """Their changes add up, and each gets its gradient; an untrained one gets none."""
    W, b, f = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (4,), (4,)))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    of_first, of_second = factors(4, 3, 1, "both"), factors(4, 3, 2, "both")
    third = torch.randn(4, 1, dtype=torch.float64)

    def apply(x, *tensors):
        changes = [Change(*tensors[:2], variant), Change(*tensors[2:], variant), Change(third, None, Rescaling())]
        return rescaled_operation(x, W, b, changes, f, LinearOperation())

    assert torch.autograd.gradcheck(apply, (x, *of_first, *of_second))
    change = written_out(W, *of_first, variant) + written_out(W, *of_second, variant) - 2 * W
    change = change + written_out(W, third, None, Rescaling()) - W
    torch.testing.assert_close(apply(x, *of_first, *of_second), x @ (W + change).T + b + f)


@pytest.mark.parametrize("operation", ["linear", "convolution"])
def test_second_derivatives(operation):
    layer = (nn.Linear(3, 4) if operation == "linear" else nn.Conv2d(2, 4, 2)).double().requires_grad_(False)
    used = LinearOperation() if operation == "linear" else ConvolutionOperation(layer)
    x = torch.randn(*((2, 3) if operation == "linear" else (2, 2, 3, 3)), dtype=torch.float64, requires_grad=True)
    left, right = factors(*used.matrix(layer.weight).shape, 1, "both")

    def apply(x, left, right):
        return rescaled_operation(x, layer.weight, layer.bias, [Change(left, right)], None, used).tanh()

    assert torch.autograd.gradgradcheck(apply, (x, left, right))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # jvp uses it
def test_transforms():
    """Gradients of single examples and forward-mode derivatives work."""
    W, x = torch.randn(4, 3), torch.randn(5, 3)
    left, right = factors(4, 3, 2, "both", torch.float32)

    def loss(left, right, x):
        return rescaled_operation(x, W, None, [Change(left, right)], None, LinearOperation()).square().sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(left, right, x)
    for i in range(len(x)):
        grads = torch.autograd.grad(loss(left, right, x[i]), (left, right))
        for grad, expected in zip(each, grads, strict=True):
            torch.testing.assert_close(grad[i], expected)
    ones = torch.ones_like(left)
    _, slope = torch.func.jvp(lambda left: loss(left, right, x), (left.detach(),), (ones,))
    torch.testing.assert_close(slope, torch.autograd.grad(loss(left, right, x), left)[0].sum())


def test_the_meta_device():
    layer = nn.Linear(3, 4, device="meta")
    left, right = (factor.to("meta") for factor in factors(4, 3, 1, "both"))
    x = torch.empty(2, 3, device="meta")
    y = rescaled_operation(x, layer.weight, layer.bias, [Change(left, right)], None, LinearOperation())
    assert y.is_meta and y.shape == (2, 4)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("trained", [True, False])
def test_nothing_of_the_weights_size_is_kept(number, trained):
    """The frozen weight is not kept twice, its rescaled form not at all, and the input only where it is needed."""
    W = torch.randn(64, 48)
    x = torch.randn(2, 48, requires_grad=True)
    changes = [Change(*factors(64, 48, 1, "both", torch.float32)) for _ in range(number)]
    for change in changes:
        for factor in change[:2]:
            factor.requires_grad_(trained)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rescaled_operation(x, W, None, changes, None, LinearOperation())
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved) == trained
    large = [tensor for tensor in saved if tensor.numel() >= W.numel()]
    assert [tensor.data_ptr() for tensor in large] == [W.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """With a half-precision weight and full-precision factors, products are in half, and W' is formed in full."""
    W, x = torch.randn(32, 24).to(dtype), torch.randn(5, 24).to(dtype)
    left, right = factors(32, 24, 1, "both", torch.float32)
    y = rescaled_operation(x, W, None, [Change(left, right)], None, LinearOperation())
    expected = x @ (W.float() + left @ right * W.float()).to(dtype).T
    assert y.dtype == dtype and torch.equal(y, expected)
    y.float().sum().backward()
    assert left.grad.dtype == right.grad.dtype == torch.float32


def test_autocast():
    W, x = torch.randn(32, 24), torch.randn(5, 24, requires_grad=True)
    left, right = factors(32, 24, 1, "both", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rescaled_operation(x, W, None, [Change(left, right)], None, LinearOperation())
    assert torch.equal(y, x.bfloat16() @ (W + left @ right * W).bfloat16().T)
    y.sum().backward()
    assert x.grad.dtype == left.grad.dtype == torch.float32


def test_the_gradient_is_working_memory():
    W, grad = torch.randn(4, 3), torch.randn(4, 3)
    before, left, right = grad.clone(), torch.randn(4, 2), torch.randn(2, 3)
    of_left, of_right = factor_gradients(grad, W, left, right, Rescaling())
    assert torch.equal(grad, before * W)
    torch.testing.assert_close(of_left, (before * W) @ right.T)
    torch.testing.assert_close(of_right, left.T @ (before * W))


@pytest.mark.parametrize("operation", ["linear", "convolution"])
def test_without_gradients(operation):
    """Without gradients, plain operations have the same result."""
    layer = nn.Linear(6, 4) if operation == "linear" else nn.Conv2d(2, 4, 3)
    x = torch.randn(5, 6) if operation == "linear" else torch.randn(5, 2, 4, 4)
    layer.requires_grad_(False)
    used = LinearOperation() if operation == "linear" else ConvolutionOperation(layer)
    left, right = factors(*used.matrix(layer.weight).shape, 1, "both", torch.float32)
    f = torch.randn(4)

    expected = rescaled_operation(x, layer.weight, layer.bias, [Change(left, right)], f, used)
    assert expected.grad_fn is not None
    with torch.no_grad():
        result = rescaled_operation(x, layer.weight, layer.bias, [Change(left, right)], f, used)
    assert torch.equal(result, expected)
