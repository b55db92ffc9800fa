"""The accumulators and the exact swap, on models whose weights the tests set themselves."""

import gc
import logging
import math
import signal

import numpy as np
import pytest
from reference import exact_average

from streaming_polyak import LINEAR, MEAN, Average, Exponential, NonFiniteError, Polynomial, SwapError

pytestmark = pytest.mark.tensorflow
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from streaming_polyak.training.accumulators import accumulator_dtype, view  # noqa: E402
from streaming_polyak.training.averages import Averages, variables_by_path  # noqa: E402

DTYPES = ["float16", "bfloat16", "float32", "float64"]
WEIGHTINGS = [MEAN, LINEAR, Polynomial(3), Exponential(decay=0.9), Exponential(alpha=2)]
SHAPES = [(), (0,), (1,), (3, 5), (300, 1000)]  # the last is more than two blocks


class Bag(keras.Model):
    """A model that is only its variables."""

    def __init__(self, values, dtype=None):
        super().__init__(name="bag")
        for name, value in values.items():
            self.add_weight(
                shape=np.shape(value), initializer=lambda *_, v=value, **__: v, dtype=dtype or value.dtype, name=name
            )
        self.built = True

    def call(self, x):
        return x


def bag(dtype="float32", seed=0, **more):
    rng = np.random.default_rng(seed)
    values = {f"w{i}": rng.normal(size=shape) for i, shape in enumerate(SHAPES)}
    return Bag({name: tf.cast(value, dtype) for name, value in values.items()} | more)


def scramble(model, rng):
    for v in model.variables:
        v.assign(tf.cast(rng.normal(size=v.shape) * 3, v.dtype))


def bits(model):
    return {v.path: v.numpy().tobytes() for v in model.variables}


def contents(averages, name):
    return averages._where[name].values(name)


def follow(averages, model, rng, unit, updates):
    """Changes the weights and updates the averages so many times; returns the weights, by path, of each time."""
    step, taken = tf.function(averages.step_update) if unit == "step" else None, []
    for k in range(updates):
        scramble(model, rng)
        taken.append({v.path: view(v).astype(np.float64) for v in model.variables})
        averages.update_epoch(k, k) if unit == "epoch" else step(tf.constant(k, tf.int64))
    return taken


def apply_step(averages, model, step):
    """What the compiled training step does after an optimizer update."""
    tf.function(averages.step_update)(tf.constant(step, tf.int64))


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_equal_numpy_average_of_all_members_for_every_weighting(unit, dtype):
    model, rng = bag(dtype), np.random.default_rng(1)
    averages = Averages(model, {str(w): Average(w, unit=unit) for w in WEIGHTINGS})
    members = follow(averages, model, rng, unit, 7)
    for weighting in WEIGHTINGS:
        name = str(weighting)
        assert averages.count(name) == 7
        for path, m in contents(averages, name).items():
            assert m.dtype == ("float64" if dtype == "float64" else "float32")
            tolerance = 1e-14 if dtype == "float64" else 3e-6  # seven roundings of values up to 15
            expected = exact_average(weighting, [member[path] for member in members])
            np.testing.assert_allclose(m, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_each_average_takes_its_own_members_in_one_call(unit):
    model, rng = bag(), np.random.default_rng(2)
    schedules = {
        "all": Average(MEAN, unit=unit),
        "late": Average(LINEAR, start=4, unit=unit),
        "thirds": Average(MEAN, start=1, every=3, unit=unit),
        "never": Average(MEAN, start=99, unit=unit),
    }
    averages = Averages(model, schedules)
    members = follow(averages, model, rng, unit, 8)
    assert {name: averages.count(name) for name in schedules} == {"all": 8, "late": 4, "thirds": 3, "never": 0}
    assert averages.begun() == ["all", "late", "thirds"]
    path = model.variables[3].path
    for name, taken in (("all", range(8)), ("late", range(4, 8)), ("thirds", (1, 4, 7))):
        expected = exact_average(schedules[name].weighting, [members[k][path] for k in taken])
        np.testing.assert_allclose(contents(averages, name)[path], expected, atol=3e-6)


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_weights_stay_constant_bit_for_bit(unit, dtype):
    model = bag(dtype)
    before = bits(model)
    averages = Averages(model, {str(w): Average(w, unit=unit) for w in WEIGHTINGS})
    step = tf.function(averages.step_update) if unit == "step" else None
    for k in range(5):
        averages.update_epoch(k, k) if unit == "epoch" else step(tf.constant(k, tf.int64))
    for weighting in WEIGHTINGS:
        with averages.swapped(str(weighting)):
            assert bits(model) == before


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_integers_booleans_and_seeds_take_the_newest_value_of_their_members(unit):
    integer = tf.constant([1, 2, 3], tf.int32)
    flag = tf.constant([True, False])
    model = bag(count=integer, flag=flag)
    model.seed_generator = keras.random.SeedGenerator(7)
    averages = Averages(model, {"mean": Average(MEAN, unit=unit), "first": Average(MEAN, every=100, unit=unit)})
    paths = list(contents(averages, "mean"))
    count, flags, seed = (
        next(p for p in paths if p.endswith(end)) for end in ("count", "flag", "seed_generator_state")
    )
    by_path = variables_by_path(model)
    for k in range(3):
        by_path[count].assign([k, 10 * k, 100 * k])
        by_path[flags].assign([bool(k % 2), True])
        model.seed_generator.next()
        averages.update_epoch(k, k) if unit == "epoch" else apply_step(averages, model, k)
    assert contents(averages, "mean")[count].tolist() == [2, 20, 200]
    assert contents(averages, "first")[count].tolist() == [0, 0, 0]
    assert contents(averages, "mean")[flags].tolist() == [False, True]
    assert contents(averages, "mean")[seed].tolist() == [7, 3]
    assert contents(averages, "first")[seed].tolist() == [7, 1]
    model.seed_generator.next()
    with averages.swapped("mean"):
        assert model.seed_generator.state.numpy().tolist() == [7, 3]
    assert model.seed_generator.state.numpy().tolist() == [7, 4]


def test_all_variables_are_averaged_batch_norm_statistics_and_frozen_layers_too():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    )
    model.layers[0].trainable = False
    averages = Averages(model, {"mean": Average(MEAN)})
    assert set(contents(averages, "mean")) == {v.path for v in model.variables}
    moving = model.layers[1].moving_mean
    moving.assign([1, 2, 3, 4])
    averages.update_epoch(0, 0)
    moving.assign([3, 4, 5, 6])
    averages.update_epoch(1, 1)
    assert contents(averages, "mean")[moving.path].tolist() == [2, 3, 4, 5]


