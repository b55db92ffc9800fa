"""Keras' own callbacks in our loop, on raw weights and on averages."""

import csv
import math

import numpy as np
import pytest

from streaming_polyak import MEAN, Average, NonFiniteError, Trainer

pytestmark = pytest.mark.tensorflow
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from models import bits, data, mlp, weights  # noqa: E402

X, Y = data()
VALIDATION = data(50, seed=1)
callbacks = keras.callbacks


def fit(*watchers, epochs=6, start=2, model=None, **options):
    trainer = Trainer(model or mlp(), {"mean": Average(MEAN, start=start)})
    history = trainer.fit(
        X, Y, batch_size=16, epochs=epochs, validation_data=VALIDATION, callbacks=list(watchers), **options
    )
    return trainer, history.history


def rising(trainer_options=None):
    """A model that gets worse from epoch to epoch once it is trained well: a rate that grows."""
    return mlp(), callbacks.LearningRateScheduler(lambda epoch, rate: 0.3 * 2.0**epoch)


def test_callbacks_are_called_as_in_keras():
    class Log(callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __getattribute__(self, name):
            if name.startswith("on_") and "batch" not in name:
                self.seen.append(name)
            return super().__getattribute__(name)

    def run(train):
        log = Log()
        train(log)
        return log.seen, log.params["epochs"], log.params["steps"]

    ours = run(lambda log: fit(log, epochs=2))
    theirs = run(
        lambda log: mlp().fit(X, Y, batch_size=16, epochs=2, validation_data=VALIDATION, verbose=0, callbacks=[log])
    )
    assert ours == theirs


def test_batch_hooks_are_called_for_every_batch_with_the_running_scores():
    seen = []
    watch = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((batch, logs["loss"])))
    _, history = fit(watch, epochs=2)
    assert [batch for batch, _ in seen] == [0, 1, 2, 3, 4] * 2
    assert seen[4][1] == history["loss"][0]
    assert seen[9][1] == history["loss"][1]

    seen.clear()
    fit(watch, epochs=1, model=mlp(steps_per_execution=2))
    assert [batch for batch, _ in seen] == [1, 3, 4]


def test_batch_hooks_change_nothing_about_the_run():
    quiet, _ = fit(epochs=3)
    watched, _ = fit(callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: None), epochs=3)
    np.testing.assert_array_equal(weights(watched.model), weights(quiet.model))


def test_csv_logger_writes_a_column_for_every_name_in_the_history(tmp_path):
    _, history = fit(callbacks.CSVLogger(tmp_path / "log.csv"))
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"epoch", *history}
    for name, values in history.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values, nan_ok=True)


def test_tensorboard_writes_scalars_of_the_averages(tmp_path):
    fit(callbacks.TensorBoard(tmp_path, write_graph=False), epochs=3)
    tags = set()
    for path in tmp_path.rglob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            tags |= {value.tag for value in event.summary.value}
    assert {"epoch_loss", "epoch_loss[mean]", "epoch_accuracy[mean]"} <= tags


def test_learning_rate_scheduler_sets_and_logs_the_rate():
    _, history = fit(callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 / (epoch + 1)), epochs=3)
    assert history["learning_rate"] == pytest.approx([0.1, 0.05, 0.1 / 3])


@pytest.mark.parametrize("monitor", ["val_loss", "val_loss[mean]", "val_accuracy[mean]"])
def test_reduce_lr_on_plateau_follows_raw_weights_or_an_average(monitor):
    watch = callbacks.ReduceLROnPlateau(monitor=monitor, factor=0.5, patience=1, min_delta=100.0, mode="auto")
    trainer, history = fit(watch, epochs=6, start=2)
    start = 0 if monitor == "val_loss" else 2
    first = start + 1  # the epoch after the first value, which alone counts as better
    rates = [0.1 * 0.5 ** max(0, epoch - first) for epoch in range(6)]
    logged = history["learning_rate"]
    assert logged[start:] == pytest.approx(rates[start:])
    assert all(math.isnan(rate) for rate in logged[:start])
    assert watch.monitor == monitor
    assert float(trainer.model.optimizer.learning_rate.value) == pytest.approx(rates[-1] / 2)


