"""The two kinds of accumulators: on the host for averages of epochs, in the compiled step for averages of steps.

Both keep, for each of their averages, n and for each variable of the model, under its path, m in float32 (float64 for
float64 weights), or for variables that are not floating (counters, seeds) the newest value. Both take one pass over
the weights for all averages that are due, after a pass that lets nothing through that is not finite:

    m_n = m_{n-1} + c_n (w_n - m_{n-1})
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from streaming_polyak.schedule import Average
from streaming_polyak.training.state import Slot, array_of, place, present, variable_slot

Array = NDArray[Any]
Variables = Mapping[str, keras.Variable]

# Large enough to hide the cost of a NumPy call, small enough to stay in the cache with two averages: of 64 KiB,
# 256 KiB, 512 KiB the last was fastest (1e8 parameters, three averages: 7.9, 6.4, 5.6 copies of the model).
_BLOCK = 2**17


def is_averaged(variable: keras.Variable) -> bool:
    """Tells whether a variable's values are averaged; others (integers, booleans, seeds) take the newest value."""
    return bool(keras.backend.is_float_dtype(variable.dtype))


def accumulator_dtype(variable: keras.Variable) -> np.dtype[Any]:
    """Returns the dtype in which a floating variable is averaged: float32, or float64 for float64."""
    return np.dtype("float64" if variable.dtype == "float64" else "float32")


def view(variable: keras.Variable) -> Array:
    """Returns the value as a read-only array: on a CPU the variable's own memory, else a copy of this one tensor.

    While the array lives, TensorFlow gives the variable new memory when it changes; so let it go soon.
    """
    return array_of(present(variable.value))


def largest(variable: keras.Variable) -> float:
    """Returns the largest magnitude that is averaged: w - m of two such numbers does not overflow.

    Half the range of the accumulator, or the range of the variable's dtype if that is smaller.
    """
    return min(float(np.finfo(accumulator_dtype(variable)).max) / 2, float(tf.as_dtype(variable.dtype).max))


class HostAccumulators:
    """Averages whose members are the weights after epochs, as NumPy arrays updated block by block.

    An update reads the weights where they are and needs one block of memory beside the averages.

    Args:
        averages: with `unit="epoch"`, by name.
        variables: of the built model, by path.
    """

    def __init__(self, averages: Mapping[str, Average], variables: Variables) -> None:
        self._averages, self._variables = dict(averages), variables
        self._n = dict.fromkeys(averages, 0)
        self._m = {name: {path: _initial(v) for path, v in variables.items()} for name in averages}
        self._limits = {path: largest(v) for path, v in variables.items() if is_averaged(v)}

    def count(self, name: str) -> int:
        """Returns n, the number of members in the average."""
        return self._n[name]

    def values(self, name: str) -> dict[str, Array]:
        """Returns the average by path, in the accumulators' dtype; not to be written to."""
        return self._m[name]

    def adopt(self, name: str, n: int, values: Mapping[str, Array]) -> None:
        """Makes `values` the average of `n` members."""
        for path, m in self._m[name].items():
            np.copyto(m, values[path], casting="unsafe")
        self._n[name] = n

    def slots(self) -> dict[str, Slot]:
        """Returns all that it remembers: the counters, and the averages by name and path."""
        names = list(self._n)

        def set_counts(counts: Array) -> None:
            self._n.update(zip(names, counts.tolist(), strict=True))

        slots = {"n": Slot("int64", (len(names),), lambda: np.array(list(self._n.values()), np.int64), set_counts)}
        for name, averages in self._m.items():
            for k, (path, m) in enumerate(averages.items()):
                slots[f"{name}/{place(k, path)}"] = Slot(m.dtype.name, m.shape, lambda m=m: m, partial(np.copyto, m))  # type: ignore[misc]
        return slots

    def update(self, epoch: int) -> str | None:
        """Takes the weights after `epoch` into every average that is due.

        Returns:
            The path of the first tensor with NaN or infinity, in which case no average has changed; else None.
        """
        due = [name for name, average in self._averages.items() if average.due(epoch)]
        if not due:
            return None
        values = {path: present(variable.value) for path, variable in self._variables.items()}  # no copies
        floats = {path for path, variable in self._variables.items() if is_averaged(variable)}
        for path in self._variables:
            if path in floats and not _can_be_averaged(array_of(values[path]), self._limits[path]):
                return path
        coefficients = {name: self._averages[name].weighting(self._n[name] + 1) for name in due}
        buffer = np.empty(_BLOCK, np.float64)
        for path in self._variables:
            w = array_of(values.pop(path))
            if path in floats:
                _move([(self._m[name][path], c) for name, c in coefficients.items()], w, buffer)
            else:
                for name in due:
                    np.copyto(self._m[name][path], w)
        for name in due:
            self._n[name] += 1
        return None


