"""Gates of 1: the same numbers forward, and the derivatives of each image's loss backward."""

import pytest
import torch

from peft_heads.heads.gates import GATE_STATISTICS, gate_statistics, gated, new_gates


def test_statistics_are_sums_over_images():
    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    sums = gate_statistics(gradients)
    assert sums.dtype == torch.float64 and sums.shape == (3, 5) and len(GATE_STATISTICS) == 3
    for unit in range(5):
        each = gradients[:, unit].tolist()
        expected = [sum(map(abs, each)), sum(each), sum(g * g for g in each)]
        torch.testing.assert_close(sums[:, unit], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(gate_statistics(gradients[:3]) + gate_statistics(gradients[3:]), sums)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_the_same_to_the_bit_and_so_is_the_gradient(dtype):
    values = torch.tensor([[[0.0, -0.0, 1e-7, torch.inf], [torch.nan, 3.1, -7.7, 65504.0]]], dtype=dtype)
    values = torch.cat([values, values.flip(2)]).requires_grad_()
    result = gated(values, new_gates(values, num_images=2, num_units=2))
    assert result.dtype == dtype and result.requires_grad
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    assert torch.equal(result.detach().view(integers), values.detach().view(integers))
    slope = torch.randn(values.shape).to(dtype)
    result.backward(slope)
    assert torch.equal(values.grad, slope)


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_derivatives_are_those_of_a_product(windows, requires_grad):
    """Two images of several windows of 4 tokens, 3 units of 2 channels, against gates that are multiplied in."""
    generator = torch.Generator().manual_seed(0)
    values, slope = torch.randn(2, 2 * windows, 4, 6, generator=generator, dtype=torch.float64)
    expected = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    product = values * expected.repeat_interleave(windows, 0).repeat_interleave(2, 1)[:, None]
    product.backward(slope)

    gates = new_gates(values, num_images=2, num_units=3)
    gated(values.requires_grad_(requires_grad), gates).backward(slope)
    torch.testing.assert_close(gates.grad, expected.grad)


def test_derivatives_of_half_precision_are_summed_in_float32():
    values = torch.ones(1, 2**12, 1, dtype=torch.bfloat16)  # bfloat16 counts to 256
    gates = new_gates(values, num_images=1, num_units=1)
    gated(values, gates).sum().backward()
    assert gates.grad.dtype == torch.float32 and gates.grad.item() == 2**12
