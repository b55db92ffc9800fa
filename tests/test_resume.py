"""A run that was stopped anywhere and resumed ends with the bits of one that was not."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

from streaming_polyak import (
    LINEAR,
    MEAN,
    Average,
    CheckpointError,
    Exponential,
    Interrupted,
    Members,
    NonFiniteError,
    RunLockedError,
    Trainer,
)
from streaming_polyak.files import source
from streaming_polyak.files.run_folder import RunFolder
from streaming_polyak.training import run as run_module
from streaming_polyak.training.datasets import DatasetBatches
from streaming_polyak.training.hooks import Hooks
from streaming_polyak.training.state import random_slots

pytestmark = pytest.mark.tensorflow

ROWS, BATCH, EPOCHS = 44, 8, 4  # five whole batches an epoch and one smaller one
STEPS = 6
AVERAGES = {
    "mean": Average(MEAN, start=1),
    "linear": Average(LINEAR, compensated=True),
    "ema": Average(Exponential(decay=0.9), unit="step", start=3),
    "steps": Average(MEAN, unit="step", every=2, compensated=True),
    "wide": Average(MEAN, dtype="float64"),
}


class Parts(keras.metrics.Metric):
    """Its result is not computed to the same last bit inside a compiled function and outside."""

    def __init__(self):
        super().__init__(name="parts")
        self.total = self.add_weight(shape=(), initializer="zeros", name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(keras.ops.sum(keras.ops.abs(y_true - y_pred)))

    def result(self):
        return self.total / 7 + self.total / 7


class GlobalNoise(keras.layers.Layer):
    """Draws from Keras' global generator, and only in training."""

    def call(self, x, training=False):
        return x + 0.1 * keras.random.normal(keras.ops.shape(x)) if training else x


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.01),
}
LAYERS = {
    "plain": lambda: [],
    "dropout": lambda: [keras.layers.Dropout(0.4), keras.layers.GaussianNoise(0.1)],
    "batch norm": lambda: [keras.layers.BatchNormalization()],
    "both": lambda: [keras.layers.BatchNormalization(), keras.layers.Dropout(0.4), GlobalNoise()],
}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_clock(monkeypatch):
    monkeypatch.setattr(source, "_TICK_NS", 0)


class Stopped(Exception):
    """What stops a run in these tests, as a kill would: nothing is saved because of it."""


class StopAt(keras.callbacks.Callback):
    """Raises after so many batches of the whole life of the callback."""

    def __init__(self, batches):
        super().__init__()
        self._left = [batches] * 1  # hidden in a list, so that it changes unseen

    def get_state(self):
        return {}

    def set_state(self, state):
        pass

    def on_train_batch_end(self, batch, logs=None):
        self._left[0] -= 1
        random.random()
        np.random.random()  # noqa: NPY002
        if not self._left[0]:
            raise Stopped


def data(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 5)).astype(np.float32)
    return x, (x @ rng.normal(size=(5, 5)) > 0).astype(np.float32)


def trainer(folder, optimizer="adam", layers="dropout", save_every="1 step", **options):
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(5, activation="tanh"), *LAYERS[layers](), keras.layers.Dense(5)]
    )
    model.compile(
        OPTIMIZERS[optimizer](),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(), keras.metrics.AUC(from_logits=True, name="auc"), Parts()],
    )
    given = {"averages": AVERAGES, "seed": 3, **options}
    return Trainer(model, given.pop("averages"), run_dir=folder, save_every=save_every, **given)


def fit(made, callbacks=(), epochs=EPOCHS, x=None, **options):
    given = {"batch_size": BATCH, "validation_data": data(1), **options} if x is None else options
    arguments = data() if x is None else (x,)
    # Small steps, so that there are many moments to be stopped at.
    made._steps_a_call = 1
    return made.fit(*arguments, epochs=epochs, callbacks=[*callbacks], progress=False, **given)


def bits(made):
    """A digest of everything that a run ends with; taken at once, as random numbers are drawn for it."""
    digest = hashlib.sha256()
    for name, slot in made._slots().items():
        if not name.startswith("metrics"):
            digest.update(name.encode() + np.asarray(slot.read()).tobytes())
    digest.update(repr(sorted(made.history.history.items())).encode() + repr(made.history.epoch).encode())
    digest.update(repr((random.random(), np.random.random())).encode())  # noqa: NPY002  # old ones are resumed too
    return digest.hexdigest()


