"""The training loop against a slow eager loop, against plain Keras, and on every kind of model and data."""

import csv
import logging
import math

import numpy as np
import pytest
from reference import exact_average

from streaming_polyak import LINEAR, MEAN, Average, Exponential, Members, NonFiniteError, SwapError, Trainer

pytestmark = pytest.mark.tensorflow
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from models import bits, data, mlp, state, weights  # noqa: E402

from streaming_polyak.training.data import epoch_order  # noqa: E402

X, Y = data()
VALIDATION = data(50, seed=1)


def eager_epochs(model, x, y, *, seed, epochs, batch_size):
    """The obvious loop: one batch after the other, eagerly; returns losses and all weights after each epoch."""
    losses, members = [], []
    for epoch in range(epochs):
        order = epoch_order(seed, epoch, len(x))
        total = 0.0
        for first in range(0, len(x), batch_size):
            rows = order[first : first + batch_size]
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x=x[rows], y=y[rows], y_pred=model(x[rows], training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            total += float(loss) * len(rows)
        losses.append(total / len(x))
        members.append(weights(model))
    return losses, members


@pytest.mark.parametrize(
    "optimizer", [lambda: keras.optimizers.SGD(0.1, momentum=0.9), lambda: keras.optimizers.Adam(0.01)]
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_run_equals_a_slow_eager_loop(optimizer, batch_norm):
    slow = mlp(optimizer(), batch_norm=batch_norm, kind="functional")
    losses, members = eager_epochs(slow, X, Y, seed=3, epochs=4, batch_size=16)
    model = mlp(optimizer(), batch_norm=batch_norm)
    trainer = Trainer(model, {"mean": Average(MEAN), "late": Average(LINEAR, start=2)}, seed=3)
    history = trainer.fit(X, Y, batch_size=16, epochs=4)
    np.testing.assert_allclose(history.history["loss"], losses, rtol=2e-5)  # float32 sums in another order
    np.testing.assert_allclose(weights(model), members[-1], rtol=1e-4, atol=2e-5)
    assert np.abs(members[-1] - members[-2]).max() > 1e-3  # there was something to get wrong
    for name, weighting, first in (("mean", MEAN, 0), ("late", LINEAR, 2)):
        with trainer.averaged(name):
            np.testing.assert_allclose(weights(model), exact_average(weighting, members[first:]), rtol=1e-4, atol=2e-5)


def test_step_averages_equal_the_average_over_the_steps_of_an_eager_loop():
    slow, steps = mlp(kind="functional"), []
    for epoch in range(3):
        order = epoch_order(0, epoch, len(X))
        for first in range(0, len(X), 16):
            rows = order[first : first + 16]
            with tf.GradientTape() as tape:
                loss = slow.compute_loss(x=X[rows], y=Y[rows], y_pred=slow(X[rows], training=True))
            slow.optimizer.apply_gradients(
                zip(tape.gradient(loss, slow.trainable_variables), slow.trainable_variables, strict=True)
            )
            steps.append(weights(slow))
    model = mlp()
    schedules = {
        "all": Average(MEAN, unit="step"),
        "some": Average(Exponential(decay=0.8), start=3, every=4, unit="step"),
    }
    trainer = Trainer(model, schedules)
    trainer.fit(X, Y, batch_size=16, epochs=3)
    assert len(steps) == 15
    for name, taken in (("all", steps), ("some", steps[3::4])):
        assert trainer.count(name) == len(taken)
        with trainer.averaged(name):
            expected = exact_average(schedules[name].weighting, taken)
            np.testing.assert_allclose(weights(model), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
def test_two_runs_with_one_seed_agree_bit_for_bit_with_dropout_on(kind):
    def run(seed):
        model = mlp(dropout=0.3, batch_norm=True, kind=kind)
        averages = {"mean": Average(MEAN), "ema": Average(Exponential(decay=0.9), unit="step")}
        trainer = Trainer(model, averages, seed=seed)
        history = trainer.fit(X, Y, batch_size=16, epochs=3, validation_data=VALIDATION)
        with trainer.averaged("mean"):
            average = [v.numpy().tobytes() for v in model.variables]
        return history.history, [v.numpy().tobytes() for v in model.variables], average

    first, second, other = run(5), run(5), run(6)
    assert first == second
    assert first[1] != other[1]


def test_the_order_of_samples_is_a_pure_function_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(seed, epoch, 50).tolist() for seed in range(3) for epoch in range(20)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 60
    keras.utils.set_random_seed(1)
    assert all(epoch_order(seed, epoch, 50).tolist() == order for (seed, epoch), order in orders.items())


class Recorder(keras.layers.Layer):
    """Remembers which samples it saw, by their first feature, in a variable."""

    def build(self, shape):
        self.seen = self.add_weight(shape=(1000,), initializer="zeros", trainable=False, name="seen")
        self.count = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False, name="count")

    def call(self, x, training=None):
        if training:
            rows = tf.shape(x)[0]
            index = self.count + tf.range(rows)
            self.seen.assign(tf.tensor_scatter_nd_update(self.seen.value, index[:, None], x[:, 0]))
            self.count.assign_add(rows)
        return x


def recorded(fit, **compiled):
    """Trains a model of one Recorder and one Dense with `fit(trainer)`; returns the samples it saw, in order."""
    keras.utils.set_random_seed(1)
    recorder = Recorder()
    model = keras.Sequential([keras.Input((1,)), recorder, keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(1e-6), loss="mse", **compiled)
    fit(Trainer(model, seed=4))
    return recorder.seen.numpy()[: int(recorder.count.value)].astype(int).tolist()


NUMBERS = np.arange(23, dtype=np.float32)[:, None]


def test_each_sample_is_seen_once_an_epoch_in_the_order_of_seed_and_epoch():
    seen = recorded(lambda t: t.fit(NUMBERS, NUMBERS, batch_size=5, epochs=3))
    assert seen == [int(i) for epoch in range(3) for i in epoch_order(4, epoch, 23)]
    assert seen[:23] != seen[23:46]  # Keras' own fit repeats one permutation after set_random_seed

    later = recorded(lambda t: t.fit(NUMBERS, NUMBERS, batch_size=5, epochs=3, initial_epoch=2))
    assert later == seen[46:]
    plain = recorded(lambda t: t.fit(NUMBERS, NUMBERS, batch_size=5, epochs=2, shuffle=False))
    assert plain == [*range(23), *range(23)]
    part = recorded(lambda t: t.fit(NUMBERS, NUMBERS, batch_size=5, epochs=2, steps_per_epoch=2))
    assert part == [*seen[:10], *seen[23:33]]


def test_gathering_in_chunks_changes_nothing(monkeypatch):
    from streaming_polyak.training import data as module

    whole = recorded(lambda t: t.fit(NUMBERS, NUMBERS, batch_size=5, epochs=2))
    monkeypatch.setattr(module, "CHUNK_BYTES", 80)  # two batches of five rows of two float32
    assert recorded(lambda t: t.fit(NUMBERS, NUMBERS, batch_size=5, epochs=2)) == whole


def dataset(rows=23, batch_size=5):
    return tf.data.Dataset.from_tensor_slices((NUMBERS[:rows], NUMBERS[:rows])).batch(batch_size)


@pytest.mark.parametrize("unknown", [False, True])
def test_a_dataset_is_passed_over_whole_in_its_own_order(unknown):
    source = dataset().filter(lambda x, y: True) if unknown else dataset()
    assert recorded(lambda t: t.fit(source, epochs=2)) == [*range(23), *range(23)]


def test_with_steps_per_epoch_a_dataset_is_read_on_and_from_its_beginning_when_it_runs_out():
    seen = recorded(lambda t: t.fit(dataset(), epochs=3, steps_per_epoch=3))
    assert seen == [*range(15), *range(15, 23), *range(5), *range(5, 20)]
    assert recorded(lambda t: t.fit(dataset().repeat(), epochs=3, steps_per_epoch=3)) == seen


class Numbers(keras.utils.PyDataset):
    def __init__(self, **options):
        super().__init__(**options)
        self.ended = 0

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return NUMBERS[5 * i : 5 * i + 5], NUMBERS[5 * i : 5 * i + 5]

    def on_epoch_end(self):
        self.ended += 1


def test_batches_of_a_pydataset_come_in_the_order_of_seed_and_epoch():
    source = Numbers(workers=2)
    seen = recorded(lambda t: t.fit(source, epochs=2))
    batches = [list(range(23))[5 * i : 5 * i + 5] for epoch in range(2) for i in epoch_order(4, epoch, 5)]
    assert seen == [number for batch in batches for number in batch]
    assert source.ended == 2
    assert recorded(lambda t: t.fit(Numbers(), shuffle=False, steps_per_epoch=2)) == list(range(10))


def test_the_last_smaller_batch_counts_with_its_size():
    model = mlp(keras.optimizers.SGD(0.0), kind="functional")
    history = Trainer(model).fit(X, Y, batch_size=64, epochs=1, validation_data=(X, Y))  # 64 and 6 rows
    expected = model.evaluate(X, Y, batch_size=70, verbose=0, return_dict=True)
    assert history.history["loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    assert history.history["val_loss"][0] == pytest.approx(expected["loss"], rel=1e-5)
    assert history.history["accuracy"][0] == pytest.approx(expected["accuracy"], rel=1e-6)


def test_nothing_is_traced_again_from_epoch_to_epoch():
    trainer = Trainer(mlp(), {"mean": Average(MEAN)})
    traced = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: traced.append((trainer._train_loop.traces, trainer._evaluation_loop.traces))
    )
    trainer.fit(X, Y, batch_size=16, epochs=5, validation_data=VALIDATION, callbacks=count)
    trainer.fit(X[:37], Y[:37], batch_size=16, epochs=6, initial_epoch=5, validation_data=VALIDATION, callbacks=count)
    trainer.fit(dataset := tf.data.Dataset.from_tensor_slices((X, Y)).batch(16), epochs=2)
    trainer.fit(dataset, epochs=4, initial_epoch=2)
    assert traced == [(1, 1)] * 6
    assert trainer._train_loop.traces == 2


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}])
def test_xla_and_eager_runs_agree_with_the_compiled_one(options):
    expected = mlp()
    Trainer(expected).fit(X, Y, batch_size=16, epochs=2)
    model = mlp(**options)
    trainer = Trainer(model, {"ema": Average(MEAN, unit="step"), "mean": Average(MEAN)})
    trainer.fit(X, Y, batch_size=16, epochs=2)
    np.testing.assert_allclose(weights(model), weights(expected), rtol=1e-4, atol=1e-5)
    assert (trainer.count("ema"), trainer.count("mean")) == (10, 2)


