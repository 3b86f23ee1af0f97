import itertools

import pytest
import torch

from peft_heads.heads.budget import Cut, check_speed, choose_cut, lost_scores, reachable_cuts


HEADS, NEURONS = (6, 5, 4, 3, 2, 1), tuple(range(32, 0, -1))


def speed(heads, neurons):
    return (40 + 6 * 30 + 32 * 10) / (40 + heads * 30 + neurons * 10)


def scores(seed, units, layers=3):
    return [torch.rand(units, generator=torch.Generator().manual_seed(10 * seed + i)) for i in range(layers)]


def test_what_is_lost_is_the_sum_of_the_lowest_scores_of_each_layer():
    layers = scores(0, 6)
    lost = lost_scores(layers)
    assert lost.shape == (7,) and lost.dtype == torch.float64
    for k in range(7):
        expected = sum(sorted(layer.double().tolist())[i] for layer in layers for i in range(k))
        assert lost[k].item() == pytest.approx(expected)


@pytest.mark.parametrize("target", [1.0, 1.5, 2.0, 4.0, 6.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_chosen_cut_loses_least_of_all_that_are_fast_enough(target, seed):
    by_heads, by_neurons = lost_scores(scores(seed, 6)), lost_scores(scores(seed + 5, 32))
    cut = choose_cut(target, speed, HEADS, NEURONS, by_heads, by_neurons)
    assert cut.speed == speed(cut.num_heads, cut.num_neurons) >= target
    best = min(
        (by_heads[6 - h] + by_neurons[32 - n]).item()
        for h, n in itertools.product(HEADS, NEURONS)
        if speed(h, n) >= target
    )
    assert (by_heads[6 - cut.num_heads] + by_neurons[32 - cut.num_neurons]).item() == best


def test_what_costs_more_goes_first():
    """Equal scores: a head saves three times what a neuron does."""
    equal = lost_scores([torch.ones(6)]), lost_scores([torch.ones(32)])
    assert choose_cut(1.2, speed, HEADS, NEURONS, *equal) == Cut(3, 32, pytest.approx(1.2))
    # heads that matter stay
    matter = lost_scores([torch.full((6,), 100.0)]), equal[1]
    assert choose_cut(1.2, speed, HEADS, NEURONS, *matter) == Cut(6, 23, pytest.approx(1.2))


def test_only_numbers_that_may_remain_are_chosen():
    equal = lost_scores([torch.ones(6)]), lost_scores([torch.ones(32)])
    assert choose_cut(1.3, speed, (6,), (32, 16), *equal) == Cut(6, 16, speed(6, 16))


def test_scores_that_are_not_finite():
    good, bad = lost_scores([torch.ones(6)]), lost_scores([torch.full((32,), torch.nan)])
    with pytest.raises(ValueError, match="gate scores of the neurons are not finite"):
        choose_cut(1.2, speed, HEADS, NEURONS, good, bad)


def test_the_error_lists_reachable_speeds():
    cuts = reachable_cuts(speed, HEADS, NEURONS)
    assert len(cuts) == 6 * 32 and cuts[0].speed == 1 and cuts[-1].speed == speed(1, 1) == 6.75
    check_speed(6.75, cuts)
    with pytest.raises(ValueError, match=r"target_speed=7 cannot be reached, at most 6.75;") as error:
        check_speed(7.0, cuts)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 8 and lines[-1] == "  6.75 x with heads=1, neurons=1"
    listed = {str(cut) for cut in cuts}
    assert all(line.strip() in listed for line in lines)
    with pytest.raises(ValueError, match="target_speed=9 cannot be reached"):
        choose_cut(9.0, speed, HEADS, NEURONS, lost_scores([torch.ones(6)]), lost_scores([torch.ones(32)]))


def test_the_error_says_why_units_stay():
    with pytest.raises(ValueError, match=r"at most 1.42 \(no fewer heads\)") as error:
        check_speed(2.0, reachable_cuts(speed, (6,), (32, 16)), "no fewer heads")
    assert str(error.value).splitlines()[1:] == ["  1.42 x with heads=6, neurons=16"]
    with pytest.raises(ValueError, match="cannot be reached, and no other can: nothing can go"):
        check_speed(2.0, reachable_cuts(speed, (6,), (32,)), "nothing can go")
