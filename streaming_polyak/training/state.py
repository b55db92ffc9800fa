"""What a run consists of, as named slots that are read into a checkpoint and assigned from one.

A slot is one tensor with a place in the running program: a variable, an array of an accumulator, the state of a random
number generator. What is no tensor - counters, histories, what callbacks remember - is encoded as JSON, with arrays in
it as tensors of their own.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from streaming_polyak.files.run_checkpoint import Part
from streaming_polyak.files.tensors import DTYPES

Array = NDArray[Any]


@dataclass(frozen=True)
class Slot:
    """One tensor of a running program.

    Args:
        dtype: a key of `DTYPES`.
        shape: of the tensor.
        read: returns its present value, perhaps a view of memory that changes soon.
        assign: sets it.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]
    assign: Callable[[Array], Any]

    def part(self, name: str) -> Part:
        """Returns it as a part of a checkpoint, read when its turn comes."""
        return Part(name, self.dtype, self.shape, self.read)

    def describe(self) -> str:
        """Returns dtype and shape for messages, as "float32 (3, 4)"."""
        return f"{self.dtype} {self.shape}"


def variable_slot(variable: keras.Variable | tf.Variable) -> Slot:
    """Returns the slot that a variable is.

    Raises:
        ValueError: it is of a dtype that is not saved.
    """
    value = variable.value if isinstance(variable, keras.Variable) else variable
    dtype = tf.as_dtype(variable.dtype).name
    if dtype not in DTYPES:
        raise ValueError(f"Expected variables of numbers, but {variable.name!r} is of dtype {dtype}.")
    return Slot(dtype, tuple(variable.shape), lambda: array_of(present(value)), variable.assign)


def variable_slots(prefix: str, variables: Iterable[keras.Variable]) -> dict[str, Slot]:
    """Returns slots of variables that are always in the same order."""
    return {f"{prefix}/{place(k, variable.path)}": variable_slot(variable) for k, variable in enumerate(variables)}


def place(k: int, path: str) -> str:
    """Returns a name for the k-th variable that is the same when the same program makes the model a second time.

    Keras numbers layers without a name of their own through a whole process, as in "dense_3/kernel".

    >>> place(2, "sequential_1/dense_3/kernel")
    '0002/sequential/dense/kernel'
    """
    return f"{k:04d}/{re.sub(r'_[0-9]+(?=[/_]|$)', '', path)}"


def present(variable: tf.Variable) -> tf.Tensor:
    """Returns the present value, for eager code; `read_value` does the same in four times as long (9 and 37 us)."""
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


def put(variable: tf.Variable, value: tf.Tensor | Array) -> None:
    """Sets a value of the variable's dtype and shape, in eager code; `assign` does it in ten times as long."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def array_of(value: tf.Tensor) -> Array:
    """Returns a tensor as an array: on a CPU its own memory, not to be written to."""
    try:
        return np.asarray(value)
    except ValueError:  # a bfloat16 scalar is no array to NumPy
        return np.asarray(value.numpy())


def random_slots() -> dict[str, Slot]:
    """Returns the states of the process's random number generators: Python's, NumPy's, TensorFlow's and Keras'."""
    slots = {
        "random/python": Slot("float64", (627,), _python_state, _set_python_state),
        "random/numpy": Slot("float64", (627,), _numpy_state, _set_numpy_state),
    }
    with contextlib.suppress(RuntimeError):  # with deterministic operations there is none
        slots["random/tensorflow"] = variable_slot(tf.random.get_global_generator().state)
    generator = keras.src.backend.common.global_state.get_global_attribute("global_seed_generator")
    if generator is not None:  # something was drawn with seed=None
        slots["random/keras"] = variable_slot(generator.state)
    return slots


def make_keras_generator() -> None:
    """Lets Keras make its global generator, if nothing has drawn from it yet."""
    keras.random.uniform(())