def finished(made, stops, make, **options):
    """Stops a run after so many batches, again and again, and lets the last one end; returns that trainer."""
    for stop in stops:
        with pytest.raises(Stopped):
            fit(made, [StopAt(stop)], **options)
        made = make()
    fit(made, [StopAt(10**6)], **options)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody stopped, by optimizer and layers: their bits, and the folder with all their checkpoints."""
    known = {}

    def get(optimizer="adam", layers="dropout"):
        if (optimizer, layers) not in known:
            folder = tmp_path_factory.mktemp("whole")
            made = trainer(folder, optimizer, layers, keep=1000)
            fit(made, [StopAt(10**6)])
            known[optimizer, layers] = bits(made), RunFolder(folder)
        return known[optimizer, layers]

    return get


@pytest.fixture(scope="module")
def wanted(whole):
    """The bits of a run that nobody stopped."""
    return lambda *_: whole()[0]


@pytest.mark.parametrize("stop", [6, 9, 11, 13], ids=["epoch end", "mid-epoch", "last batch", "first batch"])
@pytest.mark.parametrize("layers", ["plain", "dropout", "batch norm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, whole, optimizer, layers, stop):
    wanted, folder = whole(optimizer, layers)
    killed_in(stop, folder, tmp_path)
    made = trainer(tmp_path, optimizer, layers)
    fit(made, [StopAt(10**6)], resume="must")
    assert bits(made) == wanted


def killed_in(stop, folder, path):
    """Makes what a kill in batch `stop` leaves: what was saved before it."""
    (path / "checkpoints").mkdir(parents=True)
    for saved in folder.saved():
        if saved.step < stop:
            shutil.copy(saved.path, path / "checkpoints")
    assert RunFolder(path).saved()[-1].step == stop - 1


_RESUME = """
import json, sys
from pathlib import Path
import test_resume
for folder, optimizer, layers in json.loads(sys.argv[1]):
    made = test_resume.trainer(Path(folder), optimizer, layers)
    test_resume.fit(made, [test_resume.StopAt(10**6)], resume="must")
    print("bits", test_resume.bits(made))
