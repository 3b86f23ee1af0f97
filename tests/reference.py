"""The scores and the selection written as plainly as possible, number by number, for comparison."""

import itertools
import math
import statistics


def scores(criterion, params, grads_per_step, num_heads):
    """Return the scores of one projection.

    params: list over steps of rows of floats (out, r), before each step; grads_per_step: the same for gradients.
    """
    out = len(params[0])
    head_dim = out // num_heads
    result = []
    for head in range(num_heads):
        total = 0.0
        for p_step, g_step in zip(params, grads_per_step, strict=True):
            taylor = 0.0
            squares = 0.0
            for row in range(head * head_dim, (head + 1) * head_dim):
                for p, g in zip(p_step[row], g_step[row], strict=True):
                    if criterion == "absolute":
                        taylor += abs(g * p)
                    elif criterion == "positive":
                        taylor += g * p
                    elif criterion == "negative":
                        taylor += -g * p
                    squares += g * g
            total += math.sqrt(squares) if criterion == "grad_norm" else taylor
        result.append(total / len(params))
    return result


def weight_norms(params, num_heads):
    head_dim = len(params) // num_heads
    return [
        math.sqrt(sum(p * p for row in params[h * head_dim : (h + 1) * head_dim] for p in row))
        for h in range(num_heads)
    ]


def deactivated(scores_by_projection, *, ne, granularity, joint):
    """Return `{projection: set of deactivated heads}` from `{(layer, part): scores}`."""
    result = {}
    for (layer, part), own in scores_by_projection.items():
        total = [0.0] * len(own)
        for (other_layer, other_part), scores_ in scores_by_projection.items():
            same_place = len(scores_) == len(own) if granularity == "global" else other_layer == layer
            if same_place and (joint or other_part == part):
                total = [a + b for a, b in zip(total, scores_, strict=True)]
        ranked = sorted(range(len(own)), key=lambda head: (total[head], head))
        result[layer, part] = set(ranked[:ne]) if ne < len(own) else set()
    return result


def code_book(bits):
    """Return the codes, from the standard library's normal distribution."""
    normal = statistics.NormalDist()
    codes = [0.0] * 2**bits
    for _ in range(500):
        mass = [0.0, *(normal.cdf((a + b) / 2) for a, b in itertools.pairwise(codes)), 1.0]
        codes = [normal.inv_cdf((a + b) / 2) for a, b in itertools.pairwise(mass)]
    return codes


def quantized(rows, bits, kept=None):
    """Quantise a matrix, rows of floats, with the statistics of the rows that are kept; the others become 0."""
    kept = kept or [True] * len(rows)
    entries = [x for row, keep in zip(rows, kept, strict=True) if keep for x in row]
    mean, std = statistics.fmean(entries), statistics.stdev(entries)
    codes = code_book(bits)
    return [
        [min(codes, key=lambda c: abs((x - mean) / (std + 1e-5) - c)) * std + mean if keep else 0.0 for x in row]
        for row, keep in zip(rows, kept, strict=True)
    ]


def packed(codes, bits):
    """Return the bytes of the codes; the first code has the lowest bits."""
    digits = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    digits += "0" * (-len(digits) % 8)
    return [int(digits[i : i + 8][::-1], 2) for i in range(0, len(digits), 8)]