def test_history_has_a_value_an_epoch_for_raw_weights_and_every_average():
    averages = {"mean": Average(MEAN), "late": Average(LINEAR, start=2)}
    history = Trainer(mlp(), averages).fit(X, Y, epochs=4, validation_data=VALIDATION).history
    assert list(history) == [
        "loss", "accuracy", "val_loss", "val_accuracy",
        "val_loss[mean]", "val_accuracy[mean]", "val_loss[late]", "val_accuracy[late]",
    ]  # fmt: skip
    assert {len(values) for values in history.values()} == {4}
    assert [math.isnan(value) for value in history["val_loss[late]"]] == [True, True, False, False]
    assert not any(math.isnan(value) for name, values in history.items() if "late" not in name for value in values)
    assert history["val_loss[mean]"][0] == history["val_loss"][0]  # an average of one member
    assert history["val_loss[mean]"][1] != history["val_loss"][1]


def test_validation_equals_keras_own_evaluation_of_raw_weights_and_average():
    model = mlp(dropout=0.2, batch_norm=True)
    trainer = Trainer(model, {"mean": Average(MEAN)})
    history = trainer.fit(X, Y, epochs=3, validation_data=VALIDATION).history
    raw = model.evaluate(*VALIDATION, verbose=0, return_dict=True)
    assert trainer.evaluate(*VALIDATION) == pytest.approx(raw, rel=1e-6)
    with trainer.averaged("mean"):
        averaged = model.evaluate(*VALIDATION, verbose=0, return_dict=True)
    assert averaged != raw
    assert trainer.evaluate(*VALIDATION, average="mean") == pytest.approx(averaged, rel=1e-6)
    for name in ("loss", "accuracy"):
        assert history[f"val_{name}"][-1] == pytest.approx(raw[name], rel=1e-6)
        assert history[f"val_{name}[mean]"][-1] == pytest.approx(averaged[name], rel=1e-6)