def test_a_layer_used_twice_and_a_variable_shared_by_two_layers_are_averaged_once():
    shared = keras.layers.Dense(3, name="shared")

    class Tied(keras.layers.Layer):
        def __init__(self, of):
            super().__init__(name="tied")
            self.of = of

        def call(self, x):
            return x @ tf.transpose(self.of.kernel)

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Tied(shared)(shared(shared(inputs))))
    averages = Averages(model, {"mean": Average(MEAN)})
    assert list(contents(averages, "mean")) == ["shared/kernel", "shared/bias"]
    kernel = shared.kernel
    for k, value in enumerate((2.0, 4.0)):
        kernel.assign(tf.fill((3, 3), value))
        averages.update_epoch(k, k)
    with averages.swapped("mean"):
        assert (kernel.numpy() == 3.0).all()


def test_variables_are_matched_by_path_whatever_their_order():
    model = bag()
    averages = Averages(model, {"mean": Average(MEAN)})
    averages.update_epoch(0, 0)
    before = bits(model)
    averages._variables = dict(reversed(averages._variables.items()))
    scramble(model, np.random.default_rng(5))
    assert bits(model) != before
    with averages.swapped("mean"):
        assert bits(model) == before


def test_two_variables_of_one_path_are_refused_with_the_remedy():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__(name="twins")
            self.a, self.b = keras.layers.Dense(2, name="same"), keras.layers.Dense(2, name="same")

        def call(self, x):
            return self.b(self.a(x))

    model = Twins()
    model(keras.KerasTensor((None, 2)))
    with pytest.raises(ValueError, match=r"model 'twins' has two of path 'twins/same/kernel'.*a name of its own"):
        Averages(model, {"mean": Average(MEAN)})
    Averages(model, {})  # nothing to tell apart


