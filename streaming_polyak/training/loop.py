"""The GradientTape step, the evaluation step, and the compiled loop that makes many of them a call.

The inner loop knows neither averages nor files nor epochs: the outer one (`trainer`) hands it a feed and a number of
steps, and may hang one function of its own behind every real optimizer update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import keras
import tensorflow as tf

from streaming_polyak.training.compiled import Compiled
from streaming_polyak.training.data import Feed, RowFeed
from streaming_polyak.training.datasets import IteratorFeed

Step = Callable[[Any], None]
Scores = dict[str, Any]


class Loop:
    """Runs one step over batch after batch inside compiled functions; no Python runs per step.

    Args:
        step: takes a batch as (x,), (x, y) or (x, y, sample_weight); what it gives stays in variables.
        scores: reads them; it is compiled with the steps, as that costs a tenth of as many calls from Python.
        jit_compile: compile the step with XLA.
        run_eagerly: compile nothing, so that the step can be looked into with a debugger.
        one_thread: run steps over rows in one thread, see `Compiled`.
    """

    def __init__(
        self,
        step: Step,
        scores: Callable[[], Scores],
        *,
        jit_compile: bool = False,
        run_eagerly: bool = False,
        one_thread: bool = False,
    ) -> None:
        self._step = tf.function(step, jit_compile=True, autograph=False) if jit_compile else step
        self._scores = scores
        self._eager = run_eagerly
        self._one_thread = one_thread
        self._over_rows: dict[str, Compiled] = {}
        self._over_iterator = tf.function(self._iterate, autograph=False, reduce_retracing=True)

    def __call__(self, feed: Feed, steps: int) -> tuple[int, Scores]:
        """Makes up to `steps` steps on batches of `feed`.

        Returns:
            How many were made, at least 1, unless a feed of unknown length turned out to be at its end; and the scores
            after them.
        """
        if isinstance(feed, RowFeed):
            rows, first, end = feed.take(steps)
            function = self._iterate_rows(feed.kind.batch_size) if self._eager else self._compiled(feed)
            return end - first, function(rows, _count(first), _count(end))
        assert isinstance(feed, IteratorFeed)
        iterator, asked = feed.take(steps)
        counted, scores = (self._iterate if self._eager else self._over_iterator)(iterator, _count(asked))
        made = int(counted)
        feed.took(asked, made)
        return made, scores

    @property
    def traces(self) -> int:
        """How many times a function was traced; it does not grow from epoch to epoch."""
        return len(self._over_rows) + int(self._over_iterator.experimental_get_tracing_count())

    def _compiled(self, feed: RowFeed) -> Compiled:
        kind = feed.kind
        if kind.name not in self._over_rows:
            function, count = self._iterate_rows(kind.batch_size), tf.TensorSpec([], tf.int64)
            self._over_rows[kind.name] = Compiled(function, kind.specs, count, count, one_thread=self._one_thread)
        return self._over_rows[kind.name]

    def _iterate_rows(self, batch_size: int) -> Callable[..., Scores]:
        def iterate(rows: Any, first: tf.Tensor, end: tf.Tensor) -> Scores:
            def body(i: tf.Tensor) -> tuple[tf.Tensor]:
                start = i * batch_size
                self._step(keras.tree.map_structure(lambda t: t[start : start + batch_size], rows))
                return (i + 1,)

            tf.while_loop(lambda i: i < end, body, (first,), parallel_iterations=1)
            return self._scores()

        return iterate

    def _iterate(self, iterator: Any, steps: tf.Tensor) -> tuple[tf.Tensor, Scores]:
        def body(made: tf.Tensor, more: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            batch = iterator.get_next_as_optional()
            more = batch.has_value()

            def step() -> tf.Tensor:
                value = batch.get_value()
                self._step(value if isinstance(value, tuple) else (value,))
                return made + 1

            return tf.cond(more, step, lambda: made), more

        made, _ = tf.while_loop(
            lambda made, more: more & (made < steps),
            body,
            (tf.constant(0, tf.int64), tf.constant(True)),
            parallel_iterations=1,
        )
        return made, self._scores()


def train_step(
    model: keras.Model, loss: keras.metrics.Mean, after_update: Callable[[tf.Tensor], None] | None = None
) -> Step:
    """Makes the step that trains `model` with its own optimizer, loss (with `add_loss` terms) and metrics.

    Args:
        model: built and compiled.
        loss: takes the loss of each batch, weighted by its number of samples.
        after_update: called in the graph after each real optimizer update, with the number (int64 scalar, from 0) of
            that update; not after steps that only gather gradients or that loss scaling skipped.
    """
    optimizer, variables = model.optimizer, model.trainable_variables
    compute_loss = loss_of(model, training=True)

    def step(batch: Any) -> None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            value = compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
            scaled = optimizer.scale_loss(value)
        before = tf.cast(optimizer.iterations, tf.int64)
        optimizer.apply_gradients(zip(tape.gradient(scaled, variables), variables, strict=True))
        loss.update_state(value, sample_weight=_samples(x))
        model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        if after_update is not None:
            after = tf.cast(optimizer.iterations, tf.int64)
            tf.cond(after > before, lambda: _then_true(after_update, before), lambda: False)

    return step


def evaluation_step(model: keras.Model, loss: keras.metrics.Mean) -> Step:
    """Makes the step that evaluates `model`; what it gives is in `loss` and in the model's metrics."""
    compute_loss = loss_of(model, training=False)

    def step(batch: Any) -> None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        y_pred = model(x, training=False)
        value = compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        loss.update_state(value, sample_weight=_samples(x))
        model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    return step


def loss_of(model: keras.Model, *, training: bool) -> Callable[..., tf.Tensor]:
    """Returns the model's `compute_loss` for training or not; one written for an older Keras does not take that."""
    parameters = inspect.signature(model.compute_loss).parameters.values()
    if any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters):
        return partial(model.compute_loss, training=training)
    return cast(Callable[..., tf.Tensor], model.compute_loss)


@lru_cache(maxsize=256)  # to make one takes longer than an operation of a small model
def _count(steps: int) -> tf.Tensor:
    return tf.constant(steps, tf.int64)


def _then_true(function: Callable[[tf.Tensor], None], step: tf.Tensor) -> bool:
    function(step)
    return True


def _samples(x: Any) -> tf.Tensor:
    return tf.shape(keras.tree.flatten(x)[0])[0]