def test_validation_leaves_the_training_state_untouched_to_the_bit():
    class Noisy(keras.layers.Layer):
        """Draws and counts at inference too."""

        def __init__(self):
            super().__init__()
            self.seed_generator = keras.random.SeedGenerator(1)

        def build(self, shape):
            self.calls = self.add_weight(shape=(), initializer="zeros", dtype="int32", trainable=False, name="calls")

        def call(self, x):
            self.calls.assign_add(1)
            return x + 0.01 * keras.random.normal(tf.shape(x), seed=self.seed_generator)

    def run(validation):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([Noisy(), keras.layers.BatchNormalization(), keras.layers.Dense(3)])
        model.compile(optimizer="adam", loss="mse")
        trainer = Trainer(model, {"mean": Average(MEAN), "ema": Average(MEAN, unit="step")})
        trainer.fit(X, Y, epochs=3, validation_data=validation)
        before = list(state(model).values())
        trainer.evaluate(*VALIDATION)
        trainer.evaluate(*VALIDATION, average="mean")
        assert list(state(model).values()) == before
        return before

    assert run(VALIDATION) == run(None)


def test_validation_freq_leaves_nan_in_between():
    trainer = Trainer(mlp(), {"mean": Average(MEAN)})
    history = trainer.fit(X, Y, epochs=4, validation_data=VALIDATION, validation_freq=2).history
    for name in ("val_loss", "val_loss[mean]"):
        assert [math.isnan(value) for value in history[name]] == [True, False, True, False]
    history = trainer.fit(X, Y, epochs=4, validation_data=VALIDATION, validation_freq=[1, 4]).history
    assert [math.isnan(value) for value in history["val_loss"]] == [False, True, True, False]


