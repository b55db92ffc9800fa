"""Slow, obvious twins of what the library does fast; the tests hold it to them."""

import numpy as np


def running_average(weighting, members):
    """The recursion, one member at a time, in float64; returns the average after each member."""
    m = np.zeros_like(np.asarray(members[0], dtype=np.float64))
    averages = []
    for n, w in enumerate(members, start=1):
        m = m + weighting(n) * (np.asarray(w, dtype=np.float64) - m)
        averages.append(m)
    return averages


def effective_weights(weighting, n):
    """What the recursion gives each of n members in the end: c_k times all the later (1 - c_j)."""
    weights = []
    for k in range(1, n + 1):
        weight = weighting(k)
        for j in range(k + 1, n + 1):
            weight *= 1.0 - weighting(j)
        weights.append(weight)
    return np.array(weights)


def exact_average(weighting, members):
    """The average in closed form, by numpy.average over all members at once, in float64."""
    return np.average(np.asarray(members, dtype=np.float64), axis=0, weights=weighting.weights(len(members)))


def member_numbers(average, count):
    """The numbers 0 .. count-1 that an `Average` takes, by walking from `start` in strides of `every`."""
    return [k for k in range(count) if k in range(average.start, count, average.every)]