def test_seed_generators_of_one_path_are_told_apart():
    model = Bag({"w": tf.constant([1.0])})
    model.first, model.second = keras.random.SeedGenerator(1, name="seeds"), keras.random.SeedGenerator(2, name="seeds")
    assert model.first.state.path == model.second.state.path
    averages = Averages(model, {"mean": Average(MEAN)})
    averages.update_epoch(0, 0)
    model.first.next()
    with averages.swapped("mean"):
        assert [g.state.numpy().tolist() for g in (model.first, model.second)] == [[1, 0], [2, 0]]
    assert model.first.state.numpy().tolist() == [1, 1]


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_finite_weights_so_large_that_their_difference_overflows_are_refused(unit, dtype):
    top = float(tf.as_dtype("float64" if dtype == "float64" else "float32").max)
    model = Bag({"w": tf.cast(tf.constant([-0.4 * top], tf.float64), dtype)})
    averages = Averages(model, {"mean": Average(MEAN, unit=unit)})
    averages.update_epoch(0, 0) if unit == "epoch" else apply_step(averages, model, 0)
    model.variables[0].assign(-model.variables[0])
    averages.update_epoch(1, 1) if unit == "epoch" else apply_step(averages, model, 1)
    assert contents(averages, "mean")["bag/w"] == [0.0]
    model.variables[0].assign(tf.cast(tf.constant([0.9 * top], tf.float64), dtype))
    if unit == "step":
        apply_step(averages, model, 2)
    with pytest.raises(NonFiniteError, match="beyond half the range"):
        averages.update_epoch(2, 2) if unit == "epoch" else averages.check_steps()
    assert contents(averages, "mean")["bag/w"] == [0.0]


def test_accumulators_take_their_memory_when_they_are_made():
    model = bag()
    averages = Averages(model, {"late": Average(MEAN, start=100)})
    assert all(np.array_equal(m, np.zeros_like(m)) for m in contents(averages, "late").values())


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_with_bfloat16_weights_and_decay_0999_the_average_moves(unit):
    model = Bag({"w": tf.constant([1.0], tf.bfloat16)})
    averages = Averages(model, {"ema": Average(Exponential(decay=0.999), unit=unit)})
    variable = model.variables[0]
    step = tf.function(averages.step_update) if unit == "step" else None
    for k in range(2000):
        if k == 1000:
            variable.assign([2.0])
        averages.update_epoch(k, k) if unit == "epoch" else step(tf.constant(k, tf.int64))
    d = 0.999
    expected = 2 - (d**1000 - d**2000) / (1 - d**2000)  # 1 on the older half, 2 on the newer one
    assert contents(averages, "ema")["bag/w"] == pytest.approx(expected, abs=1e-5)

    # the same recursion in the dtype of the weights, as others keep it, stays where it is
    frozen = tf.constant(1.0, tf.bfloat16)
    for _ in range(1000):
        frozen += tf.cast(0.001, tf.bfloat16) * (tf.constant(2.0, tf.bfloat16) - frozen)
    assert float(frozen) < 1.5


@pytest.mark.parametrize("jit_compile", [False, True])
def test_nothing_in_the_compiled_step_undoes_the_compensation(jit_compile):
    steps, decay = 20_000, 0.999
    rng = np.random.default_rng(4)
    members = (3 + rng.normal(size=(steps, 4))).astype(np.float32)
    model = Bag({"w": tf.zeros(4)})
    weightings = {"mean": MEAN, "linear": LINEAR, "exponential": Exponential(decay=decay)}
    kept = {name: Average(weighting, unit="step", compensated=True) for name, weighting in weightings.items()}
    averages = Averages(model, {**kept, "plain": Average(MEAN, unit="step")})

    @tf.function(autograph=False, jit_compile=jit_compile)
    def train(values):
        def step(k):
            model.variables[0].assign(values[k])
            averages.step_update(tf.cast(k, tf.int64))
            return (k + 1,)

        tf.while_loop(lambda k: k < steps, step, (0,))

    train(tf.constant(members))
    k = np.arange(1, steps + 1.0)
    raw = {"mean": np.ones(steps), "linear": k, "exponential": decay ** (steps - k)}
    off = {}
    for name in averages.begun():
        weights = raw.get(name, raw["mean"])
        exact = np.array([math.fsum(weights * column) for column in members.T.astype(float)]) / math.fsum(weights)
        (got,) = (value for path, value in contents(averages, name).items())
        off[name] = np.max(np.abs(got - exact) / np.spacing(np.float32(exact)))
    assert max(off[name] for name in kept) <= 1
    assert off["plain"] > 3


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_averages_of_several_precisions_go_side_by_side(unit, dtype):
    model, rng = bag(dtype, count=tf.constant(0)), np.random.default_rng(5)
    averages = Averages(
        model,
        {
            "plain": Average(MEAN, unit=unit),
            "wide": Average(LINEAR, unit=unit, dtype="float64"),
            "compensated": Average(LINEAR, unit=unit, compensated=True, start=2),
            "both": Average(MEAN, unit=unit, dtype="float64", compensated=True, every=2),
        },
    )
    members = follow(averages, model, rng, unit, 6)
    for name, taken, weighting, tolerance in (
        ("plain", range(6), MEAN, 3e-6),
        ("wide", range(6), LINEAR, 1e-14),
        ("compensated", range(2, 6), LINEAR, 1e-6),
        ("both", range(0, 6, 2), MEAN, 1e-14),
    ):
        for path, m in contents(averages, name).items():
            if "count" in path:
                assert m == members[list(taken)[-1]][path]
                continue
            expected = exact_average(weighting, [members[k][path] for k in taken])
            np.testing.assert_allclose(m, expected, rtol=0, atol=tolerance)
    for name in averages.begun():
        averages.adopt(name, 3)
        assert averages.count(name) == 3
        for path, m in contents(averages, name).items():
            np.testing.assert_array_equal(m.astype(np.float64), members[-1][path])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16", "float64"])
