"""The two kinds of accumulators: on the host for averages of epochs, in the compiled step for averages of steps.

Both keep, for each of their averages, n and for each variable of the model, under its path, m in float32 or float64
(and what m lacks, if it is compensated), or for variables that are not floating (counters, seeds) the newest value.
The m of averages of one precision are one array, so that one pass over the weights moves all that are due, after a
pass that lets nothing through that is not finite:

    m_n = m_{n-1} + c_n (w_n - m_{n-1})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from streaming_polyak.schedule import Average
from streaming_polyak.training.compiled import Reader
from streaming_polyak.training.kernels import Kernel, Weights, check_blocks, move_blocks
from streaming_polyak.training.state import Slot, array_of, place, present, variable_slot

Array = NDArray[Any]
Variables = Mapping[str, keras.Variable]

_SMALL = 2**17  # numbers of a model that is gathered into one array first, which costs less than a call for each tensor


def is_averaged(variable: keras.Variable) -> bool:
    """Tells whether a variable's values are averaged; others (integers, booleans, seeds) take the newest value."""
    return bool(keras.backend.is_float_dtype(variable.dtype))


def accumulator_dtype(variable: keras.Variable, dtype: str | None = None) -> np.dtype[Any]:
    """Returns the dtype in which a floating variable is averaged: `dtype`, or float32, or float64 for float64."""
    return np.dtype(dtype or ("float64" if variable.dtype == "float64" else "float32"))


def _size(variable: keras.Variable) -> int:
    return int(np.prod(variable.shape))


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


@dataclass(frozen=True)
class Precision:
    """How exactly averages are kept; see `Average`."""

    dtype: str | None
    compensated: bool

    @classmethod
    def groups(cls, averages: Mapping[str, Average]) -> dict[Precision, list[str]]:
        """Returns the names of averages by precision."""
        groups: dict[Precision, list[str]] = {}
        for name, average in averages.items():
            groups.setdefault(cls(average.dtype, average.compensated), []).append(name)
        return groups

    def __str__(self) -> str:
        return f"{self.dtype or 'plain'}{'-compensated' if self.compensated else ''}"


class HostStack:
    """The averages of one precision on the host.

    Args:
        precision: of all of them.
        names: of the averages; they are the rows of each array.
        variables: floating ones, by path.
    """

    def __init__(self, precision: Precision, names: list[str], variables: Variables) -> None:
        self.names = names
        dtypes = {path: accumulator_dtype(v, precision.dtype) for path, v in variables.items()}
        sizes = {
            dtype: sum(_size(v) for p, v in variables.items() if dtypes[p] == dtype) for dtype in {*dtypes.values()}
        }
        # Written, so that their memory is taken now and not in mid-run.
        self.flat_m = {dtype: np.full((len(names), size), 0, dtype) for dtype, size in sizes.items()}
        self.flat_e = {dtype: np.full_like(m, 0) for dtype, m in self.flat_m.items() if precision.compensated}
        self._where: dict[str, tuple[np.dtype[Any], slice, tuple[int, ...]]] = {}
        begin = dict.fromkeys(sizes, 0)
        for path, variable in variables.items():
            dtype, first = dtypes[path], begin[dtypes[path]]
            begin[dtype] += _size(variable)
            self._where[path] = dtype, slice(first, begin[dtype]), tuple(variable.shape)
        # Where each variable begins in the arrays of its dtype.
        self.columns = {
            dtype: np.array([part.start if of == dtype else -1 for of, part, _ in self._where.values()], np.int64)
            for dtype in sizes
        }

    def arrays(self, name: str) -> dict[str, dict[str, Array]]:
        """Returns what an average consists of: "m" and, if it is compensated, "e", each by path."""
        j = self.names.index(name)
        kinds = {"m": self.flat_m, "e": self.flat_e} if self.flat_e else {"m": self.flat_m}
        return {
            kind: {path: flat[dtype][j, part].reshape(shape) for path, (dtype, part, shape) in self._where.items()}
            for kind, flat in kinds.items()
        }