"""


def test_one_in_ten_resumed_by_a_new_process_has_the_same_bits_too(tmp_path, whole):
    cases = [
        ("sgd", "plain", 6),
        ("momentum", "dropout", 9),
        ("adam", "batch norm", 11),
        ("adamw", "dropout", 13),
        ("adam", "dropout", 9),
    ]
    for k, (optimizer, layers, stop) in enumerate(cases):
        killed_in(stop, whole(optimizer, layers)[1], tmp_path / str(k))
    folders = [(str(tmp_path / str(k)), *case[:2]) for k, case in enumerate(cases)]
    run = subprocess.run(
        [sys.executable, "-c", _RESUME, json.dumps(folders)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("bits ")]
    assert found == [whole(optimizer, layers)[0] for optimizer, layers, _ in cases]


def test_many_stops_in_one_run_change_no_bit(tmp_path, wanted):
    def make():
        return trainer(tmp_path / "run")

    assert bits(finished(make(), [1, 1, 2, 7, 1, 5], make)) == wanted(tmp_path)


@pytest.mark.parametrize("memory", ["low", "high"])
@pytest.mark.parametrize("save_every", [None, "1 epoch", "4 steps", "0.0001 min"])
def test_how_often_and_how_it_is_saved_changes_no_bit(tmp_path, wanted, save_every, memory):
    def make():
        return trainer(tmp_path / "run", save_every=save_every, memory=memory)

    assert bits(finished(make(), [9], make)) == wanted(tmp_path)


PIPELINES = {
    "shuffled": lambda d: d.shuffle(20, seed=3).batch(BATCH).prefetch(2),
    "before a repeat": lambda d: d.shuffle(20, seed=3).repeat(2).shuffle(9, seed=4).batch(BATCH),
    "Python code": lambda d: d.map(python_code).shuffle(20, seed=3).batch(BATCH),
    "one order": lambda d: d.shuffle(20, seed=3, reshuffle_each_iteration=False).batch(BATCH),
}


def python_code(x, y):
    doubled = tf.numpy_function(lambda v: v * 2, [x], tf.float32)
    return tf.ensure_shape(doubled, x.shape), y


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_data_set_goes_on_where_it_was(pipeline, steps):
    def batches():
        made = DatasetBatches(PIPELINES[pipeline](tf.data.Dataset.from_tensor_slices(data())), steps)
        made.check_resumable()
        return made

    def take(feed, count=10**6):
        taken = []
        while count and feed.more():
            iterator, asked = feed.take(1)
            batch = next(iterator, None)
            feed.took(asked, int(batch is not None))
            if batch is not None:
                taken.append(batch[0].numpy().tobytes())
                count -= 1
        return taken

    whole = batches()
    wanted = [take(whole.epoch(epoch)) for epoch in range(4)]
    assert pipeline == "one order" or len({tuple(epoch) for epoch in wanted}) == 4
    for epoch, done in itertools.product(range(3), (0, 2, len(wanted[0]))):
        first = batches()
        for earlier in range(epoch):
            take(first.epoch(earlier))
        if done:
            take(first.epoch(epoch), done)
        second = batches()
        second.restore(first.state())
        rest = [take(second.epoch(epoch, done)), *(take(second.epoch(later)) for later in range(epoch + 1, 4))]
        assert rest == [wanted[epoch][done:], *wanted[epoch + 1 :]], (epoch, done)


@pytest.mark.parametrize(
    "pipeline",
    [
        lambda d: d.shuffle(20).batch(BATCH),
        lambda d: d.map(lambda x, y: (x + tf.random.normal([5]), y)).batch(BATCH),
    ],
    ids=["shuffle", "noise"],
)
def test_a_data_set_of_another_order_in_each_process_is_refused_at_the_start(tmp_path, pipeline):
    made = trainer(tmp_path / "run")
    tf.random.set_seed(None)
    unseeded = pipeline(tf.data.Dataset.from_tensor_slices(data()))
    with pytest.raises(ValueError, match="Expected a data set that gives the same batches in a resumed run"):
        fit(made, x=unseeded)
    assert not (tmp_path / "run/checkpoints").exists()


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, k):
        return tuple(a[k * BATCH : (k + 1) * BATCH] for a in data())


def given(kind):
    """A data set of a kind, with the rows of `data`."""
    return Rows() if kind == "PyDataset" else PIPELINES["shuffled"](tf.data.Dataset.from_tensor_slices(data()))


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset"])
def test_a_run_on_a_data_set_is_resumed_to_the_bit(tmp_path, kind):
    def make(name="run"):
        return trainer(tmp_path / name)

    whole = make("whole")
    fit(whole, [StopAt(10**6)], x=given(kind))
    wanted = bits(whole)
    made = make()
    for stop in (3, 5, 2):
        with pytest.raises(Stopped):
            fit(made, [StopAt(stop)], x=given(kind))
        made = make()
    fit(made, [StopAt(10**6)], x=given(kind))
    assert bits(made) == wanted


class Logging(keras.layers.Layer):
    """Gives the first number of each row in training to a function."""

    def __init__(self, note):
        super().__init__()
        self._note = note

    def call(self, x, training=False):
        if training:
            tf.numpy_function(lambda rows: self._note(rows[:, 0].tolist()) or np.float32(0), [x], tf.float32)
        return x


@pytest.mark.parametrize("kind", ["arrays", "tf.data", "PyDataset"])
def test_each_sample_is_seen_once_an_epoch_in_one_order_over_a_chain_of_stops(tmp_path, kind):
    """What a stop has lost is seen a second time, in the same batches, and nothing else is."""

    def run(name, stop):
        keras.utils.set_random_seed(7)
        log = []
        model = keras.Sequential([keras.Input((5,)), Logging(log.append), keras.layers.Dense(5)])
        model.compile("sgd", "mse", jit_compile=False)
        made = Trainer(model, seed=3, run_dir=tmp_path / name, save_every="2 steps")
        saved = RunFolder(tmp_path / name).saved()
        x = None if kind == "arrays" else given(kind)
        with contextlib.suppress(Stopped):
            fit(made, [StopAt(stop)], x=x)
        return dict(enumerate(log, saved[-1].step if saved else 0))

    whole = run("whole", 10**6)
    assert sorted(whole) == list(range(EPOCHS * STEPS))
    epochs = [[row for k in range(STEPS) for row in whole[epoch * STEPS + k]] for epoch in range(EPOCHS)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(data()[0][:, 0].tolist())] * EPOCHS
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS  # Keras' own fit may repeat one order
    seen, again = {}, 0
    for stop in (3, 5, 2, 7, 10**6):
        part = run("stopped", stop)
        assert all(seen[step] == part[step] for step in seen.keys() & part.keys())
        again += len(seen.keys() & part.keys())
        seen |= part
    assert seen == whole
    assert 0 < again <= 2 * 4  # no more of each stop than the two steps between saves


# What callbacks remember.


class Counting(keras.callbacks.Callback):
    """Remembers plain things of several kinds in its attributes."""

    def __init__(self):
        super().__init__()
        self.batches, self.losses, self.best = 0, [], {"epoch": None, "loss": float("inf")}
        self.kept, self.names = None, ("a", {1, 2})

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(logs["loss"])
        if logs["loss"] < self.best["loss"]:
            self.best = {"epoch": epoch, "loss": logs["loss"]}
            self.kept = [np.array(w) for w in self.model.get_weights()]


def test_callbacks_go_on_as_if_nothing_had_happened(tmp_path):
    def callbacks(folder):
        return [
            Counting(),
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=1, min_delta=10.0),
            keras.callbacks.EarlyStopping("val_loss[mean]", patience=3, min_delta=10.0, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(folder / "best.keras", monitor="val_loss", save_best_only=True),
        ]

    found = []
    for name, stops in (("whole", []), ("run", [4, 9, 12])):
        made, given = trainer(tmp_path / name), callbacks(tmp_path / name)
        for stop in stops:
            with pytest.raises(Stopped):
                fit(made, [*given, StopAt(stop)], epochs=9)
            made, given = trainer(tmp_path / name), callbacks(tmp_path / name)
        fit(made, [*given, StopAt(10**6)], epochs=9)
        counting, reducing, stopping, best = given
        found.append(
            {
                "bits": bits(made),
                "counting": (counting.batches, counting.losses, counting.best, counting.names),
                "kept": [w.tobytes() for w in counting.kept],
                "reducing": (reducing.wait, reducing.best),
                "rate": float(made.model.optimizer.learning_rate),
                "stopped": stopping.stopped_epoch,
                "stopping": (stopping.best, stopping.best_epoch),
                "best": best.best,
                "epochs": made.history.epoch,
            }
        )
    assert found[0] == found[1]
    assert found[0]["epochs"] == list(range(len(found[0]["epochs"])))
    assert found[0]["stopped"] > 0
    assert found[0]["rate"] < 0.01  # it was reduced


@pytest.mark.parametrize("memory", ["low", "high"])
def test_what_a_callback_keeps_is_copied_only_where_memory_is_given_for_it(tmp_path, monkeypatch, memory):
    commit, seen, counting = RunFolder.commit, [], Counting()

    def looking(self, step, parts, state, **options):
        kept = [part.read() for part in parts if part.name.startswith("callbacks/0/kept")]
        seen.append([np.shares_memory(a, b) for a, b in zip(kept, counting.kept or [], strict=True)])
        return commit(self, step, parts, state, **options)

    monkeypatch.setattr(RunFolder, "commit", looking)
    fit(trainer(tmp_path / "run", save_every="1 epoch", memory=memory), [counting], epochs=1)
    assert seen == [[memory == "low"] * 4]


# Which run it is.


def test_a_finished_run_trains_nothing_and_changes_no_file_and_more_epochs_go_on(tmp_path, wanted):
    fit(trainer(tmp_path / "run"), [StopAt(10**6)], epochs=2)

    def files():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").rglob("*.*") if p.is_file()}

    before = files()
    again = trainer(tmp_path / "run")
    history = fit(again, [StopAt(1)], epochs=2)
    assert files() == before
    assert len(history.history["loss"]) == 2
    more = trainer(tmp_path / "run")
    fit(more, [StopAt(10**6)], epochs=EPOCHS)
    assert bits(more) == wanted(tmp_path)


def test_a_run_that_a_callback_stopped_stays_so_unless_it_is_asked_for_more_epochs(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    def epochs(asked):
        made = trainer(tmp_path / "run", save_every="1 epoch")
        fit(made, [Stop()], epochs=asked)
        return made.history.epoch

    assert epochs(4) == [0, 1]
    assert epochs(4) == [0, 1]
    assert epochs(5) == [0, 1, 2, 3, 4]


def test_resume_must_and_never(tmp_path):
    with pytest.raises(CheckpointError, match='no checkpoint to go on with, and resume="must"'):
        fit(trainer(tmp_path / "run"), resume="must")
    fit(trainer(tmp_path / "run"), epochs=1, resume="never")
    with pytest.raises(FileExistsError, match='has a run in it, and resume="never"'):
        fit(trainer(tmp_path / "run"), resume="never")
    fit(trainer(tmp_path / "run"), epochs=2, resume="must")


DIFFERENT = {
    "seed": ({"seed": 4}, {}, "setting seed: 3 in the checkpoint, 4 now"),
    "optimizer": ({"optimizer": "adamw"}, {}, "setting optimizer: Adam in the checkpoint, AdamW now"),
    "layers": ({"layers": "batch norm"}, {}, "batch_normalization/gamma: float32 .* now, none in the checkpoint"),
    "averages": ({"averages": {"mean": Average(MEAN, start=2)}}, {}, "average mean: mean of every 1 epochs from 1 in"),
    "an average less": ({"averages": {}}, {}, "tensor average/step/n: .* in the checkpoint, none now"),
    "batch size": ({}, {"batch_size": 4}, "setting data batch_size: 8 in the checkpoint, 4 now"),
    "shuffle": ({}, {"shuffle": False}, "setting data shuffle: True in the checkpoint, False now"),
    "validation": ({}, {"validation_data": None}, "setting scores: "),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_run_is_refused_with_every_difference_and_nothing_loaded(tmp_path, what):
    options, arguments, message = DIFFERENT[what]
    fit(trainer(tmp_path / "run"), epochs=1)
    other = trainer(tmp_path / "run", **options)
    before = [np.array(v) for v in other.model.variables]
    with pytest.raises(CheckpointError, match=f"it is of another run than this one:\n(.*\n)*.*{message}") as caught:
        fit(other, **arguments)
    assert caught.value.code == "other-run"
    for variable, value in zip(other.model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_other_data_are_refused(tmp_path):
    fit(trainer(tmp_path / "run"), epochs=1)
    x, y = data()
    with pytest.raises(CheckpointError, match="setting data rows: 44 in the checkpoint, 40 now"):
        trainer(tmp_path / "run").fit(x[:40], y[:40], batch_size=BATCH, validation_data=data(1), epochs=2)


@pytest.mark.parametrize("text", ["", "epoch", "0 steps", "1.5 epochs", "10", "5 hours", 3])
def test_nonsense_for_how_often_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match='Expected save_every such as "1 epoch"'):
        trainer(tmp_path, save_every=text)


# What is not finite, and what is left out.


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    class Poison(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 9:
                kernel = self.model.layers[0].kernel
                kernel.assign(np.where(np.arange(kernel.shape[1]) == 1, np.nan, kernel))

    made = trainer(tmp_path / "run", averages={})
    with pytest.raises(NonFiniteError, match=r"'model/0000/sequential/dense/kernel' holds NaN"):
        fit(made, [Poison()])
    assert RunFolder(tmp_path / "run").latest().step == 8
    skipping = trainer(tmp_path / "skip", averages={}, on_nonfinite="skip")
    fit(skipping, [Poison()])
    assert RunFolder(tmp_path / "skip").latest().step == 8


LEFT_OUT = {
    "model": "model/0000",
    "statistics": "moving_variance",
    "seeds": "seed_generator",
    "optimizer": "momentum",
    "iterations": "iteration",
    "epoch averages": "average/epoch/linear/m/0000",
    "epoch compensation": "average/epoch/linear/e/0000",
    "epoch counters": "average/epoch/n",
    "step averages": "average/step/plain/m/0000",
    "step compensation": "average/step/plain-compensated/e/0000",
    "step counters": "average/step/n",
    "metrics": "metrics/",
    "Python's random": "random/python",
    "NumPy's random": "random/numpy",
    "Keras' random": "random/keras",
    "callbacks and history": "no slot",
}


def seeded(folder):
    made = trainer(folder, layers="both")
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    return made


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run that was stopped in mid-epoch, and the bits with which it would have ended."""
    folder = tmp_path_factory.mktemp("stopped")
    whole = seeded(folder / "whole")
    fit(whole, [StopAt(10**6)])
    wanted = bits(whole)
    with pytest.raises(Stopped):
        fit(seeded(folder / "run"), [StopAt(15)])
    shutil.copytree(folder / "run", folder / "copy")
    random.seed(5)
    complete = trainer(folder / "copy", layers="both")
    fit(complete, [StopAt(10**6)])
    assert bits(complete) == wanted
    return folder / "run", wanted


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_run_of_which_anything_is_not_restored_ends_with_other_bits(tmp_path, monkeypatch, stopped_run, what):
    folder, wanted = stopped_run
    shutil.copytree(folder, tmp_path / "run")

    def without(slots):
        left_out = [name for name in slots if LEFT_OUT[what] in name]
        return slots | {name: replace(slots[name], assign=lambda array: None) for name in left_out}

    all_slots = Trainer._slots
    monkeypatch.setattr(Trainer, "_slots", lambda self: without(all_slots(self)))
    monkeypatch.setattr(run_module, "random_slots", lambda: without(random_slots()))
    if what == "callbacks and history":
        monkeypatch.setattr(Hooks, "restore", lambda *_: None)
    short = trainer(tmp_path / "run", layers="both")
    fit(short, [StopAt(10**6)])
    monkeypatch.undo()
    assert bits(short) != wanted


