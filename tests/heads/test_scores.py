import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_heads.heads.criterion_registry import CRITERIA, register_criterion
from peft_heads.heads.layout import HeadLayout
from peft_heads.heads.scores import head_scores
from peft_heads.heads.taylor import all_head_statistics, head_statistics


def mean_statistics(params, grads, layout):
    return torch.stack([head_statistics(p, g, layout) for p, g in zip(params, grads, strict=True)]).mean(0)


@settings(deadline=None)
@given(
    num_heads=st.integers(1, 6),
    head_dim=st.integers(1, 4),
    rank=st.integers(1, 4),
    steps=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_against_the_reference(num_heads, head_dim, rank, steps, seed):
    layout = HeadLayout("query", num_heads, head_dim)
    generator = torch.Generator().manual_seed(seed)
    params, grads = torch.randn(2, steps, num_heads * head_dim, rank, generator=generator)
    statistics = {"q": mean_statistics(params, grads, layout)}
    for criterion in ("absolute", "positive", "negative", "grad_norm"):
        actual = head_scores(criterion, {"q": layout}, statistics=statistics)["q"]
        expected = reference.scores(criterion, params.tolist(), grads.tolist(), num_heads)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
    actual = head_scores("weight_norm", {"q": layout}, params={"q": params[-1]})["q"]
    expected = reference.weight_norms(params[-1].tolist(), num_heads)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_random_is_seeded_and_ignores_global_state():
    layouts = {name: HeadLayout("query", 12, 1) for name in "ab"}
    torch.manual_seed(1)
    first = head_scores("random", layouts, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first["a"], head_scores("random", layouts, seed=5)["a"])
    assert not torch.equal(first["a"], head_scores("random", layouts, seed=6)["a"])
    assert not torch.equal(first["a"], first["b"])


def test_front():
    assert head_scores("front", {"q": HeadLayout("query", 3, 1)})["q"].tolist() == [0, 1, 2]


def test_most_responsive_is_the_reverse_of_absolute():
    layouts = {"q": HeadLayout("query", 3, 1)}
    statistics = {"q": torch.tensor([[3.0, 1.0, 2.0], [-1.0, 5.0, 0.0], [0.0, 7.0, 1.0]])}
    assert head_scores("absolute", layouts, statistics=statistics)["q"].tolist() == [3, 1, 2]
    assert head_scores("most_responsive", layouts, statistics=statistics)["q"].tolist() == [-3, -1, -2]


def test_errors():
    layouts = {"q": HeadLayout("query", 2, 1)}
    with pytest.raises(ValueError, match=r"criterion must be one of absolute, .*got 'best'"):
        head_scores("best", layouts)
    broken = {"q": torch.tensor([[1.0, float("nan")]] * 3, dtype=torch.float64)}
    needing = {name for name, criterion in CRITERIA.items() if criterion.needs_gradients}
    assert needing == set(CRITERIA) - {"weight_norm", "random", "front"}
    for criterion in needing:
        with pytest.raises(ValueError, match=f"{criterion}' needs the statistics of training steps"):
            head_scores(criterion, layouts)
        with pytest.raises(ValueError, match="of q are not finite"):
            head_scores(criterion, layouts, statistics=broken, gates=broken)
        if CRITERIA[criterion].needs_gates:
            with pytest.raises(ValueError, match=f"{criterion}' needs the gates of the heads' outputs"):
                head_scores(criterion, layouts, statistics=broken)


# criteria of others


def test_a_registered_criterion_is_given_all_statistics_by_name(forget_criteria):
    layouts = {"q": HeadLayout("query", 3, 2), "v": HeadLayout("value", 2, 3)}
    params, grads = (
        {name: torch.randn(6, 4, dtype=torch.float64) for name in layouts},
        {name: torch.randn(6, 4, dtype=torch.float64) for name in layouts},
    )
    statistics = all_head_statistics(params, grads, layouts)
    seen = []
    register_criterion("mine", lambda heads: seen.append(heads) or 2 * heads.signed + heads.weight_norm)
    gates = {name: torch.randn(3, layout.num_heads, dtype=torch.float64) for name, layout in layouts.items()}
    scores = head_scores("mine", layouts, statistics=statistics, params=params, seed=5, gates=gates)

    random = head_scores("random", layouts, seed=5)
    norms = head_scores("weight_norm", layouts, params=params)
    assert len(seen) == 2
    for heads, (name, layout) in zip(seen, layouts.items(), strict=True):
        assert heads.num_heads == layout.num_heads
        given = (*statistics[name], norms[name], random[name], *gates[name])
        for found, expected in zip(vars(heads).values(), given, strict=True):
            assert torch.equal(found, expected) and found.dtype == torch.float64
        assert torch.equal(scores[name], 2 * statistics[name][1] + norms[name])
        with pytest.raises(AttributeError):
            heads.signed = None


def test_what_was_not_gathered_is_none(forget_criteria):
    seen = []
    register_criterion("mine", lambda heads: seen.append(heads) or heads.random, needs_gradients=False)
    head_scores("mine", {"q": HeadLayout("query", 3, 1)})
    (heads,) = seen
    assert (heads.absolute, heads.signed, heads.grad_norm, heads.weight_norm) == (None,) * 4
    assert (heads.gate, heads.gate_signed, heads.gate_squared) == (None,) * 3


@pytest.mark.parametrize("row", range(3))
def test_scores_by_gates(row):
    """Whatever the statistics of training steps are."""
    layouts = {"q": HeadLayout("query", 3, 1)}
    gates = {"q": torch.tensor([[3.0, 1.0, 2.0], [-1.0, 5.0, 0.0], [0.0, 7.0, 1.0]])}
    name = ("gate", "gate_signed", "gate_squared")[row]
    scores = head_scores(name, layouts, statistics={"q": torch.ones(3, 3)}, gates=gates)
    assert torch.equal(scores["q"], gates["q"][row].double())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda heads: heads.absolute.sum(), r"of shape \(2,\) for q; it returned torch.float64 of shape \(\)"),
        (lambda heads: heads.absolute[None], r"criterion 'mine' must return .*of shape \(1, 2\)"),
        (lambda heads: heads.absolute.tolist(), "it returned a list"),
        (lambda heads: heads.absolute + 1j, "it returned torch.complex128"),
        (lambda heads: heads.absolute / 0, r"the mine scores of q are not finite: \[inf, inf\]"),
    ],
)
def test_what_a_criterion_must_return(forget_criteria, function, message):
    register_criterion("mine", function)
    with pytest.raises(ValueError, match=message):
        head_scores("mine", {"q": HeadLayout("query", 2, 1)}, statistics={"q": torch.ones(3, 2)})


def test_scores_may_be_whole_numbers(forget_criteria):
    register_criterion("mine", lambda heads: heads.absolute.argsort())
    (scores,) = head_scores("mine", {"q": HeadLayout("query", 2, 1)}, statistics={"q": torch.ones(3, 2)}).values()
    assert scores.dtype == torch.float64 and scores.tolist() == [0, 1]
