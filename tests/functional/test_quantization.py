import itertools
import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest
import reference
import torch

from peft_heads.functional import quantization
from peft_heads.functional.quantization import (
    BITS,
    code_book,
    decide,
    dequantize,
    latents,
    quantize,
    quantize_by_autograd,
)


every_width = pytest.mark.parametrize("bits", BITS)
ROWS = torch.tensor([True, False, True, True, False, True, True, True])


def weights(dtype=torch.float32, shape=(8, 16), scale=0.05):
    return (torch.randn(shape, dtype=torch.float64) * scale + 0.01).to(dtype)


@every_width
def test_code_book(bits):
    codes = code_book(bits)
    assert codes.dtype == torch.float64 and len(codes) == 2**bits
    torch.testing.assert_close(codes, torch.tensor(reference.code_book(bits), dtype=torch.float64))
    assert (codes.diff() > 0).all()
    torch.testing.assert_close(codes, -codes.flip(0), rtol=0, atol=1e-12)
    assert code_book(bits) is codes  # once per bit width


def test_one_bit_is_the_quartile():
    assert code_book(1).tolist() == pytest.approx([-0.6744897501960817, 0.6744897501960817], abs=1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_code_book_is_the_fixed_point(bits):
    """Every code is the median of the mass between its boundaries; with 8 bits that takes more than 500 rounds."""
    codes, normal = code_book(bits).tolist(), NormalDist()
    edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(codes)), math.inf]
    for low, high, code in zip(edges, edges[1:], codes, strict=False):
        assert normal.cdf(code) == pytest.approx((normal.cdf(low) + normal.cdf(high)) / 2, abs=1e-6)


@pytest.mark.parametrize("bits", [0, 3, 16, 32, "1", True + 2])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be one of 1, 2, 4, 8; got"):
        code_book(bits)


@every_width
@pytest.mark.parametrize("rows", [None, ROWS], ids=["all rows", "some rows"])
def test_against_the_reference(bits, rows):
    weight = weights(torch.float64)
    expected = reference.quantized(weight.tolist(), bits, None if rows is None else rows.tolist())
    torch.testing.assert_close(quantize(weight, bits, rows), torch.tensor(expected, dtype=torch.float64))


@every_width
def test_rows_left_out_count_for_nothing(bits):
    weight = weights()
    expected = quantize(weight[ROWS], bits)
    for value in (0.0, 1e6, float("nan"), float("inf")):
        weight[~ROWS] = value
        quantized = quantize(weight, bits, ROWS)
        assert torch.equal(quantized[ROWS], expected)
        assert quantized[~ROWS].count_nonzero() == 0


@every_width
@pytest.mark.parametrize("rows", [None, ROWS], ids=["all rows", "some rows"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])  # at the last, 1e-5 beside σ counts
def test_gradient_is_that_of_the_plain_expression(bits, rows, scale):
    weight = weights(torch.float64, scale=scale).requires_grad_()
    slope = torch.randn(8, 16, dtype=torch.float64)
    gradients = []
    for function in (quantize, quantize_by_autograd):
        output = function(weight, bits, rows)
        gradients += torch.autograd.grad((output * slope).sum(), weight)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].count_nonzero() > 0
    if rows is not None:
        assert gradients[0][~rows].count_nonzero() == 0
    torch.testing.assert_close(
        quantize(weight, bits, rows), quantize_by_autograd(weight, bits, rows), rtol=1e-12, atol=0
    )