def test_history_is_written_as_csv(tmp_path):
    trainer = Trainer(mlp(), {"mean": Average(MEAN, start=6)})
    history = trainer.fit(X, Y, epochs=7, initial_epoch=5, validation_data=VALIDATION)
    history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["5", "6"]
    for name, values in history.history.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values, nan_ok=True, abs=0)


def test_dicts_tuples_several_outputs_loss_weights_and_sample_weights_train_as_in_keras():
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(40, 3)), "b": rng.normal(size=(40, 2))}  # float64: Keras takes it as float32
    y = {"p": rng.normal(size=(40, 1)), "q": rng.integers(0, 3, 40)}
    sample_weight = {"p": rng.uniform(size=40), "q": rng.uniform(size=40)}

    def build():
        keras.utils.set_random_seed(0)
        inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
        h = keras.layers.Dense(5, activation="relu", kernel_regularizer="l2")(
            keras.layers.Concatenate()([inputs["a"], inputs["b"]])
        )
        outputs = {"p": keras.layers.Dense(1, name="p")(h), "q": keras.layers.Dense(3, name="q")(h)}
        model = keras.Model(inputs, outputs)
        model.compile(
            optimizer=keras.optimizers.SGD(0.05),
            loss={"p": "mse", "q": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
            loss_weights={"p": 0.3, "q": 2.0},
            metrics={"p": ["mae"], "q": ["accuracy"]},
        )
        return model

    plain, ours = build(), build()
    expected = plain.fit(x, y, sample_weight=sample_weight, batch_size=40, epochs=3, verbose=0).history
    history = Trainer(ours).fit(x, y, sample_weight=sample_weight, batch_size=40, epochs=3).history
    np.testing.assert_allclose(weights(ours), weights(plain), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    for name in ("p_mae", "q_accuracy"):
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-5)


def test_add_loss_terms_are_trained():
    class Penalty(keras.layers.Layer):
        def call(self, x):
            self.add_loss(3.0 * tf.reduce_mean(tf.square(x)))
            return x

    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Dense(4), Penalty(), keras.layers.Dense(3)])
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
        return model

    plain, ours = build(), build()
    plain.fit(X, Y, batch_size=70, epochs=3, verbose=0)
    Trainer(ours).fit(X, Y, batch_size=70, epochs=3)
    np.testing.assert_allclose(weights(ours), weights(plain), rtol=1e-4, atol=1e-6)