# Who else is there.


def test_a_second_fit_in_the_folder_is_refused_while_the_first_trains(tmp_path):
    refused = []

    class Second(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with pytest.raises(RunLockedError, match="in use by another run of this process"):
                fit(trainer(tmp_path / "run"))
            refused.append(epoch)

    fit(trainer(tmp_path / "run"), [Second()], epochs=2)
    assert refused == [0, 1]
    with RunFolder(tmp_path / "run").lock():
        pass


def test_in_a_thread_without_signals_it_trains_and_saves_too(tmp_path, wanted):
    made, failed = trainer(tmp_path / "run"), []

    def work():
        try:
            fit(made, [StopAt(10**6)])
        except BaseException as error:
            failed.append(error)
            raise

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert signal.getsignal(signal.SIGTERM) is before
    assert bits(made) == wanted(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_saved_after_the_step_and_gives_the_handlers_back(tmp_path, wanted, number):
    numbers = [number]

    class Signal(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 8 and numbers:
                signal.raise_signal(numbers.pop())

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as ended:
        fit(trainer(tmp_path / "run", save_every="1 epoch"), [Signal(), StopAt(10**6)])
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert RunFolder(tmp_path / "run").latest().step == 8
    again = trainer(tmp_path / "run", save_every="1 epoch")
    fit(again, [Signal(), StopAt(10**6)])
    assert bits(again) == wanted(tmp_path)


@pytest.mark.parametrize("memory", ["low", "high"])
def test_a_folder_that_is_renamed_under_a_run_ends_it_and_brought_back_it_goes_on(tmp_path, wanted, memory):
    class Renames(StopAt):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            if self._left[0] == 7:
                if made._run._writing is not None:
                    made._run._writing.result()
                os.rename(tmp_path / "run", tmp_path / "elsewhere")

    made = trainer(tmp_path / "run", memory=memory)
    with pytest.raises(FileNotFoundError, match="was removed, renamed or exchanged while the run in it"):
        fit(made, [Renames(15)])
    assert os.listdir(tmp_path) == ["elsewhere"]
    os.rename(tmp_path / "elsewhere", tmp_path / "run")
    made = trainer(tmp_path / "run", memory=memory)
    fit(made, [Renames(10**6)])
    assert bits(made) == wanted(tmp_path)


def test_an_error_of_the_writer_is_raised_at_the_next_step(tmp_path, monkeypatch):
    commit, calls = RunFolder.commit, []

    def failing(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return commit(self, *arguments, **options)

    monkeypatch.setattr(RunFolder, "commit", failing)
    made = trainer(tmp_path / "run", memory="high")
    with pytest.raises(OSError, match="No space left on device"):
        fit(made)
    assert int(made.model.optimizer.iterations) < 5
    assert RunFolder(tmp_path / "run").latest().step == 1


def test_members_of_lost_work_are_made_again_and_the_newest_are_kept(tmp_path):
    def make():
        return trainer(tmp_path / "run", members=Members(tmp_path / "run/members", newest=2), save_every="3 epochs")

    made = make()
    with pytest.raises(Stopped):
        fit(made, [StopAt(5 * STEPS + 2)], epochs=9)
    names = [path.name for path in made.member_paths]
    assert names == ["epoch-00003.keras", "epoch-00004.keras"]  # of which the last save, after epoch 2, knows nothing
    again = make()
    fit(again, [StopAt(10**6)], epochs=6)
    assert [path.name for path in again.member_paths] == ["epoch-00004.keras", "epoch-00005.keras"]
