import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_heads.heads import taylor
from peft_heads.heads.layout import HeadLayout
from peft_heads.heads.scores import head_scores
from peft_heads.heads.taylor import STATISTICS, all_head_statistics, head_statistics


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# num_heads, head_dim, parameters per row, dtypes of parameters and gradients, rows of the layer before the projection's
PROJECTIONS = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.sampled_from([1, 3, 8]),
        st.sampled_from([1, 4, 9]),
        DTYPES,
        DTYPES,
        st.sampled_from([0, 7]),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(projections=PROJECTIONS, loss_scale=st.sampled_from([1.0, 3.0, 65536.0]), seed=st.integers(0, 2**31))
def test_all_projections_at_once_equal_each_alone_to_the_bit(projections, loss_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    layouts, params, grads = {}, {}, {}
    for i, (num_heads, head_dim, n, dtype, grad_dtype, first_row) in enumerate(projections):
        layout = layouts[f"p{i}"] = HeadLayout("query", num_heads, head_dim, first_row)
        whole = torch.randn(2, first_row + layout.num_rows + 5, n, generator=generator)  # of a fused layer
        params[f"p{i}"], grads[f"p{i}"] = layout.rows(whole[0].to(dtype)), layout.rows(whole[1].to(grad_dtype))
    actual = all_head_statistics(params, grads, layouts, loss_scale)
    assert list(actual) == list(layouts)
    for name, layout in layouts.items():
        expected = head_statistics(params[name], grads[name] / loss_scale, layout)
        assert actual[name].dtype == torch.float64
        assert torch.equal(actual[name], expected), name


def test_projections_whose_rows_are_alike_share_a_call(monkeypatch):
    """Number of heads and part do not matter. Every call saved spares a GPU some twenty launches."""
    calls = []
    monkeypatch.setattr(
        taylor, "head_statistics", lambda *args: calls.append(args[2].num_heads) or head_statistics(*args)
    )
    layouts = {
        "q": HeadLayout("query", 2, 4),
        "v": HeadLayout("value", 3, 4, first_row=20),
        "k": HeadLayout("key", 2, 6),
    }
    tensors = {name: torch.ones(layout.num_rows, 2) for name, layout in layouts.items()}
    all_head_statistics(tensors, tensors, layouts)
    assert calls == [5, 2]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_signed_score_is_the_derivative_with_respect_to_a_gate(dtype, tolerance):
    """The sum of p·g over a head's rows of B (and bias) equals dL/d(gate) at 1 for a gate on the head's delta."""
    torch.manual_seed(3)
    layout = HeadLayout("query", 4, 3)
    x, A, B, bias, W = (torch.randn(*s).to(dtype) for s in ((7, 5), (2, 5), (12, 2), (12,), (12, 5)))
    readout = torch.randn(12, dtype=torch.float64)
    B.requires_grad_()
    bias.requires_grad_()
    gate = torch.ones(4, dtype=dtype, requires_grad=True)
    delta = F.linear(F.linear(x, A), B, bias) * 0.5
    output = F.linear(x, W) + delta * gate.repeat_interleave(3)
    loss = ((output.double().tanh() @ readout) ** 2).mean()
    loss.backward()

    params = torch.cat([B.detach(), bias.detach()[:, None]], dim=1)
    grads = torch.cat([B.grad, bias.grad[:, None]], dim=1)
    score = head_scores("positive", {"q": layout}, statistics={"q": head_statistics(params, grads, layout)})["q"]
    assert score.abs().max() > 0.1
    error = (score - gate.grad.double()).abs().max() / gate.grad.double().abs().max()
    assert error < tolerance


def test_signed_score_equals_that_of_the_merged_rows():
    """Σ_B p·g = Σ_ΔW ΔW·dL/dΔW: the score does not depend on how the delta is factored."""
    torch.manual_seed(0)
    layout = HeadLayout("query", 3, 2)
    A, B = torch.randn(4, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    delta = B @ A
    delta.retain_grad()
    (delta.sin() * torch.randn(6, 5, dtype=torch.float64)).sum().backward()
    merged = layout.sum_rows(delta.detach() * delta.grad)
    factored = head_statistics(B.detach(), B.grad, layout)[STATISTICS.index("signed")]
    torch.testing.assert_close(factored, merged, rtol=1e-12, atol=1e-12)