def test_gradient_flows_through_mean_and_std():
    """Shifting all entries shifts the result by as much; scaling them scales it."""
    weight = weights(torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(quantize(weight, 2).sum(), weight)
    assert gradient.sum().item() == pytest.approx(weight.numel())
    shifted = quantize(weight + 0.5, 2)
    torch.testing.assert_close(shifted, quantize(weight, 2) + 0.5)


@every_width
def test_gradient_of_no_spread(bits):
    """If all entries are equal (a matrix of zeros), they are returned, and the gradient is finite."""
    weight = torch.full((4, 4), 0.25, requires_grad=True)
    for function in (quantize, quantize_by_autograd):
        output = function(weight, bits)
        assert torch.equal(output, weight)
        (gradient,) = torch.autograd.grad(output.square().sum(), weight)
        assert gradient.isfinite().all()
    assert quantize(weight, bits, torch.zeros(4, dtype=torch.bool)).count_nonzero() == 0
    assert quantize(torch.ones(1, 1), bits).item() == 1


@every_width
@pytest.mark.parametrize("rows", [False, True])
def test_a_stack_is_its_matrices(bits, rows):
    stack = weights(shape=(3, 8, 16))
    rows = torch.stack([ROWS, ~ROWS, ROWS.flip(0)]) if rows else None
    decision = decide(stack, bits, rows)
    for index, weight in enumerate(stack):
        one = decide(weight, bits, None if rows is None else rows[index])
        for name, actual, expected in zip(one._fields, decision.matrix(index), one, strict=True):
            assert actual is expected is None or torch.equal(actual, expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Codes are computed in float32, from the unrounded values."""
    weight = weights(dtype).requires_grad_()
    output = quantize(weight, 4)
    assert output.dtype == dtype
    assert torch.equal(output, quantize(weight.float(), 4).to(dtype))
    output.sum().backward()
    assert weight.grad.dtype == dtype


@every_width
def test_codes_stand_for_the_weight(bits):
    decision = decide(weights(), bits, ROWS)
    assert decision.codes.dtype == torch.uint8 and decision.codes.int().max() < 2**bits
    assert torch.equal(dequantize(decision.codes, decision.mean, decision.std, bits, ROWS), decision.values)


@every_width
@pytest.mark.parametrize("distribution", ["normal", "uniform", "as initialised"])
@pytest.mark.parametrize("rows", [None, torch.arange(64) % 4 != 1], ids=["all rows", "some rows"])
def test_latents_give_the_same_codes_back(bits, distribution, rows):
    weight = weights(shape=(64, 96))
    if distribution == "uniform":
        weight.uniform_(-0.1, 0.1)
    elif distribution == "as initialised":
        torch.nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3)
    decision = decide(weight, bits, rows)
    arguments = (decision.codes, decision.mean, decision.std, bits, rows)
    again = decide(latents(*arguments), bits, rows)
    assert torch.equal(again.codes, decision.codes)
    torch.testing.assert_close(again.mean, decision.mean, rtol=0, atol=1e-7)
    if bits < 4:
        z = code_book(bits)[decision.codes.int()][slice(None) if rows is None else rows]
        formula = decision.mean + decision.std * ((z - z.mean()) / z.std())
        torch.testing.assert_close(latents(*arguments)[slice(None) if rows is None else rows], formula.float())
    torch.testing.assert_close(again.std, decision.std, rtol=1e-5, atol=0)
    if bits < 8:  # the purpose of latents
        twice = decide(dequantize(*arguments), bits, rows).values
        assert not torch.allclose(twice, decision.values, rtol=1e-3, atol=0)


def test_imports_torch_only():
    names = {name for name, value in vars(quantization).items() if type(value) is type(math)}
    assert names == {"math", "torch"}
    source = Path(quantization.__file__).read_text("utf-8")
    assert set(re.findall(r"^ *(?:from|import) (\S+)", source, re.MULTILINE)) == {
        "__future__",
        "math",
        "typing",
        "torch",
    }


def test_latents_of_one_large_entry():
    """The plain formula is used where it restores the codes: it keeps even skewed means and deviations."""
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) * 0.01
    weight[1, 3] = 5.0
    decision = decide(weight, 1)
    again = decide(latents(decision.codes, decision.mean, decision.std, 1), 1)
    assert torch.equal(again.codes, decision.codes)
    torch.testing.assert_close(again.values, decision.values, rtol=1e-4, atol=1e-4 * decision.std.item())