def test_accumulators_are_float32_or_wider_under_every_dtype_policy(policy):
    model = keras.Sequential([keras.Input((3,), dtype="float32"), keras.layers.Dense(2, dtype=policy)])
    averages = Averages(model, {"mean": Average(MEAN), "ema": Average(Exponential(decay=0.9), unit="step")})
    averages.update_epoch(0, 0)
    apply_step(averages, model, 0)
    for name in ("mean", "ema"):
        dtypes = {m.dtype.name for m in contents(averages, name).values()}
        assert dtypes == {"float64" if policy == "float64" else "float32"}
    assert accumulator_dtype(model.variables[0]).itemsize >= 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_ten_thousand_swaps_change_no_bit_of_weights_or_average(dtype):
    rng = np.random.default_rng(3)
    small, large = rng.normal(size=(2, 64)) * [[1e-4], [1e4]]
    model = Bag({"w": tf.cast(small, dtype)})
    averages = Averages(model, {"mean": Average(MEAN)})
    averages.update_epoch(0, 0)
    model.variables[0].assign(tf.cast(large, dtype))
    raw, average = bits(model), contents(averages, "mean")["bag/w"].tobytes()
    for _ in range(10_000):
        with averages.swapped("mean"):
            pass
    assert bits(model) == raw
    assert contents(averages, "mean")["bag/w"].tobytes() == average
    with averages.swapped("mean"):
        assert view(model.variables[0]).tobytes() == tf.cast(small, dtype).numpy().tobytes()


def test_negative_zeros_nans_and_infinities_of_raw_weights_survive_a_swap():
    model = Bag({"w": tf.constant([1.0, 2.0, 3.0, 4.0])})
    averages = Averages(model, {"mean": Average(MEAN)})
    averages.update_epoch(0, 0)
    odd = np.array([0x80000000, 0x7FC01234, 0xFF800000, 0x00000001], np.uint32).view(np.float32)
    model.variables[0].assign(odd)
    with averages.swapped("mean"):
        assert model.variables[0].numpy().tolist() == [1, 2, 3, 4]
    assert view(model.variables[0]).tobytes() == odd.tobytes()


def test_a_body_that_raises_or_changes_the_weights_gets_the_raw_weights_back():
    model = bag()
    averages = Averages(model, {"mean": Average(MEAN)})
    averages.update_epoch(0, 0)
    scramble(model, np.random.default_rng(4))
    raw, average = bits(model), {path: m.tobytes() for path, m in contents(averages, "mean").items()}

    def body():
        assert bits(model) != raw
        for v in model.variables:
            v.value.assign_add(tf.ones(v.shape, v.dtype))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), averages.swapped("mean"):
        body()
    assert bits(model) == raw
    assert {path: m.tobytes() for path, m in contents(averages, "mean").items()} == average
    with averages.swapped("mean"):
        assert averages.in_model == "mean"
    assert averages.in_model is None


def test_nested_swaps_and_updates_inside_one_are_refused():
    model = bag()
    averages = Averages(model, {"a": Average(MEAN), "b": Average(LINEAR)})
    averages.update_epoch(0, 0)
    raw = bits(model)
    with averages.swapped("a"):
        for name in ("a", "b"):
            with (
                pytest.raises(SwapError, match=f"the average 'a' is in it, so '{name}' cannot"),
                averages.swapped(name),
            ):
                pass
        with pytest.raises(SwapError, match="Expected the raw weights in the model, but the average 'a' is in it"):
            averages.update_epoch(1, 1)
    assert bits(model) == raw
    assert averages.count("a") == 1


