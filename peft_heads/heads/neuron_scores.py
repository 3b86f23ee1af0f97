"""One score per neuron of an MLP, by the criteria of neurons; the lowest are switched off."""

from __future__ import annotations

import torch

from .gates import GATE_STATISTICS
from .neurons import NEURON_CRITERIA


# `most_responsive` switches off the neurons that `gate` would keep longest.
_OF_GATES = (*GATE_STATISTICS, "most_responsive")


def neurons_need_gates(criterion: str) -> bool:
    """Whether a criterion of neurons reads what gates gather.

    Raises:
        ValueError: There is no such criterion of neurons.
    """
    if criterion not in NEURON_CRITERIA:
        raise ValueError(f"neuron_criterion must be one of {', '.join(NEURON_CRITERIA)}; got {criterion!r}")
    return criterion in _OF_GATES


def neuron_scores(
    criterion: str,
    num_neurons: dict[str, int],
    *,
    gates: dict[str, torch.Tensor] | None = None,
    weight_norms: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """One score per neuron of every MLP; the lowest are switched off.

    Args:
        criterion: One of `NEURON_CRITERIA`.
        num_neurons: `{name of the MLP's first layer: number of neurons}`.
        gates: `{name: (3, num_neurons)}`, the mean of `gate_statistics` over images; criteria that need gates need it.
        weight_norms: `{name: (num_neurons,)}`, L2 norms of the rows of the MLP's first layer; `weight_norm` needs it.
        seed: Seed of the criterion `random`: the same numbers on every machine and process.

    Returns:
        `{name: float64 (num_neurons,)}` on the CPU.

    Raises:
        ValueError: Unknown criterion, one that needs what is not given, or scores that are not finite.

    Example:
        >>> neuron_scores("gate_signed", {"mlp.fc1": 2}, gates={"mlp.fc1": torch.tensor([[1, 2], [1, -2], [1, 4]])})
        {'mlp.fc1': tensor([ 1., -2.], dtype=torch.float64)}
    """
    if neurons_need_gates(criterion) and not gates:
        raise ValueError(f"neuron criterion {criterion!r} needs the gates of the neurons, and they were not gathered")
    if criterion == "weight_norm" and weight_norms is None:
        raise ValueError("neuron criterion 'weight_norm' needs the norms of the rows, and they are not given")
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, number in num_neurons.items():
        if criterion == "random":
            scores[name] = torch.rand(number, generator=generator, dtype=torch.float64)
        elif criterion == "front":
            scores[name] = torch.arange(number, dtype=torch.float64)
        elif criterion == "weight_norm":
            scores[name] = weight_norms[name].double().cpu()
        else:
            row = GATE_STATISTICS.index("gate" if criterion == "most_responsive" else criterion)
            scores[name] = gates[name][row].double().cpu() * (-1 if criterion == "most_responsive" else 1)
        if not torch.isfinite(scores[name]).all():
            raise ValueError(f"the {criterion} scores of the neurons of {name} are not all finite")
    return scores
