"""Functions of tensors that are traced once, and called with as little as there is between Python and TensorFlow.

To look for the trace that fits takes a `tf.function` 0.35 ms a call, and to bind arguments to a signature takes a
concrete function 0.1 ms; a step of a small model takes 0.1 ms. So what was traced is called as the operation it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context  # the executor of a function has no public name; Keras imports this too


class Compiled:
    """A function, traced for arguments of given shapes.

    Args:
        function: takes nests of tensors and returns one.
        specs: of its arguments.
        one_thread: run its operations one after another, each still with all threads that it wants. For small models,
            whose operations take less time than their way to another thread: the demo's 178 parameters take half the
            time a step, 1e6 would take a fifth longer. A function that calls others, but for one loop, is not run so.
    """

    def __init__(self, function: Callable[..., Any], *specs: Any, one_thread: bool = False) -> None:
        usual = context.context().function_call_options.executor_type
        for executor in ["SINGLE_THREADED_EXECUTOR", usual] if one_thread else [usual]:
            with context.function_executor_type(executor):
                self._function = tf.function(function, autograph=False).get_concrete_function(*specs)
                # As a call by its name would have them; what the user has set in tf.config is in there.
                self._attributes = context.context().function_call_options.as_attrs()
            if executor == usual or _calls(self._function) <= 2:
                break
        self._captured = list(self._function.captured_inputs)
        self._dtypes = [tensor.dtype for tensor in self._function.outputs]
        # With several devices TensorFlow places a function's parts on them, which it does not for an operation.
        self._direct = len(tf.config.list_logical_devices()) == 1

    def __call__(self, *arguments: Any) -> Any:
        """Returns what the function gives for tensors of the traced shapes, which are not checked."""
        if not self._direct:
            return self._function(*arguments)
        outputs = tf.raw_ops.StatefulPartitionedCall(
            args=[*tf.nest.flatten(arguments), *self._captured],
            Tout=self._dtypes,
            f=self._function.name,
            **self._attributes,
        )
        return tf.nest.pack_sequence_as(self._function.structured_outputs, outputs)


def _calls(function: Any) -> int:
    """Returns how often a function and those it calls call another; a loop calls two, its condition and its body.

    In one thread each call within a call keeps a thread of TensorFlow's pool waiting for another one: with a recurrent
    layer in the step and two processors all of them wait, for ever.
    """
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    values = [value for node in nodes for value in node.attr.values()]
    return sum((value.WhichOneof("value") == "func") + len(value.list.func) for value in values)