class GraphAccumulators:
    """Averages whose members are the weights after optimizer steps, updated inside the compiled step.

    The k averages of a variable are one tensor with k as its last, fastest axis: one XLA loop then reads each weight
    once for all of them (1e8 parameters, three averages: 1.75 copies of the model; as three tensors 2.3). The loop is
    compiled once for each shape and called for each variable, inside the graph (that alone, 1,000 tensors: 2 s to
    build and 15 ms a call; one function over all of them 5 s and 18 ms, without XLA 7 s and 116 ms).

    Args:
        averages: with `unit="step"`, by name.
        variables: of the built model, by path.
    """

    def __init__(self, averages: Mapping[str, Average], variables: Variables) -> None:
        self._averages = list(averages.values())
        self._index = {name: j for j, name in enumerate(averages)}
        self._variables = variables
        self._floats = [path for path, v in variables.items() if is_averaged(v)]
        k = len(self._averages)
        self._n = tf.Variable(np.zeros(k, np.int64), trainable=False)
        self._m = {
            path: tf.Variable(
                tf.zeros([*variables[path].shape, k], accumulator_dtype(variables[path])), trainable=False
            )
            for path in self._floats
        }
        self._newest = {
            path: [tf.Variable(v.value, trainable=False) for _ in range(k)]
            for path, v in variables.items()
            if path not in self._m
        }
        # Which tensor was not finite, when first, and how often since `take_refused`; -1 for never.
        self._refused = tf.Variable(np.array([-1, -1, 0]), trainable=False)
        self._fused = tf.function(_move_stacked, jit_compile=True, autograph=False)

    def count(self, name: str) -> int:
        """Returns n, the number of members in the average."""
        return int(self._n[self._index[name]])

    def values(self, name: str) -> dict[str, Array]:
        """Returns the average by path, in the accumulators' dtype; not to be written to."""
        j = self._index[name]
        averaged = {path: np.asarray(m.read_value())[..., j] for path, m in self._m.items()}
        newest = {path: np.asarray(copies[j].read_value()) for path, copies in self._newest.items()}
        return {path: averaged[path] if path in averaged else newest[path] for path in self._variables}

    def adopt(self, name: str, n: int, values: Mapping[str, Array]) -> None:
        """Makes `values` the average of `n` members."""
        j = self._index[name]
        for path, m in self._m.items():
            stacked = m.numpy()
            stacked[..., j] = values[path]
            m.assign(stacked)
        for path, copies in self._newest.items():
            copies[j].assign(values[path])
        self._n[j].assign(n)

    def slots(self) -> dict[str, Slot]:
        """Returns all that it remembers: the counters, the averages of each path together, what was refused."""
        slots = {"n": variable_slot(self._n), "refused": variable_slot(self._refused)}
        for k, (path, m) in enumerate(self._m.items()):
            slots[f"all/{place(k, path)}"] = variable_slot(m)
        for k, (path, copies) in enumerate(self._newest.items()):
            for j, newest in enumerate(copies):
                slots[f"newest/{j}/{place(k, path)}"] = variable_slot(newest)
        return slots

    def update(self, step: tf.Tensor) -> None:
        """Takes the weights after `step` (int64 scalar, from 0) into every average that is due; called in a graph.

        Weights that are not finite are refused as a whole, which `take_refused` tells.
        """
        due = tf.stack([average.due(step) for average in self._averages])
        tf.cond(tf.reduce_any(due), lambda: self._checked(step, due), lambda: False)

    def take_refused(self) -> tuple[str, int, int] | None:
        """Returns (path, first step, how many updates) of what was refused since the last call; None for nothing."""
        tensor, step, times = (int(value) for value in self._refused.numpy())
        if not times:
            return None
        self._refused.assign([-1, -1, 0])
        return self._floats[tensor], step, times

    def _checked(self, step: tf.Tensor, due: tf.Tensor) -> tf.Tensor:
        weights = [self._variables[path].value.read_value() for path in self._floats]
        limits = {v.dtype: tf.constant(largest(v), v.dtype) for v in map(self._variables.__getitem__, self._floats)}
        # NaN is not below anything.
        finite = tf.stack([tf.reduce_all(tf.abs(w) <= limits[w.dtype.name]) for w in weights])

        def accept() -> bool:
            n = self._n + tf.cast(due, tf.int64)
            # Not due: n may be 0 and the coefficient is not used.
            c = tf.stack([a.weighting(tf.maximum(n[j], 1)) for j, a in enumerate(self._averages)])
            for path, m in self._m.items():
                self._fused(self._variables[path].value, m, c, due)
            for path, copies in self._newest.items():
                value = self._variables[path].value.read_value()
                for j, newest in enumerate(copies):
                    newest.assign(tf.where(due[j], value, newest.read_value()))
            self._n.assign(n)
            return True

        def refuse() -> bool:
            first = tf.argmin(tf.cast(finite, tf.int32))
            before = self._refused.read_value()
            now = tf.where(before[2] > 0, before[:2], tf.stack([first, step]))
            self._refused.assign(tf.concat([now, before[2:] + 1], 0))
            return False

        return tf.cond(tf.reduce_all(finite), accept, refuse)


