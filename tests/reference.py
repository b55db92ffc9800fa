"""Slow, obvious twins of what the library does fast; the tests hold it to them."""

import operator
from fractions import Fraction

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


_UNIT = 2**1074  # every finite float64 is a whole number of units of 2^-1074

# Bits of precision, and the exponent of the smallest positive number.
FLOAT_FORMATS = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149), "float64": (53, -1074)}


def rational_average(weights, members):
    """sum(a_i w_i) / sum(a_i) of finite floats over the rationals; members of shape (n, size), a list of Fractions."""
    a = [_units(weight) for weight in weights]
    columns = zip(*([_units(w) for w in member] for member in members), strict=True)
    return [Fraction(sum(map(operator.mul, a, column)), sum(a) * _UNIT) for column in columns]


def unit_in_the_last_place(exact, dtype):
    """The distance between neighbours of the dtype where `exact` is."""
    precision, least = FLOAT_FORMATS[dtype]
    if exact == 0:
        return Fraction(2) ** least
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()  # right, or one too many
    exponent -= abs(exact) < Fraction(2) ** exponent
    return Fraction(2) ** max(exponent - precision + 1, least)


def nearest(exact, dtype):
    """The number of the dtype next to `exact`, the even one of two; as a Python float, which holds all of them."""
    unit = unit_in_the_last_place(exact, dtype)
    return float(round(exact / unit) * unit)  # Fractions are rounded to even


def ulps(actual, exact, dtype):
    """The largest error among `actual` in units in the last place of the exact values."""
    pairs = zip(actual, exact, strict=True)
    return float(max(abs(Fraction(float(a)) - e) / unit_in_the_last_place(e, dtype) for a, e in pairs))


def _units(number):
    numerator, denominator = float(number).as_integer_ratio()
    return numerator * (_UNIT // denominator)
