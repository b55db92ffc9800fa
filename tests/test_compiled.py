"""Functions called as operations, and variables read many at a time, against TensorFlow's own ways."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streaming_polyak import Trainer

pytestmark = pytest.mark.tensorflow
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from models import mlp  # noqa: E402

from streaming_polyak.training.compiled import _FEW, _MANY, Compiled, Reader  # noqa: E402


@pytest.mark.parametrize("one_thread", [False, True])
def test_a_compiled_function_does_what_it_was_traced_from(one_thread):
    total = tf.Variable(np.zeros(3, np.float32))

    def add(pair, times):
        tf.while_loop(lambda i: i < times, lambda i: (total.assign_add(pair["a"] * pair["b"]), i + 1)[1:], (0,))
        return {"total": total.read_value(), "twice": (2 * pair["a"], times)}

    vector = tf.TensorSpec([3], tf.float32)
    compiled = Compiled(add, {"a": vector, "b": vector}, tf.TensorSpec([], tf.int32), one_thread=one_thread)
    assert (compiled._attributes["executor_type"] == "SINGLE_THREADED_EXECUTOR") is one_thread
    a, b = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    for k in range(1, 4):
        found = compiled({"a": tf.constant(a), "b": tf.constant(b)}, tf.constant(2))
        np.testing.assert_array_equal(found["total"], 2 * k * a * b)
        np.testing.assert_array_equal(found["twice"][0], 2 * a)
        assert int(found["twice"][1]) == 2


def test_a_function_with_loops_inside_its_loop_is_not_run_in_one_thread():
    def nested(n):
        inner = lambda i: tf.while_loop(lambda j: j < i, lambda j: (j + 1,), (0,))[0]  # noqa: E731
        return tf.while_loop(lambda i, s: i < n, lambda i, s: (i + 1, s + inner(i)), (0, 0))[1]

    compiled = Compiled(nested, tf.TensorSpec([], tf.int32), one_thread=True)
    assert compiled._attributes["executor_type"] == ""
    assert int(compiled(tf.constant(5))) == 10


def test_a_function_that_calls_python_is_not_run_in_one_thread():
    double = tf.function(lambda x: x + x)
    compiled = Compiled(
        lambda x: tf.py_function(double, [x], tf.float32), tf.TensorSpec([], tf.float32), one_thread=True
    )
    assert compiled._attributes["executor_type"] == ""
    assert float(compiled(tf.constant(2.0))) == 4.0


def test_small_models_train_in_several_threads_where_tensorflow_has_one():
    code = """
import threading
import tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(1)
import numpy as np
from models import mlp
from streaming_polyak import Trainer
x, y = np.ones((64, 4), np.float32), np.eye(3, dtype=np.float32)[np.arange(64) % 3]
trainers = [Trainer(mlp()) for _ in range(3)]
fit = lambda trainer: trainer.fit(x, y, epochs=100, validation_data=(x, y), progress=False)
threads = [threading.Thread(target=fit, args=(trainer,)) for trainer in trainers]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print([len(trainer.history.history["val_loss"]) for trainer in trainers])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=Path(__file__).parent, check=True
    )
    assert done.stdout.strip() == "[100, 100, 100]"


def test_an_error_in_a_compiled_function_is_raised_and_the_next_call_works():
    def checked(x):
        with tf.control_dependencies([tf.debugging.assert_positive(x, "x is not positive")]):
            return tf.identity(x)

    compiled = Compiled(checked, tf.TensorSpec([], tf.float32), one_thread=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="x is not positive"):
        compiled(tf.constant(-1.0))
    assert float(compiled(tf.constant(2.0))) == 2.0


def test_small_models_run_in_one_thread_and_those_with_recurrent_layers_do_not_hang():
    small = Trainer(mlp())
    x, y = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), np.eye(3, dtype=np.float32)[[0, 1] * 10]
    small.fit(x, y, validation_data=(x, y), progress=False)
    (loop,) = small._train_loop._over_rows.values()
    assert loop._attributes["executor_type"] == "SINGLE_THREADED_EXECUTOR"

    inputs = keras.Input((4, 1))
    hidden = keras.layers.GRU(3)(keras.layers.SimpleRNN(3, return_sequences=True)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(hidden))
    model.compile("adam", "categorical_crossentropy")
    recurrent = Trainer(model)
    history = recurrent.fit(x[..., None], y, epochs=2, validation_data=(x[..., None], y), progress=False)
    (loop,) = recurrent._train_loop._over_rows.values()
    assert loop._attributes["executor_type"] == ""
    expected = model.evaluate(x[..., None], y, verbose=0)
    assert history.history["val_loss"][-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [0, 1, _FEW - 1, _FEW, _MANY, _MANY + 1, 5 * _MANY - 3])
def test_a_reader_reads_the_present_values_of_variables_of_any_dtype(count):
    dtypes = ("float32", "int64", "float32", "bfloat16")
    variables = [tf.Variable(tf.cast(tf.fill([k % 3, 2], k), dtypes[k % 4])) for k in range(count)]
    reader = Reader(variables)
    for add in (0, 1, 5):
        for variable in variables:
            variable.assign_add(tf.cast(tf.fill(variable.shape, add), variable.dtype))
        values = reader()
        assert [v.dtype for v in values] == [v.dtype for v in variables]
        assert all(np.array_equal(v.numpy(), w.numpy()) for v, w in zip(values, variables, strict=True))


def test_a_reader_copies_nothing():
    variables = [tf.Variable(np.zeros(1000, np.float32)) for _ in range(_MANY)]
    address = [np.asarray(variable.read_value()).ctypes.data for variable in variables]
    assert [np.asarray(value).ctypes.data for value in Reader(variables)()] == address
