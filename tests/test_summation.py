"""Averages of arrays within one unit in the last place of the exact ones, held to fractions."""

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nearest, rational_average, ulps

from streaming_polyak import LINEAR, MEAN, Exponential, Polynomial
from streaming_polyak.files.summation import TILE, NonFiniteInput, TileAverager, rounded

DTYPES = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}
RAW = {
    "mean": MEAN.raw_weights,
    "linear": LINEAR.raw_weights,
    "cubic": Polynomial(3).raw_weights,
    "exponential": Exponential(alpha=2).raw_weights,
    "explicit": lambda n: np.random.default_rng(n).uniform(0.1, 3.0, n),
}
MEASURED = 0.5 + 1e-9  # half a unit for the one rounding; summing in float64 was seen to add 4e-11


def average(raw, members, *, allow=False, tiles=None):
    """The average of arrays of one dtype, tile by tile; `tiles` are the first elements of the tiles, in any order."""
    members = [np.asarray(member) for member in members]
    dtype = members[0].dtype.name
    averager = TileAverager(np.asarray(raw, dtype=np.float64), allow)
    result = np.empty_like(members[0])
    for start in range(0, len(members[0]), TILE) if tiles is None else tiles:
        pieces = [member[start : start + TILE] for member in members]
        if dtype != "float64":
            pieces = [piece.astype(np.float32) for piece in pieces]
        tile = averager.average(dtype, len(pieces[0]), pieces.__getitem__, lambda i, lo, hi, p=pieces: p[i][lo:hi])
        result[start : start + TILE] = tile.view(result.dtype)
    return result


def error(raw, members):
    """The largest error of the average, in units in the last place."""
    return ulps(average(raw, members), rational_average(raw, members), np.asarray(members[0]).dtype.name)


def values(kind, dtype, n, size, rng):
    """Members of one kind, shape (n, size)."""
    kinds = {
        "normal": normal,
        "wide": wide,
        "cancelling": cancelling,
        "subnormal": subnormal,
        "zero": lambda dtype, n, size, rng: np.zeros((n, size), dtype),
        "opposite": opposite,
        "largest": largest,
        "ties": ties,
        "balanced": balanced,
        "sparse": sparse,
    }
    return kinds[kind](dtype, n, size, rng)


def normal(dtype, n, size, rng):
    return rng.normal(size=(n, size)).astype(dtype)


def wide(dtype, n, size, rng):
    """Of all magnitudes that the dtype has."""
    info = ml_dtypes.finfo(dtype)
    exponents = rng.integers(info.minexp, info.maxexp - 1, (n, size))
    return np.ldexp(rng.uniform(-1, 1, (n, size)), exponents).astype(dtype)