class Means(keras.layers.Layer):
    """The mean of each row, however long."""

    def call(self, x):
        return tf.reduce_mean(x, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_ragged_and_sparse_data_train_as_in_keras(kind):
    rows = [[1.0, 2.0], [3.0], [4.0, -5.0, 6.0], [1.0]] * 4
    x = tf.ragged.constant(rows) if kind == "ragged" else tf.sparse.from_dense(np.eye(16, dtype=np.float32))
    data = tf.data.Dataset.from_tensor_slices((x, np.arange(16, dtype=np.float32)[:, None])).batch(4)
    trained = []
    for own in (True, False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([*([Means()] if kind == "ragged" else []), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.01), "mse", metrics=["mae"], jit_compile=False)
        if own:
            history = Trainer(model, {"mean": Average(MEAN)}).fit(data, epochs=3, progress=False).history
        else:
            history = model.fit(data, epochs=3, shuffle=False, verbose=0).history
        trained.append((model.get_weights(), history["loss"], history["mae"]))
    for ours, theirs in zip(*trained, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5)


def test_memory_mapped_arrays_and_tuples_of_inputs_work(tmp_path):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], keras.layers.Dense(3)(keras.layers.Add()([a, b])))
    model.compile(optimizer="sgd", loss="mse")
    history = Trainer(model).fit([mapped, X], Y, epochs=2)
    assert history.history["loss"][1] < history.history["loss"][0]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_dtype_policies_train_and_average(policy):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Dense(8, activation="relu", dtype=policy),
            keras.layers.Dense(3, activation="softmax", dtype="float32"),
        ]
    )
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="categorical_crossentropy")
    trainer = Trainer(model, {"mean": Average(MEAN), "ema": Average(Exponential(decay=0.9), unit="step")})
    history = trainer.fit(X, Y, epochs=5, validation_data=VALIDATION).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["val_loss[ema]"][-1] < history["val_loss[ema]"][0]
    raw = bits(model.variables)
    with trainer.averaged("mean"):
        assert bits(model.variables) != raw
    assert bits(model.variables) == raw


def test_with_gradient_accumulation_step_averages_move_on_real_updates_only():
    model = mlp(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    trainer = Trainer(model, {"all": Average(MEAN, unit="step"), "some": Average(MEAN, start=1, every=2, unit="step")})
    trainer.fit(X, Y, batch_size=7, epochs=2)  # 20 batches
    assert int(model.optimizer.iterations) == 5
    assert trainer.count("all") == 5
    assert trainer.count("some") == 2  # updates 1 and 3


def test_steps_skipped_by_loss_scaling_do_not_move_step_averages():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-4), initial_scale=2.0**120)
    model.compile(optimizer=scaled, loss="mse")
    trainer = Trainer(model, {"mean": Average(MEAN, unit="step")})
    x = X * 30  # gradients overflow until the scale has been halved often enough
    trainer.fit(x, Y, batch_size=7, epochs=1)
    made = int(scaled.inner_optimizer.iterations)
    assert 0 < made < 10
    assert trainer.count("mean") == made


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_weight_that_becomes_nan_stops_training_and_leaves_the_averages_as_they_were(unit):
    x = X.copy()
    trainer = Trainer(mlp(), {"mean": Average(MEAN, unit=unit)})
    trainer.fit(X, Y, batch_size=35, epochs=2)
    with trainer.averaged("mean"):
        before = bits(trainer.model.variables)
    x[:] = np.nan
    where = r"after epoch 2 \(optimizer step 5\)" if unit == "epoch" else "after optimizer step 4"
    with pytest.raises(NonFiniteError, match=rf"tensor '.*hidden/kernel' holds NaN or infinity {where}"):
        trainer.fit(x, Y, batch_size=35, epochs=3, initial_epoch=2)
    with trainer.averaged("mean"):
        assert bits(trainer.model.variables) == before


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_by_option_updates_with_nan_are_skipped_and_logged(unit, caplog):
    trainer = Trainer(mlp(), {"mean": Average(MEAN, unit=unit)}, on_nonfinite="skip")
    with caplog.at_level(logging.WARNING, "streaming_polyak"):
        trainer.fit(X * np.nan, Y, batch_size=35, epochs=2)
    assert "hidden/kernel" in caplog.text
    assert "Updates skipped" in caplog.text
    assert trainer.count("mean") == 0


