"""The loss and the metrics of a compiled model: made before the first trace, reset between epochs, read as scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from streaming_polyak.training.loop import Scores, loss_of
from streaming_polyak.training.state import present, put


class Metrics:
    """The loss, and the metrics that a model was compiled with.

    Args:
        model: compiled; perhaps compiled anew later, after which `make` must be called again.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.loss = keras.metrics.Mean(name="loss")
        self._at_reset: list[tuple[tf.Variable, tf.Tensor]] | None = None

    @property
    def variables(self) -> list[keras.Variable]:
        """All that they consist of, always in the same order."""
        return [v for metric in [self.loss, *self._model.metrics] for v in metric.variables]

    def make(self, specs: Any) -> None:
        """Makes the variables, which come into being at their first update; else the step would be traced twice.

        Args:
            specs: of a batch: (x,), (x, y) or (x, y, sample_weight) of tf.TypeSpec.
        """
        model, zeros = self._model, partial(keras.tree.map_structure, _zeros)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(zeros(specs))
        y_pred = zeros(call_symbolically(model, specs))
        # With several outputs the loss has metrics too.
        loss_of(model, training=False)(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        self._at_reset = None
        self.reset()
        if all(map(_resets_variables_alone, [model, *model.metrics])):
            # By Keras' own methods a reset takes 0.4 ms, as long as four steps of a small model.
            self._at_reset = [(v.value, present(v.value)) for v in self.variables]

    def reset(self) -> None:
        """Makes them what they are before the first batch."""
        if self._at_reset is None:
            self._model.reset_metrics()
            self.loss.reset_state()
            return
        for variable, value in self._at_reset:
            put(variable, value)

    def results(self) -> Scores:
        """Returns the loss and the metrics by name as they are now; also a part of the compiled loops."""
        results = {"loss": self.loss.result()}
        for name, value in self._model.get_metrics_result().items():
            if isinstance(value, dict):  # a metric with several results
                results |= value
            elif name != "loss":
                results[name] = value
        return results


def plain(scores: Scores) -> dict[str, Any]:
    """Returns scores as Python's numbers; those with a shape as arrays."""
    arrays = {name: np.asarray(value) for name, value in scores.items()}
    return {name: float(array) if array.ndim == 0 else array for name, array in arrays.items()}


def call_symbolically(model: keras.Model, specs: Any) -> Any:
    """Calls the model on the shapes of a batch, which makes its variables; returns the shapes of its output."""
    x = keras.utils.unpack_x_y_sample_weight(specs)[0]
    inputs = keras.tree.map_structure(lambda spec: keras.KerasTensor(spec.shape, spec.dtype.name), x)
    return model(inputs, training=False)


def _resets_variables_alone(thing: Any) -> bool:
    """Whether a metric, with those in it, or a model resets as Keras wrote it: variables, each to a fixed value."""
    method = thing.reset_metrics if isinstance(thing, keras.Model) else thing.reset_state
    inner = () if isinstance(thing, keras.Model) else getattr(thing, "metrics", ())
    return method.__module__.startswith("keras.") and all(map(_resets_variables_alone, inner))


def _zeros(spec: Any) -> Any:
    dense = tf.zeros([1 if size is None else size for size in spec.shape], spec.dtype)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensor.from_tensor(dense, ragged_rank=spec.ragged_rank)
    return tf.sparse.from_dense(dense) if isinstance(spec, tf.SparseTensorSpec) else dense
