"""Weightings against closed forms, the recursion and numpy.average. A new weighting is one more row of WEIGHTINGS."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from reference import effective_weights, exact_average, running_average

from streaming_polyak import LINEAR, MEAN, Exponential, Polynomial, Weighting, parse_weighting

# weighting, its text, and c_n as written in the papers
WEIGHTINGS = [
    (MEAN, "mean", lambda n: 1 / n),
    (LINEAR, "linear", lambda n: 2 / (n + 1)),
    (Polynomial(3), "polynomial:3.0", lambda n: 4 / (n + 3)),
    (Polynomial(0.5), "polynomial:0.5", lambda n: 1.5 / (n + 0.5)),
    (Polynomial(40), "polynomial:40.0", lambda n: 41 / (n + 40)),
    (Exponential(decay=0.999), "exponential:decay=0.999", lambda n: 0.001 / (1 - 0.999**n)),
    (Exponential(decay=0.1), "exponential:decay=0.1", lambda n: 0.9 / (1 - 0.1**n)),
    (Exponential(alpha=2), "exponential:alpha=2.0", lambda n: (1 - math.exp(-0.5)) / (1 - math.exp(-n / 2))),
    (Exponential(half_life=10), "exponential:half_life=10.0", lambda n: (1 - 2**-0.1) / (1 - 2 ** (-n / 10))),
]
each_weighting = pytest.mark.parametrize(
    ("weighting", "text", "closed_form"), WEIGHTINGS, ids=[text for _, text, _ in WEIGHTINGS]
)

any_weighting = st.one_of(
    st.floats(0, 100).map(Polynomial),
    st.floats(1e-6, 1 - 1e-9).map(lambda d: Exponential(decay=d)),
    st.floats(0.05, 1e6).map(lambda a: Exponential(alpha=a)),
    st.floats(0.05, 1e6).map(lambda h: Exponential(half_life=h)),
)


@each_weighting
def test_coefficients_are_those_of_the_papers(weighting, text, closed_form):
    for n in (1, 2, 3, 10, 1000):
        assert weighting(n) == pytest.approx(closed_form(n), rel=1e-12)


@given(any_weighting)
def test_the_first_coefficient_is_exactly_one(weighting):
    assert weighting(1) == 1.0
    assert weighting(np.array([1]))[0] == 1.0


@given(any_weighting, st.integers(1, 10**9))
def test_coefficients_are_positive_and_at_most_one(weighting, n):
    assert 0 < weighting(n) <= 1


@given(any_weighting, st.integers(1, 60))
def test_the_recursion_gives_members_the_weights_of_the_closed_form(weighting, n):
    np.testing.assert_allclose(effective_weights(weighting, n), weighting.weights(n), rtol=0, atol=1e-12)


@given(any_weighting, st.integers(1, 3000))
def test_weights_sum_to_one(weighting, n):
    weights = weighting.weights(n)
    assert weights.shape == (n,)
    assert weights.dtype == np.float64
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


finite = st.floats(-1e6, 1e6)


@given(any_weighting, npst.arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=finite))
def test_streaming_equals_numpy_average_with_the_weights(weighting, members):
    # 30 roundings of float64 values up to 1e6
    np.testing.assert_allclose(
        running_average(weighting, members)[-1], exact_average(weighting, members), rtol=1e-11, atol=1e-8
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(any_weighting, st.integers(1, 50), st.floats(-(2.0**100), 2.0**100, width=32))
def test_a_constant_sequence_stays_constant_bit_for_bit(dtype, weighting, n, value):
    w, m = np.array([value], dtype), np.zeros(1, dtype)
    for k in range(1, n + 1):
        m += np.dtype(dtype).type(weighting(k)) * (w - m)
        assert m == w


@given(any_weighting, npst.arrays(np.float32, 12, elements=st.floats(-1000, 1000, width=16)), st.integers(-20, 20))
def test_scaling_the_input_by_a_power_of_two_scales_the_result_exactly(weighting, members, power):
    def stream(values):
        m, path = np.float32(0), []
        for n, w in enumerate(values, start=1):
            m += np.float32(weighting(n)) * (w - m)
            path.append(m)
        return np.array(path)

    plain = stream(members)
    # Not so for numbers that scaling moves among the subnormal ones, which have fewer digits.
    assume(np.abs(plain[plain != 0]).min(initial=1.0) >= 2.0**-90)
    np.testing.assert_array_equal(stream(members * np.float32(2.0**power)), plain * np.float32(2.0**power))


@pytest.mark.parametrize("n", [1, 2, 10, 500])
def test_linear_weights_are_the_tutorials_i_over_n(n):
    newest_first = np.array([i / n for i in range(n, 0, -1)])
    np.testing.assert_allclose(LINEAR.weights(n)[::-1], newest_first / newest_first.sum(), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 10, 500])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 30.0])
def test_exponential_weights_are_the_tutorials_exp_of_minus_i_over_alpha(n, alpha):
    newest_first = np.array([math.exp(-i / alpha) for i in range(1, n + 1)])
    np.testing.assert_allclose(
        Exponential(alpha=alpha).weights(n)[::-1], newest_first / newest_first.sum(), rtol=1e-12, atol=1e-300
    )


def test_decay_alpha_and_half_life_are_three_ways_to_say_one_thing():
    assert Exponential(alpha=2) == Exponential(decay=math.exp(-0.5))
    assert Exponential(half_life=1) == Exponential(decay=0.5)
    assert hash(Exponential(half_life=1)) == hash(Exponential(decay=0.5))
    assert Exponential(decay=0.5) != Exponential(decay=0.6)
    assert Exponential(decay=0.5) != MEAN


def test_one_minus_decay_stays_exact_for_decays_near_one():
    # 1 - d = 1e-9, of which a float64 decay alone knows seven digits
    assert Exponential(alpha=1e9)(10**12) == pytest.approx(1e-9, rel=1e-8)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float32", "float64"])
@each_weighting
def test_arrays_of_any_dtype_give_float64(weighting, text, closed_form, dtype):
    n = np.array([[1, 2], [100, 127]], dtype)
    c = weighting(n)
    assert c.dtype == np.float64
    assert c.shape == (2, 2)
    assert [[weighting(int(k)) for k in row] for row in n] == c.tolist()


@pytest.mark.tensorflow
@each_weighting
def test_tensors_give_float64_in_and_out_of_graphs(weighting, text, closed_form):
    import tensorflow as tf

    ones = weighting(tf.constant([1, 1], tf.int64))
    assert ones.dtype == tf.float64
    assert ones.numpy().tolist() == [1.0, 1.0]
    for compile_with_xla in (False, True):
        compiled = tf.function(weighting.__call__, jit_compile=compile_with_xla)
        variable = tf.Variable(7, dtype=tf.int32)
        assert float(compiled(variable)) == pytest.approx(weighting(7), rel=1e-14)


@each_weighting
def test_text_and_json_make_an_equal_weighting(weighting, text, closed_form):
    assert str(weighting) == text
    assert parse_weighting(str(weighting)) == weighting
    assert Weighting.from_json(json.loads(json.dumps(weighting.to_json()))) == weighting
    assert eval(repr(weighting)) == weighting
    assert {weighting: 1}[parse_weighting(text)] == 1


@given(any_weighting)
def test_every_weighting_survives_text_and_json(weighting):
    for again in (parse_weighting(str(weighting)), Weighting.from_json(json.loads(json.dumps(weighting.to_json())))):
        assert again == weighting
        assert again(17) == weighting(17)


@pytest.mark.parametrize(
    "text", ["", "median", "mean:2", "polynomial", "polynomial:x", "exponential", "exponential:beta=2", "exponential:2"]
)
def test_a_text_that_is_no_weighting_is_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match=r'"mean", "linear", "polynomial:POWER", "exponential:decay=D"'):
        parse_weighting(text)


@pytest.mark.parametrize(
    "text", ["polynomial:-1", "polynomial:inf", "polynomial:nan", "exponential:decay=1", "exponential:alpha=-2"]
)
def test_a_number_out_of_range_is_named_with_what_is_allowed(text):
    with pytest.raises(ValueError, match=r'Expected .* got .*In the weighting .*allowed are "mean"'):
        parse_weighting(text)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, math.nan, math.inf])
def test_a_decay_outside_zero_and_one_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay inside \(0, 1\), got decay="):
        Exponential(decay=decay)


@pytest.mark.parametrize("said", [{"alpha": 0}, {"alpha": 1e300}, {"alpha": 1e-300}, {"half_life": -1}])
def test_an_alpha_or_half_life_without_a_decay_is_refused(said):
    with pytest.raises(ValueError, match=r"gives a decay inside \(0, 1\)"):
        Exponential(**said)


@pytest.mark.parametrize("said", [{}, {"decay": 0.9, "alpha": 2}, {"decay": 0.9, "alpha": 2, "half_life": 3}])
def test_a_decay_must_be_said_in_exactly_one_way(said):
    with pytest.raises(ValueError, match="exactly one of decay, alpha and half_life"):
        Exponential(**said)


def test_a_power_must_be_a_finite_number_from_zero_on():
    with pytest.raises(ValueError, match="finite power >= 0, got power=-1"):
        Polynomial(-1)
    with pytest.raises(TypeError, match="power as a number"):
        Polynomial("2")


@pytest.mark.parametrize("form", [{}, {"kind": "median"}, {"kind": "polynomial"}, {"kind": "polynomial", "decay": 1}])
def test_json_that_is_no_weighting_is_refused(form):
    with pytest.raises(ValueError, match=r'Expected \{"kind": "polynomial"'):
        Weighting.from_json(form)


@pytest.mark.parametrize("n", [0, -1, 1.5])
def test_numbers_of_members_start_at_one(n):
    with pytest.raises(ValueError, match=r"whole numbers? from 1 on"):
        MEAN(n)
    with pytest.raises(ValueError, match="whole number from 1 on"):
        MEAN.weights(n)


def test_what_is_no_number_of_members_is_refused():
    for n in ("a", True, None):
        with pytest.raises(TypeError, match="number of members as whole numbers, got n="):
            MEAN(n)


def test_weightings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MEAN.power = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Exponential(decay=0.5).decay = 0.6