def test_averages_go_on_over_several_fits_and_a_new_compile():
    model = mlp()
    trainer = Trainer(model, {"mean": Average(MEAN)})
    trainer.fit(X, Y, epochs=2)
    model.compile(optimizer=keras.optimizers.Adam(), loss="mse", metrics=["mae"])
    history = trainer.fit(X, Y, epochs=3)
    assert list(history.history) == ["loss", "mae"]
    assert trainer.count("mean") == 5


def test_a_model_that_got_other_variables_is_refused_by_name():
    model = mlp()
    trainer = Trainer(model, {"mean": Average(MEAN)})
    trainer.fit(X, Y)
    model.add(keras.layers.Dense(3, name="added"))
    model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=r"the variables it had .* new, gone or others: .*added/kernel.*new Trainer"):
        trainer.fit(X, Y)


def test_models_written_for_an_older_keras_train_as_in_keras():
    class Old(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x, training):
            return self.dense(x) + (0.0 if training else 1.0)

        def compute_loss(self, x, y, y_pred, sample_weight):
            return tf.reduce_mean(tf.square(y - y_pred)) * 3.0

    def build():
        keras.utils.set_random_seed(0)
        model = Old()
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
        return model

    plain, ours = build(), build()
    plain.fit(X, Y, batch_size=70, epochs=2, verbose=0)
    Trainer(ours).fit(X, Y, batch_size=70, epochs=2, validation_data=VALIDATION)
    np.testing.assert_allclose(weights(ours), weights(plain), rtol=1e-5, atol=1e-7)


def test_a_metric_with_several_results_is_logged_under_each():
    class Both(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="both")
            self.total = self.add_weight(name="total", initializer="zeros")

        def update_state(self, y_true, y_pred, sample_weight=None):
            self.total.assign_add(tf.reduce_sum(y_true))

        def result(self):
            return {"one": self.total * 1.0, "two": self.total * 2.0}

    history = Trainer(mlp(metrics=[Both()])).fit(X, Y, validation_data=VALIDATION).history
    assert (history["one"], history["two"], history["val_two"]) == ([70.0], [140.0], [100.0])


def test_a_model_of_several_outputs_is_not_traced_again_by_a_second_fit():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(3)(inputs)])
    model.compile(optimizer="sgd", loss=["mse", "mse"])
    trainer = Trainer(model)
    trainer.fit(X, (Y[:, :1], Y))
    loop = trainer._train_loop
    trainer.fit(X, (Y[:, :1], Y))
    assert trainer._train_loop is loop
    assert loop.traces == 1