class Copies(Sequence[Array]):
    """The values of tensors on another device as arrays, one at a time.

    Args:
        tensors: of any shapes.
    """

    def __init__(self, tensors: Sequence[tf.Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, k: Any) -> Any:
        return array_of(self._tensors[k])


class HostAccumulators:
    """Averages whose members are the weights after epochs, as NumPy arrays.

    An update reads the weights where they are and needs some blocks of memory beside the averages.

    Args:
        averages: with `unit="epoch"`, by name.
        variables: of the built model, by path.
    """

    def __init__(self, averages: Mapping[str, Average], variables: Variables) -> None:
        self._averages, self._variables = dict(averages), variables
        self._n = dict.fromkeys(averages, 0)
        self._floats = {path: v for path, v in variables.items() if is_averaged(v)}
        self._limits = {view(v).dtype: largest(v) for v in self._floats.values()}
        self._stacks = [HostStack(p, names, self._floats) for p, names in Precision.groups(averages).items()]
        self._newest = {
            name: {path: view(v).copy() for path, v in variables.items() if path not in self._floats}
            for name in averages
        }
        self._reader = Reader([v.value for v in self._floats.values()])
        sizes, dtypes = [_size(v) for v in self._floats.values()], [view(v).dtype for v in self._floats.values()]
        self._kernel = Kernel(sizes, dtypes, len(averages))
        self._gathers = 0 < sum(sizes) <= _SMALL and len({*dtypes}) == 1

    def count(self, name: str) -> int:
        """Returns n, the number of members in the average."""
        return self._n[name]

    def values(self, name: str) -> dict[str, Array]:
        """Returns the average by path, in the accumulators' dtype; not to be written to."""
        values = {**self._arrays(name)["m"], **self._newest[name]}
        return {path: values[path] for path in self._variables}

    def adopt(self, name: str, n: int, values: Mapping[str, Array]) -> None:
        """Makes `values` the average of `n` members."""
        for path, m in self.values(name).items():
            np.copyto(m, values[path], casting="unsafe")
        for e in self._arrays(name).get("e", {}).values():
            e.fill(0)
        self._n[name] = n

    def slots(self) -> dict[str, Slot]:
        """Returns all that it remembers: the counters, and the averages by name and path."""
        names = list(self._n)

        def set_counts(counts: Array) -> None:
            self._n.update(zip(names, counts.tolist(), strict=True))

        slots = {"n": Slot("int64", (len(names),), lambda: np.array(list(self._n.values()), np.int64), set_counts)}
        for name in names:
            arrays = {"m": self.values(name), **{k: v for k, v in self._arrays(name).items() if k != "m"}}
            for kind, by_path in arrays.items():
                for k, (path, a) in enumerate(by_path.items()):
                    slot = Slot(a.dtype.name, a.shape, lambda a=a: a, partial(np.copyto, a))  # type: ignore[misc]
                    slots[f"{name}/{kind}/{place(k, path)}"] = slot
        return slots

    def due(self, epoch: int) -> list[str]:
        """Returns the names of the averages that `update` would take the weights after `epoch` into."""
        return [name for name, average in self._averages.items() if average.due(epoch)]

    def update(self, epoch: int) -> str | None:
        """Takes the weights after `epoch` into every average that is due.

        Returns:
            The path of the first tensor with NaN or infinity, in which case no average has changed; else None.
        """
        due = self.due(epoch)
        if not due:
            return None
        tensors = self._reader()
        here = "CPU:" in tensors[0].device if tensors else True
        arrays: Sequence[Array] = [array_of(t) for t in tensors] if here else Copies(tensors)
        gathered = np.concatenate(arrays, axis=None) if self._gathers else None
        weights = Weights(arrays)
        if gathered is None or not check_blocks(gathered, min(self._limits.values())):
            bad = self._kernel.check(weights, self._limits.__getitem__)
            if bad is not None:
                return list(self._floats)[bad]
        for stack in self._stacks:
            self._move(stack, [name for name in due if name in stack.names], weights, gathered)
        for name in due:
            for path, newest in self._newest[name].items():
                np.copyto(newest, view(self._variables[path]))
            self._n[name] += 1
        return None

    def _move(self, stack: HostStack, due: list[str], weights: Weights, gathered: Array | None) -> None:
        if not due:
            return
        rows = np.array([stack.names.index(name) for name in due])
        c = np.array([self._averages[name].weighting(self._n[name] + 1) for name in due])
        for dtype, m in stack.flat_m.items():
            if gathered is not None:
                move_blocks(gathered, m, stack.flat_e.get(dtype), 0, rows, c.astype(dtype))
            else:
                self._kernel.move(weights, m, stack.flat_e.get(dtype), stack.columns[dtype], rows, c.astype(dtype))

    def _arrays(self, name: str) -> dict[str, dict[str, Array]]:
        return next(stack.arrays(name) for stack in self._stacks if name in stack.names)


class GraphStack:
    """The averages of one precision in the graph; those of one variable are one tensor, see `GraphAccumulators`.

    Args:
        precision: of all of them.
        indices: the places of these averages among all.
        variables: floating ones, by path.
    """

    def __init__(self, precision: Precision, indices: list[int], variables: Variables) -> None:
        self.indices = indices

        def zeros(path: str, variable: keras.Variable) -> tf.Variable:
            shape = [*variable.shape, len(indices)]
            return tf.Variable(tf.zeros(shape, accumulator_dtype(variable, precision.dtype)), trainable=False)

        self.m = {path: zeros(path, v) for path, v in variables.items()}
        self.e = {path: zeros(path, v) for path, v in variables.items()} if precision.compensated else {}
        self.kind = str(precision)


class GraphAccumulators:
    """Averages whose members are the weights after optimizer steps, updated inside the compiled step.

    The k averages of a variable (of one precision) are one tensor with k as its last, fastest axis: one XLA loop then
    reads each weight once for all of them (1e8 parameters, three averages: 1.75 copies of the model; as three tensors
    2.3). The loop is compiled once for each shape and called for each variable, inside the graph (that alone, 1,000
    tensors: 2 s to build and 15 ms a call; one function over all of them 5 s and 18 ms, without XLA 7 s and 116 ms).

    Args:
        averages: with `unit="step"`, by name.
        variables: of the built model, by path.
    """

    def __init__(self, averages: Mapping[str, Average], variables: Variables) -> None:
        self._averages = list(averages.values())
        self._index = {name: j for j, name in enumerate(averages)}
        self._variables = variables
        floats = {path: v for path, v in variables.items() if is_averaged(v)}
        self._floats = list(floats)
        k = len(self._averages)
        self._n = tf.Variable(np.zeros(k, np.int64), trainable=False)
        self._stacks = [
            GraphStack(precision, [self._index[name] for name in names], floats)
            for precision, names in Precision.groups(averages).items()
        ]
        self._newest = {
            path: [tf.Variable(v.value, trainable=False) for _ in range(k)]
            for path, v in variables.items()
            if path not in floats
        }
        # Which tensor was not finite, when first, and how often since `take_refused`; -1 for never.
        self._refused = tf.Variable(np.array([-1, -1, 0]), trainable=False)
        self._fused = tf.function(_move_stacked, jit_compile=True, autograph=False)

    def count(self, name: str) -> int:
        """Returns n, the number of members in the average."""
        return int(self._n[self._index[name]])

    def values(self, name: str) -> dict[str, Array]:
        """Returns the average by path, in the accumulators' dtype; not to be written to."""
        stack, i = self._place(name)
        averaged = {path: np.asarray(m.read_value())[..., i] for path, m in stack.m.items()}
        j = self._index[name]
        newest = {path: np.asarray(copies[j].read_value()) for path, copies in self._newest.items()}
        return {path: averaged[path] if path in averaged else newest[path] for path in self._variables}

    def adopt(self, name: str, n: int, values: Mapping[str, Array]) -> None:
        """Makes `values` the average of `n` members."""
        stack, i = self._place(name)
        for kind in (stack.m, stack.e):
            for path, variable in kind.items():
                stacked = variable.numpy()
                stacked[..., i] = values[path] if kind is stack.m else 0
                variable.assign(stacked)
        j = self._index[name]
        for path, copies in self._newest.items():
            copies[j].assign(values[path])
        self._n[j].assign(n)

    def slots(self) -> dict[str, Slot]:
        """Returns all that it remembers: the counters, the averages of each path together, what was refused."""
        slots = {"n": variable_slot(self._n), "refused": variable_slot(self._refused)}
        for stack in self._stacks:
            for kind, variables in (("m", stack.m), ("e", stack.e)):
                for k, (path, variable) in enumerate(variables.items()):
                    slots[f"{stack.kind}/{kind}/{place(k, path)}"] = variable_slot(variable)
        for k, (path, copies) in enumerate(self._newest.items()):
            for j, newest in enumerate(copies):
                slots[f"newest/{j}/{place(k, path)}"] = variable_slot(newest)
        return slots

    def _place(self, name: str) -> tuple[GraphStack, int]:
        j = self._index[name]
        return next((stack, stack.indices.index(j)) for stack in self._stacks if j in stack.indices)

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

        def one_by_one() -> tf.Tensor:
            # NaN is not below anything.
            return tf.stack([tf.reduce_all(tf.abs(w) <= limits[w.dtype.name]) for w in weights])

        # One quick pass; a sum of squares is finite only if all is well, or too large although all is well.
        squares = [tf.cast(tf.nn.l2_loss(w), tf.float64) for w in weights]
        well = tf.reduce_all(tf.math.is_finite(tf.stack(squares)))
        finite = tf.cond(well, lambda: tf.ones(len(weights), tf.bool), one_by_one)

        def accept() -> bool:
            n = self._n + tf.cast(due, tf.int64)
            # Not due: n may be 0 and the coefficient is not used.
            c = tf.stack([a.weighting(tf.maximum(n[j], 1)) for j, a in enumerate(self._averages)])
            for stack in self._stacks:
                its_c, its_due = tf.gather(c, stack.indices), tf.gather(due, stack.indices)
                for path, m in stack.m.items():
                    self._fused(self._variables[path].value, m, stack.e.get(path), its_c, its_due)
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


def _move_stacked(weight: tf.Variable, m: tf.Variable, e: tf.Variable | None, c: tf.Tensor, due: tf.Tensor) -> None:
    """Does m += c * (w - m) where due; `m` has one axis more than the weight, of the length of `c` and `due`.

    With `e`, what `m` lacks, it is compensated, see `kernels`.
    """
    before = m.read_value()
    w = tf.cast(weight.read_value(), m.dtype)[..., tf.newaxis]
    c = tf.cast(c, m.dtype)
    if e is None:
        m.assign(tf.where(due, before + c * (w - before), before))
        return
    rest = e.read_value()
    y = c * ((w - before) - rest) + rest
    total = before + y
    added = total - before
    m.assign(tf.where(due, total, before))
    e.assign(tf.where(due, (before - (total - added)) + (y - added), rest))