def _move_stacked(weight: tf.Variable, m: tf.Variable, c: tf.Tensor, due: tf.Tensor) -> None:
    """Does m += c * (w - m) where due; `m` has one axis more than the weight, of the length of `c` and `due`."""
    before = m.read_value()
    w = tf.cast(weight.read_value(), m.dtype)[..., tf.newaxis]
    m.assign(tf.where(due, before + tf.cast(c, m.dtype) * (w - before), before))


def _initial(variable: keras.Variable) -> Array:
    """Zeros to be averaged into, written so that their memory is taken now and not in mid-run; or the present value."""
    if is_averaged(variable):
        return np.full(variable.shape, 0, accumulator_dtype(variable))
    return view(variable).copy()


def _can_be_averaged(w: Array, limit: float) -> bool:
    """Whether no number is NaN, infinite or beyond the limit; minimum and maximum of a NaN are NaN."""
    flat = w.reshape(-1)
    blocks = (flat[lo : lo + _BLOCK] for lo in range(0, flat.size, _BLOCK))
    with np.errstate(invalid="ignore"):
        return all(-limit <= float(block.min()) and float(block.max()) <= limit for block in blocks)


def _move(targets: list[tuple[Array, float]], w: Array, buffer: Array) -> None:
    """Does m += c * (w - m) for each (m, c), block by block, each block of `w` read and converted once."""
    dtype = targets[0][0].dtype
    difference_of = buffer.view(dtype)
    converted_of = np.empty(0 if w.dtype == dtype else min(_BLOCK, w.size), dtype)
    flat = w.reshape(-1)
    flats = [(m.reshape(-1), dtype.type(c)) for m, c in targets]
    for lo in range(0, flat.size, _BLOCK):
        block = flat[lo : lo + _BLOCK]
        if w.dtype != dtype:
            np.copyto(converted_of[: block.size], block)
            block = converted_of[: block.size]
        difference = difference_of[: block.size]
        for m, c in flats:
            part = m[lo : lo + _BLOCK]
            np.subtract(block, part, out=difference)
            np.multiply(difference, c, out=difference)
            np.add(part, difference, out=part)