def test_the_history_of_a_run_that_failed_is_kept():
    class Fail(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise OSError("no more")

    trainer = Trainer(mlp())
    with pytest.raises(OSError, match="no more"):
        trainer.fit(X, Y, epochs=5, callbacks=Fail())
    assert trainer.history.epoch == [0, 1]
    assert len(trainer.history.history["loss"]) == 2


def test_fit_inside_averaged_is_refused():
    trainer = Trainer(mlp(), {"mean": Average(MEAN)})
    trainer.fit(X, Y)
    before = bits(trainer.model.variables)
    with trainer.averaged("mean"), pytest.raises(SwapError, match=r"the average 'mean' is in it\. Call fit outside"):
        trainer.fit(X, Y)
    with trainer.averaged("mean"), pytest.raises(SwapError, match="so 'mean' cannot be put there"):
        trainer.evaluate(X, Y, average="mean")
    assert bits(trainer.model.variables) == before
    assert trainer.count("mean") == 1


def test_models_it_cannot_train_are_refused_with_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match=r"is not\. Call model\.compile"):
        Trainer(keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(TypeError, match=r"Expected a keras\.Model, got str"):
        Trainer("model")

    class Own(keras.Model):
        def train_step(self, data):
            return {}

    own = Own()
    own.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=r"Own overrides train_step.*compute_loss"):
        Trainer(own)

    class OwnTest(keras.Sequential):
        def test_step(self, data):
            return {"foo": 42}

    own = OwnTest([keras.layers.Dense(1)])
    own.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=r"OwnTest overrides test_step"):
        Trainer(own)
    frozen = mlp(kind="functional")
    frozen.trainable = False
    frozen.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match="trainable weights"):
        Trainer(frozen).fit(X, Y)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"got the backend 'jax'.*KERAS_BACKEND=tensorflow"):
        Trainer(mlp())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed as an int >= 0, got seed=-1"),
        ({"members": "folder"}, TypeError, r"members as Members\(folder, start=...\), got 'folder'"),
        ({"on_nonfinite": "ignore"}, ValueError, 'on_nonfinite="raise" or "skip"'),
        ({"averages": {"mean": MEAN}}, TypeError, r"Wrap a weighting: Average\(MEAN\)"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Trainer(mlp(), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X, "y": Y[:5]}, ValueError, r"same number of rows, at least one, got lengths \[70, 5\]"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, r"at least one, got lengths \[0, 0\]"),
        ({"x": (i for i in range(3))}, TypeError, "as arrays .* got generator"),
        ({"x": 3, "y": 4}, TypeError, "as arrays .* got int"),
        (
            {"x": X},
            ValueError,
            "Expected targets y, as 'sequential.*' is compiled with loss='categorical_crossentropy'",
        ),
        ({"x": X, "sample_weight": Y}, ValueError, "y together with sample_weight"),
        ({"x": X, "y": Y, "batch_size": 0}, ValueError, "batch_size as a whole number >= 1, got batch_size=0"),
        ({"x": X, "y": Y, "epochs": 0}, ValueError, "initial_epoch < epochs, got initial_epoch=0, epochs=0"),
        ({"x": X, "y": Y, "steps_per_epoch": 4}, ValueError, "steps_per_epoch <= 3, the batches of 32 in 70 rows"),
        ({"x": X, "y": Y, "validation_freq": 0, "validation_data": (X, Y)}, ValueError, "validation_freq >= 1"),
    ],
)
def test_wrong_data_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Trainer(mlp()).fit(**arguments)


def test_datasets_that_do_not_fit_are_refused():
    trainer = Trainer(mlp())
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)
    with pytest.raises(
        ValueError, match=r"Expected x alone, as a tf\.data\.Dataset brings its own batches; got y, batch_size"
    ):
        trainer.fit(batches, Y, batch_size=32)
    with pytest.raises(ValueError, match=r"steps_per_epoch with a data set that never ends"):
        trainer.fit(batches.repeat())
    for empty in (batches.take(0), batches.filter(lambda x, y: False)):
        with pytest.raises(ValueError, match="at least one batch, got an empty one"):
            trainer.fit(empty)
    with pytest.raises(ValueError, match=r"shorten the data set with take\(n\)"):
        trainer.fit(batches, validation_data=batches.repeat())
    with pytest.raises(ValueError, match="PyDataset with at least 6 batches"):
        trainer.fit(Numbers(), steps_per_epoch=6)


def test_without_a_fit_there_is_no_average():
    trainer = Trainer(mlp(), {"mean": Average(MEAN)})
    assert trainer.count("mean") == 0
    with pytest.raises(ValueError, match="Call fit first"):
        trainer.averaged("mean")


# Exports and members


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
@pytest.mark.parametrize("average", ["mean", None])
@pytest.mark.parametrize("kind", ["sequential", "functional", "subclassed"])
def test_an_export_is_loaded_by_keras_alone_and_predicts_the_same(suffix, average, kind, tmp_path):
    model = mlp(batch_norm=True, dropout=0.2, kind=kind)
    trainer = Trainer(model, {"mean": Average(MEAN)})
    trainer.fit(X, Y, epochs=3)
    path = trainer.export(tmp_path / f"out{suffix}", average=average)
    assert list(tmp_path.iterdir()) == [path]
    raw = model.predict(X, verbose=0)
    with trainer.averaged("mean"):
        averaged = model.predict(X, verbose=0)
    assert np.abs(raw - averaged).max() > 1e-4
    if suffix == ".weights.h5" or (kind, suffix) == ("subclassed", ".h5"):  # HDF5 holds no code of subclasses
        loaded = mlp(batch_norm=True, dropout=0.2, kind=kind, seed=9, uncompiled=True)
        loaded.predict(X, verbose=0)
        loaded.load_weights(path)
    else:
        loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), averaged if average else raw)