def cancelling(dtype, n, size, rng):
    """Large terms that nearly cancel over small ones."""
    small = rng.normal(size=(n, size)) * float(ml_dtypes.finfo(dtype).eps)
    large = rng.normal(size=(n, size)) * 1000
    large[1::2] = -large[: n // 2 * 2 : 2]
    return (large + small * 1000).astype(dtype)


def subnormal(dtype, n, size, rng):
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    return (rng.integers(-5, 6, (n, size)) * least).astype(dtype)


def opposite(dtype, n, size, rng):
    member = rng.normal(size=size).astype(dtype)
    return np.array([member if i % 2 else -member for i in range(n)])


def largest(dtype, n, size, rng):
    biggest = ml_dtypes.finfo(dtype).max
    return np.where(rng.random((n, size)) < 0.9, biggest, -biggest).astype(dtype)


def ties(dtype, n, size, rng):
    """Neighbours, whose mean is often half-way between two numbers of the dtype."""
    info = ml_dtypes.finfo(dtype)
    return (1 + rng.integers(0, 4, (n, size)) * float(info.eps)).astype(dtype)


def balanced(dtype, n, size, rng):
    """The last member nearly cancels the sum of the others, linearly weighted."""
    members = rng.normal(size=(n, size)).astype(dtype)
    if n > 1:
        sums = np.arange(1, n) @ members[:-1].astype(np.float64)
        members[-1] = (-sums / n * (1 + 2.0 ** -rng.integers(8, 40, size))).astype(dtype)
    return members


def sparse(dtype, n, size, rng):
    """Most elements are zero in all members, of either sign; one in ten cancels."""
    members = np.where(rng.random(size) < 0.8, rng.choice([0.0, -0.0], (n, size)), rng.normal(size=(n, size)))
    if n > 1:
        members[-1, ::10] = -members[0, ::10]
    return members.astype(dtype)


KINDS = ["normal", "wide", "cancelling", "subnormal", "zero", "opposite", "largest", "ties", "balanced", "sparse"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_half_a_unit_in_the_last_place_whatever_the_number_of_members_and_the_weights(kind, dtype):
    rng = np.random.default_rng(1)
    for n, size in ((1, 20), (2, 40), (3, 40), (10, 20), (100, 4), (1000, 1)):
        members = values(kind, DTYPES[dtype], n, size, rng)
        for name, raw in RAW.items():
            measured = error(raw(n), members)
            assert measured <= MEASURED, f"{name} average of {n}: {measured} units"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_a_sum_that_cancels_is_as_exact_at_any_degree_of_cancellation(dtype, times):
    rng = np.random.default_rng(2)
    raw = rng.uniform(0.5, 2.0, 5 + times)
    members = rng.normal(size=(5 + times, 60)).astype(DTYPES[dtype])
    for k in range(5, 5 + times):  # each of the last members cancels what is left by those before
        left = rational_average(raw[:k], members[:k])
        share = Fraction(float(raw[:k].sum())) / Fraction(float(raw[k]))
        members[k] = np.array([float(-share * x) for x in left]).astype(DTYPES[dtype])
    assert error(raw, members) <= 0.75  # what the quickest of the three ways may leave to be rounded is a quarter
    if times > 1 and dtype in ("float32", "float64"):
        plain = np.average(members.astype(np.float64), axis=0, weights=raw)
        assert ulps(plain.astype(dtype), rational_average(raw, members), dtype) > 1  # the obvious way is not enough


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_byte_floats_are_rounded_once_to_the_nearest_even_one(kind, dtype):
    rng = np.random.default_rng(3)
    for n in (1, 2, 5):
        members = values(kind, DTYPES[dtype], n, 60, rng)
        for raw in (MEAN.raw_weights(n), LINEAR.raw_weights(n)):
            wanted = [nearest(exact, dtype) for exact in rational_average(raw, members)]
            np.testing.assert_array_equal(average(raw, members).astype(np.float64), wanted)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_false_tie_of_float32_does_not_mislead_the_rounding(dtype, bits, sign):
    above = 2.0**-bits + 2.0**-40  # over half of the way from 1 to the next, by less than float32 sees
    below = 3 * 2.0**-bits - 2.0**-40  # short of half of the way from there to the one after it
    members = sign * np.array([[1.0], [2.0]]).astype(DTYPES[dtype])
    wanted = 1 + 2.0 ** (1 - bits)
    for part in (above, below):
        raw = [1 - part, part]
        exact = rational_average(raw, members)[0]
        assert nearest(exact, dtype) == sign * wanted
        assert float(np.float32(exact).astype(DTYPES[dtype])) != sign * wanted  # by way of float32 it is another one
        assert float(average(raw, members)[0]) == sign * wanted


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@given(value=st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, max_examples=200)
def test_every_float64_is_rounded_to_the_nearest_of_a_narrower_dtype(dtype, value):
    biggest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    value = max(-biggest, min(value, biggest))  # an average is never beyond its largest member
    given = np.array([value, -value, value * 2.0**-40, value * 2.0**-120])
    got = rounded(given, dtype).view(DTYPES[dtype]).astype(np.float64)
    np.testing.assert_array_equal(got, [nearest(Fraction(x), dtype) for x in given.tolist()])


def finite(dtype):
    """Any finite number of dtype; of two-byte ones by their bits, as too much of what is drawn would be left out."""
    if DTYPES[dtype].itemsize == 2:
        largest = int(np.array(ml_dtypes.finfo(DTYPES[dtype]).max).view(np.uint16))
        bits = st.integers(0, largest) | st.integers(0x8000, 0x8000 + largest)
        return bits.map(lambda drawn: float(np.uint16(drawn).view(DTYPES[dtype])))
    return st.floats(allow_nan=False, allow_infinity=False, width=8 * DTYPES[dtype].itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_finite_members_and_weights_have_an_average_within_a_unit_in_the_last_place(dtype, data):
    size, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    row = st.lists(finite(dtype), min_size=size, max_size=size)
    members = np.array(data.draw(st.lists(row, min_size=n, max_size=n))).astype(DTYPES[dtype])
    weight = st.one_of(st.just(1.0), st.floats(0, 10), st.floats(0, 1e307))
    raw = data.draw(st.lists(weight, min_size=n, max_size=n).filter(any))
    assert error(raw, members) <= 0.75


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("raw", [[1e300, 3e299], [3e-300, 1e-300], [5e-324, 1e-323], [1e300, 1e-320], [0.0, 1.0]])
def test_weights_of_any_size_neither_overflow_nor_vanish(dtype, raw):
    info = ml_dtypes.finfo(DTYPES[dtype])
    few = [float(x) for x in (info.max, -info.max, info.smallest_subnormal, info.smallest_normal, 1.0, 0.0)]
    members = np.array([(a, b) for a in few for b in few]).T.astype(DTYPES[dtype])
    assert error(raw, members) <= MEASURED


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RAW)
def test_the_average_of_equal_members_is_the_member_itself(dtype, name):
    member = wide(DTYPES[dtype], 1, 300, np.random.default_rng(4))[0]
    assert average(RAW[name](7), [member] * 7).tobytes() == member.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_how_tiles_are_dealt_out(dtype):
    rng = np.random.default_rng(5)
    members = rng.normal(size=(3, 3 * TILE + 17)).astype(DTYPES[dtype])
    members[2, ::5] = -(members[0, ::5] + members[1, ::5])  # elements that are summed in the slower ways
    raw = RAW["explicit"](3)
    starts = list(range(0, members.shape[1], TILE))
    whole = average(raw, members)
    assert average(raw, members, tiles=starts[::-1]).tobytes() == whole.tobytes()
    parts = [members[:, start : start + TILE] for start in starts]
    with ThreadPoolExecutor(2) as pool:
        apart = list(pool.map(lambda part: average(raw, part), parts))
    assert np.concatenate(apart).tobytes() == whole.tobytes()
    again = average(raw, members, tiles=[0])  # a tile by itself, nothing before it
    assert again[:TILE].tobytes() == whole[:TILE].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_the_number_of_the_member(dtype, value):
    members = np.ones((4, 9)).astype(DTYPES[dtype])
    members[2, 7] = value
    with pytest.raises(NonFiniteInput) as refused:
        average(np.ones(4), members)
    assert refused.value.args == (2,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 40])
def test_nan_and_infinity_that_are_allowed_spoil_their_own_elements_only(dtype, n):
    members = balanced(DTYPES[dtype], n, 50, np.random.default_rng(6))
    expected = rational_average(np.arange(1.0, n + 1), members)
    members[0, 0], members[1, 1], members[2, 2] = np.nan, np.inf, -np.inf
    members[0, 3], members[2, 3] = np.inf, -np.inf
    got = average(np.arange(1.0, n + 1), members, allow=True)
    np.testing.assert_array_equal(got[:4].astype(np.float64), [np.nan, np.inf, -np.inf, np.nan])
    assert ulps(got[4:], expected[4:], dtype) <= 0.75


def test_infinity_with_the_weight_zero_is_nan_as_in_ieee_arithmetic():
    members = np.array([[np.inf, 1.0], [2.0, 2.0]], np.float32)
    np.testing.assert_array_equal(average([0.0, 1.0], members, allow=True), [np.nan, 2.0])


def test_nan_is_written_as_the_usual_nan_of_bfloat16():
    nans = np.array([0xFFFF_FFFF_FFFF_FFFF, 0x7FF8_0000_0000_0001, 0x7FF8_0000_0000_0000], np.uint64).view(np.float64)
    np.testing.assert_array_equal(rounded(nans, "bfloat16"), [0x7FC0] * 3)


def test_the_slow_twin_rounds_as_numpy_and_ml_dtypes_do():
    rng = np.random.default_rng(7)
    given = np.concatenate([rng.normal(size=200), rng.normal(size=50) * 2.0**-24, rng.normal(size=50) * 2.0**-130])
    for dtype in ("float16", "float32"):
        np.testing.assert_array_equal([nearest(Fraction(x), dtype) for x in given.tolist()], given.astype(dtype))
    single = given.astype(np.float32)
    wanted = single.astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal([nearest(Fraction(x), "bfloat16") for x in single.tolist()], wanted)