def test_an_average_that_is_unknown_or_has_no_member_is_refused():
    averages = Averages(bag(), {"late": Average(MEAN, start=5)})
    with pytest.raises(ValueError, match=r"an average of \['late'\], got 'lat'"), averages.swapped("lat"):
        pass
    with pytest.raises(ValueError, match="'late' has none yet"), averages.swapped("late"):
        pass


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_weight_is_refused_as_a_whole_and_named(dtype, value, caplog):
    model = bag(dtype)
    averages = Averages(model, {"a": Average(MEAN), "b": Average(Exponential(decay=0.5))})
    averages.update_epoch(0, 0)
    before = {name: {p: m.tobytes() for p, m in contents(averages, name).items()} for name in "ab"}
    scramble(model, np.random.default_rng(6))
    bad = np.zeros((300, 1000))
    bad[299, 998] = value  # in the last tensor, so that all others come first
    model.variables[-1].assign(tf.cast(bad, dtype))
    with pytest.raises(
        NonFiniteError, match=r"tensor 'bag/w4' holds NaN or infinity after epoch 1 \(optimizer step 32\)"
    ):
        averages.update_epoch(1, 32)
    assert {name: averages.count(name) for name in "ab"} == {"a": 1, "b": 1}
    assert {name: {p: m.tobytes() for p, m in contents(averages, name).items()} for name in "ab"} == before

    averages._skip = True
    with caplog.at_level(logging.WARNING, "streaming_polyak"):
        averages.update_epoch(1, 32)
    assert "tensor 'bag/w4' holds NaN or infinity after epoch 1" in caplog.text
    assert {name: {p: m.tobytes() for p, m in contents(averages, name).items()} for name in "ab"} == before


def test_a_non_finite_weight_in_a_step_is_refused_as_a_whole_and_named_with_its_first_step():
    model = bag()
    averages = Averages(model, {"a": Average(MEAN, unit="step"), "b": Average(LINEAR, unit="step", every=2)})
    step = tf.function(averages.step_update)
    step(tf.constant(0, tf.int64))
    before = {name: {p: m.tobytes() for p, m in contents(averages, name).items()} for name in "ab"}
    averages.check_steps()
    scramble(model, np.random.default_rng(7))
    model.variables[3].assign(np.full((3, 5), np.nan))
    for k in (1, 2, 3):
        step(tf.constant(k, tf.int64))
    with pytest.raises(NonFiniteError, match="tensor 'bag/w3' holds NaN or infinity after optimizer step 1"):
        averages.check_steps()
    averages.check_steps()  # told once
    assert {name: averages.count(name) for name in "ab"} == {"a": 1, "b": 1}
    assert {name: {p: m.tobytes() for p, m in contents(averages, name).items()} for name in "ab"} == before


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_an_adopted_average_goes_on_from_its_count(unit):
    model = Bag({"w": tf.constant([4.0]), "i": tf.constant([5])})
    averages = Averages(model, {"mean": Average(MEAN, unit=unit), "other": Average(MEAN, unit=unit)})
    averages.update_epoch(0, 0) if unit == "epoch" else apply_step(averages, model, 0)
    model.variables[0].assign([10.0])
    averages.adopt("mean", 2)
    model.variables[0].assign([1.0])
    averages.update_epoch(1, 1) if unit == "epoch" else apply_step(averages, model, 1)
    assert contents(averages, "mean")["bag/w"] == pytest.approx([7.0])  # (10 + 10 + 1) / 3
    assert contents(averages, "other")["bag/w"] == pytest.approx([2.5])
    assert contents(averages, "mean")["bag/i"].tolist() == [5]


def test_an_update_reads_weights_where_they_are_and_leaves_no_reference_behind():
    model = bag()
    variable = model.variables[-1]
    first, second = view(variable), view(variable)
    assert np.shares_memory(first, second)
    del first, second
    averages = Averages(model, {"mean": Average(MEAN)})
    averages.update_epoch(0, 0)
    address = view(variable).ctypes.data
    gc.collect()
    variable.value.assign_add(tf.ones(variable.shape))  # in place, unless something holds the old value
    assert view(variable).ctypes.data == address


def test_an_update_is_finished_when_ctrl_c_arrives_meanwhile(monkeypatch):
    model = bag()
    averages = Averages(model, {"mean": Average(MEAN)})
    averages.update_epoch(0, 0)
    scramble(model, np.random.default_rng(8))
    real = averages._host.update

    def interrupted(epoch):
        signal.raise_signal(signal.SIGINT)
        return real(epoch)

    monkeypatch.setattr(averages._host, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        averages.update_epoch(1, 1)
    assert averages.count("mean") == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