def test_early_stopping_on_an_average_stops_and_the_export_is_what_was_scored(tmp_path):
    model, worse = rising()
    stop = callbacks.EarlyStopping(monitor="val_loss[mean]", patience=2)
    trainer, history = fit(worse, stop, model=model, epochs=60, start=3)
    scores = history["val_loss[mean]"]
    assert 5 < len(scores) < 60
    best = int(np.nanargmin(scores))
    assert len(scores) == best + 3
    path = trainer.export(tmp_path / "mean.keras", average="mean")
    loaded = keras.models.load_model(path).evaluate(*VALIDATION, verbose=0, return_dict=True)
    assert loaded["loss"] == pytest.approx(scores[-1], rel=1e-6)
    assert scores[-1] != pytest.approx(history["val_loss"][-1], rel=1e-3)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_early_stopping_restores_the_average_that_scored_best_and_leaves_raw_weights(unit, tmp_path):
    model, worse = rising()
    stop = callbacks.EarlyStopping(monitor="val_loss[mean]", patience=3, restore_best_weights=True)
    last = []
    watch = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: last.append(bits(model.variables)))
    trainer = Trainer(model, {"mean": Average(MEAN, start=3, unit=unit)})
    options = {"batch_size": 16, "epochs": 60, "validation_data": VALIDATION, "callbacks": [worse, stop, watch]}
    history = trainer.fit(X, Y, **options).history
    scores = history["val_loss[mean]"]
    best = int(np.nanargmin(scores))
    assert best < len(scores) - 1
    path = trainer.export(tmp_path / "mean.keras", average="mean")
    loaded = keras.models.load_model(path).evaluate(*VALIDATION, verbose=0, return_dict=True)
    assert loaded["loss"] == pytest.approx(scores[best], rel=1e-6)
    assert trainer.count("mean") == (best - 2 if unit == "epoch" else 5 * (best + 1) - 3)
    assert bits(model.variables) == last[-1]
    assert trainer.evaluate(*VALIDATION)["loss"] == pytest.approx(history["val_loss"][-1], rel=1e-6)


def test_early_stopping_on_raw_weights_is_keras_own():
    stop = callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
    model, worse = rising()
    trainer, history = fit(worse, stop, model=model, epochs=60)
    best = int(np.argmin(history["val_loss"]))
    assert len(history["val_loss"]) == best + 3
    assert trainer.evaluate(*VALIDATION)["loss"] == pytest.approx(history["val_loss"][best], rel=1e-6)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_a_checkpoint_of_the_best_average_holds_that_average(suffix, tmp_path):
    path = tmp_path / f"best{suffix}"
    save = callbacks.ModelCheckpoint(
        path, monitor="val_accuracy[mean]", save_best_only=True, save_weights_only=suffix == ".weights.h5"
    )
    _, history = fit(save, epochs=6)
    assert save.best == np.nanmax(history["val_accuracy[mean]"])
    if suffix == ".keras":
        loaded = keras.models.load_model(path)
    else:
        loaded = mlp()
        loaded.build((None, 4))
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(path)
    scored = loaded.evaluate(*VALIDATION, verbose=0, return_dict=True)["accuracy"]
    assert scored == pytest.approx(save.best, rel=1e-6)
    assert save.monitor == "val_accuracy[mean]"


def test_a_checkpoint_of_every_epoch_holds_raw_weights(tmp_path):
    save = callbacks.ModelCheckpoint(tmp_path / "at-{epoch:02d}-{val_loss:.4f}.keras")
    trainer, history = fit(save, epochs=3)
    names = [f"at-{k + 1:02d}-{loss:.4f}.keras" for k, loss in enumerate(history["val_loss"])]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    loaded = keras.models.load_model(tmp_path / names[-1])
    np.testing.assert_array_equal(weights(loaded), weights(trainer.model))


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_terminate_on_nan_ends_the_run_and_the_averages_are_as_they_were(unit):
    poison = X.copy()
    poison[3] = np.nan
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile(optimizer="sgd", loss="mse")
    trainer = Trainer(model, {"mean": Average(MEAN, unit=unit)})
    trainer.fit(X, Y, epochs=2)
    before = trainer.count("mean")
    history = trainer.fit(poison, Y, epochs=9, initial_epoch=2, callbacks=callbacks.TerminateOnNaN())
    assert len(history.epoch) == 1
    assert math.isnan(history.history["loss"][0])
    assert trainer.count("mean") - before <= (0 if unit == "epoch" else 2)
    with trainer.averaged("mean"):
        assert np.isfinite(weights(trainer.model)).all()


def test_without_terminate_on_nan_the_run_ends_with_an_error():
    with pytest.raises(NonFiniteError, match="holds NaN or infinity after epoch 0"):
        Trainer(mlp(), {"mean": Average(MEAN)}).fit(X * np.nan, Y)