def test_bfloat16_in_the_legacy_format_is_refused_with_the_remedy(tmp_path):
    model = keras.Sequential([keras.layers.Dense(3, dtype="bfloat16")])
    model.compile(optimizer="sgd", loss="mse")
    trainer = Trainer(model, {"mean": Average(MEAN)})
    trainer.fit(X, Y)
    with pytest.raises(ValueError, match=r"can hold bfloat16, got '.*out\.h5'.*use \.keras or \.weights\.h5"):
        trainer.export(tmp_path / "out.h5", "mean")
    path = trainer.export(tmp_path / "out.keras", "mean")
    np.testing.assert_array_equal(
        keras.models.load_model(path).get_weights()[0].astype(np.float32),
        tf.cast(trainer._state._where["mean"].values("mean")[model.variables[0].path], "bfloat16").numpy().astype("f"),
    )


def test_an_export_replaces_a_file_unless_told_not_to(tmp_path):
    trainer = Trainer(mlp(), {"mean": Average(MEAN)})
    trainer.fit(X, Y)
    path = tmp_path / "out.keras"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match=r"out\.keras exists already"):
        trainer.export(path, "mean", overwrite=False)
    assert path.read_bytes() == b"old"
    trainer.export(path, "mean")
    keras.models.load_model(path)
    with pytest.raises(ValueError, match=r"ends in \.keras, \.weights\.h5, \.h5; got '.*out\.npz'"):
        trainer.export(tmp_path / "out.npz")
    with pytest.raises(ValueError, match=r"an average of \['mean'\], got 'men'"):
        trainer.export(tmp_path / "other.keras", "men")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
def test_members_are_the_weights_after_the_chosen_epochs(suffix, tmp_path):
    model = mlp(kind="functional")
    seen = {}
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.update({epoch: weights(model)}))
    trainer = Trainer(model, members=Members(tmp_path, start=1, every=2, suffix=suffix))
    trainer.fit(X, Y, epochs=6, callbacks=watch)
    assert trainer.member_paths == [tmp_path / f"epoch-0000{k}{suffix}" for k in (1, 3, 5)]
    assert sorted(tmp_path.iterdir()) == trainer.member_paths
    for epoch, path in zip((1, 3, 5), trainer.member_paths, strict=True):
        loaded = mlp(kind="functional", seed=9)
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(path)
        np.testing.assert_array_equal(weights(loaded), seen[epoch])


def test_only_the_newest_members_are_kept_and_no_other_file_is_deleted(tmp_path):
    (tmp_path / "epoch-00000.keras").write_bytes(b"of another run")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    trainer = Trainer(mlp(), members=Members(tmp_path, start=1, newest=2))
    trainer.fit(X, Y, epochs=6)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch-00000.keras", "epoch-00004.keras", "epoch-00005.keras", "notes.txt"]


def test_members_in_the_way_are_an_error_before_training(tmp_path):
    (tmp_path / "epoch-00003.keras").write_bytes(b"of another run")
    model = mlp(kind="functional")
    before = bits(model.variables)
    with pytest.raises(FileExistsError, match=r"epoch-00003\.keras exists already.*overwrite=True"):
        Trainer(model, members=Members(tmp_path)).fit(X, Y, epochs=5)
    assert bits(model.variables) == before
    Trainer(model, members=Members(tmp_path, overwrite=True)).fit(X, Y, epochs=5)
    assert (tmp_path / "epoch-00003.keras").read_bytes() != b"of another run"


def test_the_bar_is_quiet_when_not_a_terminal_or_switched_off(capsys, monkeypatch):
    import sys

    trainer = Trainer(mlp(), {"mean": Average(MEAN)})
    trainer.fit(X, Y, epochs=2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trainer.fit(X, Y, epochs=2, progress=False)
    assert capsys.readouterr() == ("", "")
    trainer.fit(X, Y, epochs=2, validation_data=VALIDATION)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "val_loss[mean]=" in shown
    assert "epoch/s" in shown or "s/epoch" in shown
