"""Functions of tensors that are traced once, and called with as little as there is between Python and TensorFlow.

To look for the trace that fits takes a `tf.function` 0.35 ms a call, and to bind arguments to a signature takes a
concrete function 0.1 ms; a step of a small model takes 0.1 ms. So what was traced is called as the operation it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context  # the executor of a function has no public name; Keras imports this too

from streaming_polyak.training.state import present

_FEW, _MANY = 8, 32  # variables for which a call is not worth its making, and at most in a call


class Compiled:
    """A function, traced for arguments of given shapes.

    Args:
        function: takes nests of tensors and returns one.
        specs: of its arguments.
        one_thread: run its operations one after another, each still with all threads that it wants. For small models,
            whose operations take less time than their way to another thread: the demo's 178 parameters take half the
            time a step, 1e6 would take a fifth longer. A function that calls others, but for one loop, or Python is
            not run so, and is traced twice.
    """

    def __init__(self, function: Callable[..., Any], *specs: Any, one_thread: bool = False) -> None:
        usual = context.context().function_call_options.executor_type
        for executor in ["SINGLE_THREADED_EXECUTOR", usual] if one_thread else [usual]:
            with context.function_executor_type(executor):
                self._function = tf.function(function, autograph=False).get_concrete_function(*specs)
                # As a call by its name would have them; what the user has set in tf.config is in there.
                self._attributes = context.context().function_call_options.as_attrs()
            if executor == usual or _runs_in_one_thread(self._function):
                break
        self._captured = list(self._function.captured_inputs)
        self._dtypes = [tensor.dtype for tensor in self._function.outputs]
        # With several devices TensorFlow places a function's parts on them, which it does not for an operation.
        self._direct = len(tf.config.list_logical_devices()) == 1

    def __call__(self, *arguments: Any) -> Any:
        """Returns what the function gives for tensors of the traced shapes, which are not checked."""
        if not self._direct:
            return self._function(*arguments)
        outputs = self.flat(tf.nest.flatten(arguments))
        return tf.nest.pack_sequence_as(self._function.structured_outputs, outputs)

    def flat(self, arguments: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns all outputs in order for all arguments in order, where there is one device."""
        outputs: list[tf.Tensor] = tf.raw_ops.StatefulPartitionedCall(
            args=arguments + self._captured, Tout=self._dtypes, f=self._function.name, **self._attributes
        )
        return outputs


class Reader:
    """Reads variables, many in a call, which takes a third of the time of a call for each (1,000: 3 and 9 ms).

    Args:
        variables: of any shapes and dtypes.
    """

    def __init__(self, variables: Sequence[tf.Variable]) -> None:
        self._variables = list(variables)
        self._calls: list[tuple[Compiled, list[int], list[tf.Tensor]]] | None = None  # what, of which, by what handles

    def __call__(self) -> list[tf.Tensor]:
        """Returns the present values; on a CPU the variables' own memory."""
        if self._calls is None:
            self._calls = list(self._prepared())
        values: list[Any] = [None] * len(self._variables)
        for read, places, handles in self._calls:
            for k, value in zip(places, read.flat(handles), strict=False):
                values[k] = value
        return [present(v) if value is None else value for v, value in zip(self._variables, values, strict=True)]

    def _prepared(self) -> Iterator[tuple[Compiled, list[int], list[tf.Tensor]]]:
        if len(tf.config.list_logical_devices()) > 1:
            return
        for dtype in dict.fromkeys(variable.dtype for variable in self._variables):
            places = [k for k, variable in enumerate(self._variables) if variable.dtype == dtype]
            if len(places) < _FEW:
                continue
            # One function of equal calls, which takes a tenth of a second; one of all takes seconds. The last call may
            # read a variable several times.
            count = -(-len(places) // -(-len(places) // _MANY))

            def read(*handles: tf.Tensor, dtype: tf.DType = dtype) -> list[tf.Tensor]:
                return [tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype) for handle in handles]

            compiled = Compiled(read, *[tf.TensorSpec([], tf.resource)] * count, one_thread=True)
            for first in range(0, len(places), count):
                some = places[first : first + count]
                handles = [self._variables[k].handle for k in some]
                yield compiled, some, handles + handles[-1:] * (count - len(some))


def _runs_in_one_thread(function: Any) -> bool:
    """Whether a function calls no others, nor Python, but for the condition and the body of one loop.

    In one thread each call within a call keeps a thread of TensorFlow's pool waiting for another one: with a recurrent
    layer in the step and two processors all of them wait, for ever.
    """
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    values = [value for node in nodes for value in node.attr.values()]
    functions = sum((value.WhichOneof("value") == "func") + len(value.list.func) for value in values)
    return functions <= 2 and not any("PyFunc" in node.op for node in nodes)
