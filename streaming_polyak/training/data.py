"""Batches: from arrays in an order that is a pure function of (seed, epoch), or from a tf.data pipeline.

Arrays are not copied as a whole, but for small ones that are not shuffled: rows are gathered a chunk of many batches
at a time, so that the compiled loop makes many steps a call and memory-mapped arrays stay on disk. Everything else
becomes a `tf.data.Dataset`.
"""

from __future__ import annotations

from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from streaming_polyak.training.datasets import DatasetBatches, IteratorFeed, as_tuple

CHUNK_BYTES = 16 * 2**20
_KEPT_BYTES = 2**20  # of rows that are not shuffled: read once, and held as tensors for the evaluation of each epoch


def epoch_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """Returns the order in which `rows` samples are seen in `epoch`: a permutation, int64 of shape (rows,).

    The same for the same three numbers, whatever was trained before; another one for every epoch and seed.
    """
    return np.random.default_rng([seed, epoch]).permutation(rows)


class Feed(Protocol):
    """What is left of one epoch."""

    def more(self) -> bool:
        """Whether batches may be left; only a data set of unknown length can say yes and then give none."""


class Batches(Protocol):
    """Where the batches of each epoch come from."""

    steps: int | None
    """Batches in an epoch, if known beforehand."""

    def epoch(self, epoch: int, done: int = 0) -> Feed:
        """Returns a feed of the batches of `epoch` (counted from 0), without the first `done` of them."""

    def specs(self) -> Any:
        """Returns what a batch looks like: (x,), (x, y) or (x, y, sample_weight) of tf.TensorSpec, batch axis None."""

    def end_epoch(self) -> None:
        """Is called after each epoch of training."""

    def describe(self) -> dict[str, Any]:
        """Returns what a resumed run must have the same of, as JSON values."""

    def check_resumable(self) -> None:
        """Checks that a later process can go on where this one stopped.

        Raises:
            ValueError: it cannot.
        """

    def state(self) -> dict[str, NDArray[Any]]:
        """Returns what (epoch, done) alone do not tell of where the batches are."""

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Goes to where `state` was; the next call of `epoch` has the `epoch` and `done` of that time."""


class RowKind:
    """What batches of rows look like.

    Args:
        batch_size: rows a batch, but for the last of an epoch.
        specs: (x,), (x, y) or (x, y, sample_weight) of tf.TensorSpec, batch axis None.
    """

    def __init__(self, batch_size: int, specs: Any) -> None:
        self.batch_size, self.specs = batch_size, specs
        self.name = f"{batch_size} {specs}"


class RowFeed:
    """Rows of arrays in a given order, handed out as chunks of whole batches.

    Args:
        data: the arrays.
        order: of the rows; `None` as they are.
        rows: how many of them.
        kind: of the batches.
        done: how many batches are left out at the beginning.
        whole: all rows in order as tensors, if they are at hand.
    """

    def __init__(
        self,
        data: Any,
        order: NDArray[np.int64] | None,
        rows: int,
        kind: RowKind,
        done: int = 0,
        whole: Any = None,
    ) -> None:
        self.kind = kind
        self._data, self._order, self._rows = data, order, rows
        self._next = min(done * kind.batch_size, rows)  # the first row that was not handed out
        self._chunk = whole
        self._chunk_first, self._chunk_end = 0, 0 if whole is None else rows
        row_bytes = sum(a.nbytes // max(1, len(a)) for a in keras.tree.flatten(data))
        self._chunk_rows = kind.batch_size * max(1, CHUNK_BYTES // max(1, row_bytes * kind.batch_size))

    def more(self) -> bool:
        """Whether rows are left."""
        return self._next < self._rows

    def take(self, steps: int) -> tuple[Any, int, int]:
        """Hands out up to `steps` batches, at least one.

        Returns:
            (chunk, first, end): tensors of many rows, and which of its batches are meant, `first <= i < end`, the
            i-th being the rows from `i * batch_size` on; the last of an epoch may be smaller.
        """
        if self._next >= self._chunk_end:
            self._chunk_first = self._next
            self._chunk_end = min(self._next + self._chunk_rows, self._rows)
            rows: Any = slice(self._chunk_first, self._chunk_end)
            if self._order is not None:
                rows = self._order[rows]
            self._chunk = keras.tree.map_structure(lambda a: _tensor(a[rows]), self._data)
        size = self.kind.batch_size
        first = (self._next - self._chunk_first) // size
        end = min(first + steps, -(-(self._chunk_end - self._chunk_first) // size))
        self._next = min(self._chunk_first + end * size, self._chunk_end)
        return self._chunk, first, end


class _ByNumber:
    """Batches that (seed, epoch, done) tell all of."""

    def check_resumable(self) -> None:
        """Does nothing: any batch can be gone to; what a PyDataset itself remembers is its own matter."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Returns nothing."""
        return {}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Does nothing."""


class ArrayBatches(_ByNumber):
    """Batches of arrays.

    Args:
        data: (x,), (x, y) or (x, y, sample_weight), each an array or a nest of arrays with equal first dimensions.
        batch_size: rows a batch.
        seed: for the order of the epochs; `None` keeps the rows as they are.
        steps: batches an epoch; `None` for all.

    Raises:
        TypeError: a leaf is no array.
        ValueError: lengths differ, there are no rows, or fewer batches than `steps`.
    """

    def __init__(self, data: Any, batch_size: int, seed: int | None = None, steps: int | None = None) -> None:
        self._data = keras.tree.map_structure(_array, data)
        lengths = [len(leaf) for leaf in keras.tree.flatten(self._data)]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                f"Expected arrays with the same number of rows, at least one, got lengths {lengths}. "
                "Pass x, y and sample_weight with one row a sample each."
            )
        self._seed, self._rows = seed, lengths[0]
        available = -(-self._rows // batch_size)
        if steps is not None and steps > available:
            raise ValueError(
                f"Expected steps_per_epoch <= {available}, the batches of {batch_size} in {self._rows} rows, got "
                f"steps_per_epoch={steps}. Leave it out to use all rows in each epoch."
            )
        self.steps: int | None = steps or available
        self._kind = RowKind(batch_size, keras.tree.map_structure(_spec, self._data))
        few = seed is None and sum(leaf.nbytes for leaf in keras.tree.flatten(self._data)) <= _KEPT_BYTES
        self._whole = keras.tree.map_structure(_tensor, self._data) if few else None

    def epoch(self, epoch: int, done: int = 0) -> RowFeed:
        """Returns a feed of the batches of `epoch`."""
        order = None if self._seed is None else epoch_order(self._seed, epoch, self._rows)
        rows = min(self._rows, (self.steps or 0) * self._kind.batch_size)
        return RowFeed(self._data, order, rows, self._kind, done, self._whole)

    def specs(self) -> Any:
        """Returns what a batch looks like."""
        return self._kind.specs

    def end_epoch(self) -> None:
        """Does nothing: the next order needs no state."""

    def describe(self) -> dict[str, Any]:
        """Returns number of rows, batch size and so on."""
        return {
            "kind": "arrays",
            "rows": self._rows,
            "batch_size": self._kind.batch_size,
            "steps_per_epoch": self.steps,
            "shuffle": self._seed is not None,
        }


class SequenceBatches(_ByNumber):
    """Batches of a `keras.utils.PyDataset`, fetched by its own number of `workers`, as threads.

    Args:
        source: gives batch i as (x,), (x, y) or (x, y, sample_weight) by `source[i]`.
        seed: for the order in which the batches are seen in each epoch; `None` keeps it.
        steps: batches an epoch; `None` for all.

    Raises:
        ValueError: it has no batches, no length, or fewer batches than `steps`.
    """

    def __init__(self, source: keras.utils.PyDataset, seed: int | None = None, steps: int | None = None) -> None:
        available = source.num_batches
        if available is None or available < (steps or 1):
            raise ValueError(
                f"Expected a PyDataset with at least {steps or 1} batches and a known number of them, got "
                f"num_batches={available}. Give it a __len__, or a smaller steps_per_epoch."
            )
        self._source, self._seed, self._available = source, seed, available
        self.steps: int | None = steps or available
        first, last = (keras.tree.map_structure(_plain, as_tuple(source[i])) for i in (0, available - 1))
        self._specs = keras.tree.map_structure(_spec_of_both, first, last)

    def epoch(self, epoch: int, done: int = 0) -> IteratorFeed:
        """Returns a feed of the batches of `epoch`."""
        if hasattr(self._source, "on_epoch_begin"):
            self._source.on_epoch_begin()
        order = np.arange(self._available)
        if self._seed is not None:
            order = epoch_order(self._seed, epoch, self._available)
        left = order[done : self.steps]
        dataset = tf.data.Dataset.from_tensor_slices(left if len(left) else order).map(
            self._fetch, num_parallel_calls=max(1, self._source.workers), deterministic=True
        )
        batches = DatasetBatches(dataset.prefetch(2))
        return batches.epoch(epoch) if len(left) else IteratorFeed(batches, 0)

    def _fetch(self, index: tf.Tensor) -> Any:
        def read(i: Any) -> list[NDArray[Any]]:
            return [_plain(leaf) for leaf in keras.tree.flatten(as_tuple(self._source[int(i)]))]

        specs = keras.tree.flatten(self._specs)
        leaves = tf.numpy_function(read, [index], [spec.dtype for spec in specs])
        leaves = [tf.ensure_shape(leaf, spec.shape) for leaf, spec in zip(leaves, specs, strict=True)]
        return keras.tree.pack_sequence_as(self._specs, leaves)

    def specs(self) -> Any:
        """Returns what a batch looks like, judged by the first and the last."""
        return self._specs

    def end_epoch(self) -> None:
        """Tells the PyDataset, which may then change its own batches."""
        self._source.on_epoch_end()

    def describe(self) -> dict[str, Any]:
        """Returns number of batches and so on."""
        return {
            "kind": "PyDataset",
            "batches": self._available,
            "steps_per_epoch": self.steps,
            "shuffle": self._seed is not None,
        }


def make_batches(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
) -> Batches:
    """Makes batches of what Keras users pass as data.

    Args:
        x: an array or a nest (tuple, list, dict) of arrays with one row a sample, a `tf.data.Dataset` of batches, or a
            `keras.utils.PyDataset`; the latter two bring y and sample_weight along.
        y: targets, as x.
        sample_weight: a weight for each sample, as x.
        batch_size: rows a batch, for arrays only; `None` for 32.
        seed: for the order of arrays and of a PyDataset's batches; `None` keeps it.
        steps: batches an epoch; `None` for all.

    Raises:
        ValueError: arguments that do not go together, or no data.
        TypeError: `x` is of no such kind.
    """
    for name, value in (("batch_size", batch_size), ("steps_per_epoch", steps)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"Expected {name} as a whole number >= 1, got {name}={value!r}.")
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        kind = "tf.data.Dataset" if isinstance(x, tf.data.Dataset) else "PyDataset"
        given = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}
        if extra := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"Expected x alone, as a {kind} brings its own batches; got {', '.join(extra)} too.")
        if isinstance(x, tf.data.Dataset):
            return DatasetBatches(x, steps)
        return SequenceBatches(x, seed, steps)
    if y is None and sample_weight is not None:
        raise ValueError("Expected y together with sample_weight, got sample_weight alone.")
    data = (x, y, sample_weight)[: 1 + (y is not None) + (sample_weight is not None)]
    return ArrayBatches(data, batch_size or 32, seed, steps)


def _array(leaf: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asanyarray(leaf)
    if array.ndim == 0 or (array.dtype == object and not all(isinstance(v, str) for v in array.flat)):
        raise TypeError(
            f"Expected x, y and sample_weight as arrays (or nests of them), a tf.data.Dataset or a "
            f"keras.utils.PyDataset, got {type(leaf).__name__}. Convert it with numpy.asarray."
        )
    return array


def _plain(leaf: Any) -> NDArray[Any]:
    """An array with floats in Keras' `floatx`, as `Model.fit` has them."""
    array: NDArray[Any] = np.asarray(leaf)
    return array.astype(keras.config.floatx()) if np.issubdtype(array.dtype, np.floating) else array


def _spec(array: NDArray[Any]) -> tf.TensorSpec:
    return tf.TensorSpec([None, *array.shape[1:]], _tensor(array[:1]).dtype)


def _spec_of_both(a: NDArray[Any], b: NDArray[Any]) -> tf.TensorSpec:
    return tf.TensorSpec(
        [None, *(m if m == n else None for m, n in zip(a.shape[1:], b.shape[1:], strict=True))], a.dtype
    )


def _tensor(rows: NDArray[Any]) -> tf.Tensor:
    return tf.convert_to_tensor(_plain(rows))
