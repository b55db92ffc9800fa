"""Batches of a `tf.data.Dataset`, and how a later process goes on in the middle of one."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

logger = logging.getLogger("streaming_polyak")

_PLAIN = re.compile(
    "(Range|Tensor|TensorSlice|Shuffle|(Padded|Parallel)?Batch|(Parallel)?Map|Prefetch|Take|Skip|Filter|"
    "Shard|Options|Model|FixedLengthRecord|TextLine|TFRecord|Generator|MapAndBatch|Window)Dataset(V[0-9])?$"
)

_EMPTY = "Expected a data set with at least one batch, got an empty one."


class IteratorFeed:
    """What is left of one epoch of a data set."""

    def __init__(self, source: DatasetBatches, steps: int | None) -> None:
        self._source, self._left = source, steps
        self._fresh = self.ended = False

    def more(self) -> bool:
        """Whether batches may be left."""
        return not self.ended and self._left != 0

    def take(self, steps: int) -> tuple[Any, int]:
        """Returns (iterator, how many batches to take from it at most); `took` must be told what came of it."""
        iterator, self._fresh = self._source.iterator()
        return iterator, steps if self._left is None else min(steps, self._left)

    def took(self, asked: int, steps: int) -> None:
        """Notes that `asked` batches were wanted and `steps` of them there; fewer is the end of the data set."""
        self._source.took(steps)
        if self._left is not None:
            self._left -= steps
        if steps < asked:
            if self._fresh and not steps:
                raise ValueError(_EMPTY)
            self._source.rewind()
            self.ended = self._source.whole


@dataclass
class DatasetBatches:
    """Batches of a `tf.data.Dataset`.

    Without `steps`, each epoch is one whole pass. With `steps` (batches an epoch) the data set is read on from where
    the last epoch stopped, and from its beginning when it runs out.

    Raises:
        ValueError: the data set never ends and `steps` is not given.
    """

    dataset: tf.data.Dataset
    steps: int | None = None
    _iterator: Any = field(default=None, init=False)
    _passes: int = field(default=0, init=False)  # how many were begun
    _taken: int = field(default=0, init=False)  # batches of the last one
    _anchor: dict[str, NDArray[Any]] = field(default_factory=dict, init=False)  # its state before its first batch
    _anchored: bool = field(default=False, init=False)  # whether to keep that
    whole: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        cardinality = int(self.dataset.cardinality())
        self.whole = self.steps is None
        if self.steps is None and cardinality == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "Expected steps_per_epoch with a data set that never ends. Pass it to fit, or shorten the data set "
                "with take(n)."
            )
        if cardinality == 0:
            raise ValueError(_EMPTY)
        if self.steps is None and cardinality > 0:
            self.steps = cardinality

    def epoch(self, epoch: int, done: int = 0) -> IteratorFeed:
        """Returns a feed of the batches of `epoch`; those that are done have been read from the open iterator."""
        if self.whole and not done:
            self.rewind()
        feed = IteratorFeed(self, None if self.steps is None else self.steps - done)
        feed.ended = self.whole and done > 0 and self._iterator is None
        return feed

    def iterator(self) -> tuple[Any, bool]:
        """Returns the open iterator, and whether nothing was read from it yet."""
        if self._iterator is not None:
            return self._iterator, False
        self._iterator = iter(self.dataset)
        self._passes += 1
        self._taken = 0
        if self._anchored:
            self._anchor = _saved(self._iterator)
        return self._iterator, True

    def took(self, count: int) -> None:
        """Notes that batches were taken from the open iterator."""
        self._taken += count

    def rewind(self) -> None:
        """Makes the next batch the first of a new pass."""
        self._iterator = None

    def specs(self) -> Any:
        """Returns what a batch looks like."""
        return as_tuple(self.dataset.element_spec)

    def end_epoch(self) -> None:
        """Does nothing: a data set shuffles itself."""

    def describe(self) -> dict[str, Any]:
        """Returns what its batches look like, and how many an epoch has."""
        spec = keras.tree.map_structure(str, keras.tree.flatten(self.dataset.element_spec))
        return {"kind": "tf.data.Dataset", "element_spec": spec, "steps_per_epoch": self.steps}

    def check_resumable(self) -> None:
        """Checks that the order of the data set is not another one in each process."""
        graph = _graph(self.dataset)
        for op in _unseeded(graph):
            raise ValueError(
                f"Expected a data set that gives the same batches in a resumed run, but its {op} has no seed. Give "
                "shuffle and random operations a seed, or call keras.utils.set_random_seed before the data set is made."
            )
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        # A shuffle inside of something that begins it anew, such as repeat, draws seeds at times that no state tells.
        shuffles = any(node.op.startswith("Shuffle") for node in nodes)
        self._anchored = not shuffles or all(
            _PLAIN.match(node.op) for node in nodes if node.op.endswith(("Dataset", "DatasetV2", "DatasetV3"))
        )

    def state(self) -> dict[str, NDArray[Any]]:
        """Returns how the pass began, as TensorFlow saves an iterator, and how much of it was read.

        Not the iterator as it is: that of a shuffled data set that comes to its end is not restored rightly, in that
        the next pass has another order (TensorFlow 2.21).
        """
        read = np.array([self._iterator is not None, self._passes, self._taken], np.int64)
        return {"read": read, **self._anchor}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Restores the beginning of the pass and reads on to where it was.

        Where the iterator cannot be saved, as with Python code in it or a shuffle before a repeat, all passes are read
        again.
        """
        is_open, self._passes, self._taken = (int(number) for number in state["read"])
        self._anchor = {name: data for name, data in state.items() if name != "read"}
        self._iterator = None
        if not self._passes:
            return
        if self._anchor:
            iterator = iter(self.dataset)
            with tempfile.TemporaryDirectory(prefix="streaming_polyak-") as folder:
                for name, data in self._anchor.items():
                    data.tofile(f"{folder}/iterator{name}")
                tf.train.Checkpoint(iterator=iterator).read(f"{folder}/iterator").assert_consumed()
        else:
            logger.info("Reading %d passes of the data set again, as its iterator cannot be saved.", self._passes)
            for _ in range(self._passes - 1):
                for _ in self.dataset:
                    pass
            iterator = iter(self.dataset)
        for _ in range(self._taken):
            next(iterator)
        if is_open:
            self._iterator = iterator
        else:
            next(iterator, None)