def _python_state() -> Array:
    version, words, gauss = random.getstate()
    return np.array([version, *words, math.nan if gauss is None else gauss], np.float64)  # words have 32 bits


def _set_python_state(state: Array) -> None:
    version, *words, gauss = state.tolist()
    random.setstate((int(version), tuple(map(int, words)), None if math.isnan(gauss) else gauss))


def _numpy_state() -> Array:
    _, key, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # what users of the old functions need
    return np.array([*key, position, has_gauss, gauss], np.float64)


def _set_numpy_state(state: Array) -> None:
    key, (position, has_gauss, gauss) = state[:624].astype(np.uint32), state[624:].tolist()
    np.random.set_state(("MT19937", key, int(position), int(has_gauss), gauss))  # noqa: NPY002


def encode(value: Any, name: str, arrays: dict[str, Array]) -> Any:
    """Returns a value as JSON, exactly; arrays in it are put into `arrays` under names that begin with `name`.

    Raises:
        TypeError: it, or something in it, is nothing that can be saved without pickle.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (tf.Tensor, keras.Variable, np.ndarray)):
        array: Array = np.asarray(value)
        if array.dtype.name not in DTYPES:
            raise TypeError(f"an array of {array.dtype} is not saved")
        arrays[name] = array
        return {"$array": name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, list):
        return [encode(inner, f"{name}/{k}", arrays) for k, inner in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(inner, f"{name}/{k}", arrays) for k, inner in enumerate(value)]}
    if isinstance(value, (set, frozenset)) and all(isinstance(inner, (int, str)) for inner in value):
        return {"$set": sorted(value, key=repr)}
    if isinstance(value, dict):
        pairs = [
            [encode(key, f"{name}/{k}/key", arrays), encode(inner, f"{name}/{k}", arrays)]
            for k, (key, inner) in enumerate(value.items())
        ]
        return {"$dict": pairs}
    name_of = getattr(value, "__name__", "")
    if name_of and getattr(keras.ops, name_of, None) is value:  # which way is better, in Keras' callbacks
        return {"$op": name_of}
    raise TypeError(f"{type(value).__name__} is not saved")


def decode(value: Any, read: Callable[[str], Array]) -> Any:
    """Returns what `encode` made `value` of; `read` gives an array by its name."""
    if isinstance(value, list):
        return [decode(inner, read) for inner in value]
    if not isinstance(value, dict):
        return value
    ((key, inner),) = value.items()
    if key == "$float":
        return float(inner)
    if key == "$array":
        return read(inner)
    if key == "$tuple":
        return tuple(decode(item, read) for item in inner)
    if key == "$set":
        return set(inner)
    if key == "$op":
        return getattr(keras.ops, inner)
    return {decode(k, read): decode(v, read) for k, v in inner}


def plain_attributes(thing: object, name: str) -> dict[str, tuple[Any, dict[str, Array]]]:
    """Returns the attributes of an object that can be saved, without those that lead to the model.

    Each is what `encode` makes of it, and the arrays in it, under names that begin with `name`.
    """
    found: dict[str, tuple[Any, dict[str, Array]]] = {}
    for attribute, value in vars(thing).items():
        arrays: dict[str, Array] = {}
        if attribute not in ("_model", "params"):
            with contextlib.suppress(TypeError):  # it is none that can be saved
                found[attribute] = encode(value, f"{name}/{attribute}", arrays), arrays
    return found


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> list[str]:
    """Returns in words, a line each, in what two flat dicts differ; first what the model has, as others follow it."""
    lines = []
    for key in sorted({**saved, **now}, key=lambda key: not key.startswith("model/")):
        if key not in now:
            lines.append(f"  {what} {key}: {saved[key]} in the checkpoint, none now")
        elif key not in saved:
            lines.append(f"  {what} {key}: {now[key]} now, none in the checkpoint")
        elif saved[key] != now[key]:
            lines.append(f"  {what} {key}: {saved[key]} in the checkpoint, {now[key]} now")
    return lines