def test_before_an_average_has_begun_its_callback_is_not_called():
    stop = callbacks.EarlyStopping(monitor="val_loss[mean]", patience=1, min_delta=100.0)
    _, history = fit(stop, epochs=12, start=8)
    assert len(history["loss"]) == 10
    assert [math.isnan(value) for value in history["val_loss[mean]"]] == [k < 8 for k in range(len(history["loss"]))]


def test_epochs_without_validation_do_not_count_as_bad_ones():
    stop = callbacks.EarlyStopping(monitor="val_loss[mean]", patience=2)
    _, history = fit(stop, epochs=8, start=0, validation_freq=2)
    assert len(history["loss"]) == 8


def test_a_monitor_of_an_average_that_there_is_not_is_refused_at_once():
    stop = callbacks.EarlyStopping(monitor="val_loss[maen]")
    with pytest.raises(ValueError, match=r"got monitor='val_loss\[maen\]'. The scores are loss,.*val_accuracy\[mean\]"):
        fit(stop)


def test_a_callback_can_stop_in_the_middle_of_an_epoch_which_is_then_no_member():
    class Stop(callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2 and self.epoch == 3

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

    trainer, history = fit(Stop(), epochs=9, start=0)
    assert len(history["loss"]) == 4
    assert trainer.count("mean") == 3


@pytest.mark.parametrize("monitor", ["val_los[mean]", "loss[mean]"])
def test_a_monitor_of_a_score_that_there_will_not_be_is_refused_at_once(monitor):
    with pytest.raises(ValueError, match="to monitor a score that there will be"):
        fit(callbacks.ReduceLROnPlateau(monitor=monitor))
    with pytest.raises(ValueError, match="averages are scored on validation_data"):
        Trainer(mlp(), {"mean": Average(MEAN)}).fit(X, Y, callbacks=callbacks.EarlyStopping("val_loss[mean]"))


def test_a_checkpoint_that_would_save_raw_weights_for_an_average_is_refused(tmp_path):
    save = callbacks.ModelCheckpoint(tmp_path / "a.keras", monitor="val_loss[mean]", save_freq=3)
    with pytest.raises(ValueError, match="at the end of epochs, where the average 'mean' that it monitors is scored"):
        fit(save)
    save = callbacks.ModelCheckpoint(tmp_path / "{val_loss[mean]:.3f}.keras", monitor="val_loss[mean]")
    with pytest.raises(ValueError, match=r"filepath without brackets.*write \{val_loss:\.3f\}"):
        fit(save)


def test_a_file_name_holds_the_score_of_the_average(tmp_path):
    save = callbacks.ModelCheckpoint(tmp_path / "{epoch}-{val_loss:.4f}.keras", monitor="val_loss[mean]")
    _, history = fit(save, epochs=3, start=2)
    assert [path.name for path in tmp_path.iterdir()] == [f"3-{history['val_loss[mean]'][2]:.4f}.keras"]


def test_what_is_no_callback_is_refused():
    with pytest.raises(TypeError, match=r"callbacks to be keras\.callbacks\.Callback, got 3"):
        fit(3)


def test_callbacks_get_no_value_where_there_is_none():
    seen = []
    watch = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(set(logs)))
    fit(watch, epochs=4, start=3, validation_freq=2)
    assert ["val_loss" in names for names in seen] == [False, True, False, True]
    assert ["val_loss[mean]" in names for names in seen] == [False, False, False, True]


def test_begin_and_end_of_batches_come_in_pairs_for_data_sets_too():
    seen = []
    watch = callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(("begin", batch)),
        on_train_batch_end=lambda batch, logs: seen.append(("end", batch)),
    )
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    Trainer(mlp()).fit(batches, epochs=2, callbacks=watch)
    assert seen == [(kind, batch) for _ in range(2) for batch in range(5) for kind in ("begin", "end")]


@pytest.mark.parametrize(
    "make", [lambda path: callbacks.TerminateOnNaN(), lambda path: callbacks.ModelCheckpoint(path / "a.keras")]
)
def test_callbacks_that_need_no_batches_leave_the_loop_many_steps_a_call(make, tmp_path):
    trainer = Trainer(mlp())
    trainer.fit(X, Y, batch_size=1, epochs=1)
    calls, real = [], trainer._train_loop.__call__

    class Counting:
        def __call__(self, feed, steps):
            calls.append(steps)
            return real(feed, steps)

    trainer._train_loop = Counting()
    trainer.fit(X, Y, batch_size=1, epochs=1, callbacks=make(tmp_path))
    assert len(calls) < 20  # for 70 steps