def as_tuple(batch: Any) -> tuple[Any, ...]:
    """Returns a batch as (x,), (x, y) or (x, y, sample_weight)."""
    return batch if isinstance(batch, tuple) else (batch,)


def _saved(iterator: Any) -> dict[str, NDArray[Any]]:
    """Returns the state of an iterator, as the files of a TensorFlow checkpoint; nothing if it cannot be saved."""
    with tempfile.TemporaryDirectory(prefix="streaming_polyak-") as folder:
        try:
            tf.train.Checkpoint(iterator=iterator).write(f"{folder}/iterator")
        except (tf.errors.FailedPreconditionError, tf.errors.UnimplementedError):  # Python code is part of it
            return {}
        return {
            path.name.removeprefix("iterator"): np.fromfile(path, np.uint8) for path in sorted(Path(folder).iterdir())
        }


def _graph(dataset: tf.data.Dataset) -> Any:
    """Returns the graph of a data set, a GraphDef with the functions in it."""
    ignore = 1  # state outside of the graph, such as Python's
    serialized = tf.raw_ops.DatasetToGraphV2(input_dataset=dataset._variant_tensor, external_state_policy=ignore)
    return tf.compat.v1.GraphDef.FromString(serialized.numpy())


def _unseeded(graph: Any) -> Iterator[str]:
    """Yields the kinds of what is drawn without a seed: shuffles, whose seeds are inputs, and random operations."""
    constants = {node.name: node for node in graph.node}
    for node in graph.node:
        if node.op.startswith("Shuffle"):
            seeds = [constants.get(name.split(":")[0]) for name in node.input[2:4]]
            if all(seed is not None and not tf.make_ndarray(seed.attr["value"].tensor) for seed in seeds):
                yield node.op
    for node in [*graph.node, *(node for function in graph.library.function for node in function.node_def)]:
        if {"seed", "seed2"} <= set(node.attr) and not (node.attr["seed"].i or node.attr["seed2"].i):
            yield node.op
