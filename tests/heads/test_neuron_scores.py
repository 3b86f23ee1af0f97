"""The criteria of neurons."""

import pytest
import torch

from peft_heads.heads.neuron_scores import NEURON_CRITERIA, neuron_scores, neurons_need_gates


NUMBERS = {"a.fc1": 3, "b.fc1": 2}
GATES = {name: torch.randn(3, n, generator=torch.Generator().manual_seed(n)) for name, n in NUMBERS.items()}
NORMS = {name: torch.rand(n, generator=torch.Generator().manual_seed(n)) for name, n in NUMBERS.items()}


def test_each_criterion():
    scores = {c: neuron_scores(c, NUMBERS, gates=GATES, weight_norms=NORMS, seed=1) for c in NEURON_CRITERIA}
    for name, number in NUMBERS.items():
        for row, criterion in enumerate(("gate", "gate_signed", "gate_squared")):
            assert torch.equal(scores[criterion][name], GATES[name][row].double())
        assert torch.equal(scores["most_responsive"][name], -GATES[name][0].double())
        assert torch.equal(scores["weight_norm"][name], NORMS[name].double())
        assert scores["front"][name].tolist() == list(range(number))
    assert {s.dtype for by_name in scores.values() for s in by_name.values()} == {torch.float64}


def test_random_depends_on_the_seed_alone():
    torch.manual_seed(5)
    one = neuron_scores("random", NUMBERS, seed=1)
    torch.manual_seed(6)
    same, other = (neuron_scores("random", NUMBERS, seed=seed) for seed in (1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in NUMBERS)
    assert one["a.fc1"].tolist()[:2] != one["b.fc1"].tolist()


def test_which_need_gates():
    assert [c for c in NEURON_CRITERIA if neurons_need_gates(c)] == [
        "gate",
        "gate_signed",
        "gate_squared",
        "most_responsive",
    ]


@pytest.mark.parametrize(
    ("criterion", "given", "message"),
    [
        ("absolute", {}, "neuron_criterion must be one of gate, .*most_responsive; got 'absolute'"),
        ("gate", {}, "'gate' needs the gates of the neurons, and they were not gathered"),
        ("most_responsive", {}, "'most_responsive' needs the gates"),
        ("weight_norm", {}, "'weight_norm' needs the norms of the rows"),
        (
            "gate",
            {"gates": {n: g / 0 for n, g in GATES.items()}},
            "the gate scores of the neurons of a.fc1 are not all",
        ),
    ],
)
def test_errors(criterion, given, message):
    with pytest.raises(ValueError, match=message):
        neuron_scores(criterion, NUMBERS, **given)
