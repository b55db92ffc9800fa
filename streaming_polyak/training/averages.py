"""Any number of running averages of one model's variables, and the exact swap that puts one into the model.

Variables are known by their path, so that no order matters, and a variable that two layers share counts once.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import keras
import numpy as np

from streaming_polyak.errors import NonFiniteError, SwapError
from streaming_polyak.schedule import Average
from streaming_polyak.training.accumulators import Array, GraphAccumulators, HostAccumulators, is_averaged, view
from streaming_polyak.training.state import Slot, present, put

logger = logging.getLogger("streaming_polyak")


class Averages:
    """The averages of a built model.

    Memory: for each average one float32 (float64 for float64 weights) a parameter; a swap holds one more copy of the
    model in its own dtypes.

    Args:
        model: built; all its variables are averaged, trainable or not (batch-norm statistics too).
        averages: by name.
        on_nonfinite: what an update does when a weight is NaN or infinite, after leaving all averages as they are:
            "raise" a `NonFiniteError`, or "skip" and log a warning.

    Raises:
        ValueError: two variables have one path.
    """

    def __init__(
        self,
        model: keras.Model,
        averages: Mapping[str, Average],
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        self._variables = variables_by_path(model) if averages else {}
        self._dtypes = {path: view(variable).dtype for path, variable in self._variables.items()}
        self._host = HostAccumulators({k: a for k, a in averages.items() if a.unit == "epoch"}, self._variables)
        steps = {k: a for k, a in averages.items() if a.unit == "step"}
        self._graph = GraphAccumulators(steps, self._variables) if steps else None
        self._where: dict[str, HostAccumulators | GraphAccumulators] = {
            name: self._graph if self._graph and name in steps else self._host for name in averages
        }
        self._skip = on_nonfinite == "skip"
        self._in_model: str | None = None

    def check_model(self, model: keras.Model) -> None:
        """Checks that the model has the variables it had.

        Raises:
            ValueError: it has others; the averages would be those of a part.
        """
        now = variables_by_path(model) if self._where else {}
        changed = [p for p in {**now, **self._variables} if now.get(p) is not self._variables.get(p)]
        if changed:
            raise ValueError(
                f"Expected model {model.name!r} with the variables it had when its averages began, but these are new, "
                f"gone or others: {', '.join(changed)}. Make a new Trainer for the changed model."
            )

    @property
    def in_model(self) -> str | None:
        """The name of the average that stands in the model now, if one does."""
        return self._in_model

    @property
    def step_update(self) -> Any:
        """What the compiled step calls after each optimizer update, with its number; None if no average needs it."""
        return None if self._graph is None else self._graph.update

    def begun(self) -> list[str]:
        """Returns the names of the averages that have a member."""
        return [name for name in self._where if self.count(name)]

    def count(self, name: str) -> int:
        """Returns the number of members of an average.

        Raises:
            ValueError: there is no average `name`.
        """
        if name not in self._where:
            raise ValueError(f"Expected an average of {list(self._where)}, got {name!r}.")
        return self._where[name].count(name)

    def due(self, epoch: int) -> bool:
        """Whether an average of epochs takes the weights after `epoch`."""
        return bool(self._host.due(epoch))

    def update_epoch(self, epoch: int, step: int) -> None:
        """Takes the weights after `epoch` into all averages of epochs that are due; `step` is for the message.

        It is finished even when Ctrl-C arrives meanwhile: an average is never left half updated.

        Raises:
            NonFiniteError: a weight is not finite; the averages are as they were.
            SwapError: an average stands in the model.
        """
        if self._in_model is not None:
            raise SwapError(
                f"Expected the raw weights in the model, but the average {self._in_model!r} is in it. "
                "Update after leaving the block of averaged()."
            )
        with _interrupts_later():
            refused = self._host.update(epoch)
        if refused is not None:
            self._refuse(refused, f"epoch {epoch} (optimizer step {step})", 1)

    def check_steps(self) -> None:
        """Reports what the updates inside the compiled steps refused since the last call.

        Raises:
            NonFiniteError: a weight was not finite after some step; the averages are as they were before it.
        """
        refused = None if self._graph is None else self._graph.take_refused()
        if refused is not None:
            path, step, times = refused
            self._refuse(path, f"optimizer step {step}", times)

    @contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Puts an average into the model, and afterwards the raw weights back, bit for bit, whatever happens.

        Raises:
            ValueError: there is no such average, or it has no member yet.
            SwapError: an average is in the model already.
        """
        if self._in_model is not None:
            raise SwapError(
                f"Expected the raw weights in the model, but the average {self._in_model!r} is in it, so {name!r} "
                "cannot be put there. Leave the block of the first averaged() before entering another."
            )
        if not self.count(name):
            raise ValueError(f"Expected an average with members, but {name!r} has none yet. See its start and every.")
        with unchanged(self._variables.values()):
            self._in_model = name
            try:
                for path, value in self._where[name].values(name).items():
                    # A copy: the variable must not get hold of the accumulator's memory.
                    put(self._variables[path].value, np.array(value, dtype=self._dtypes[path]))
                yield
            finally:
                self._in_model = None

    def slots(self) -> dict[str, Slot]:
        """Returns all that the averages are."""
        slots = {f"average/epoch/{name}": slot for name, slot in self._host.slots().items()}
        if self._graph is not None:
            slots |= {f"average/step/{name}": slot for name, slot in self._graph.slots().items()}
        return slots

    def adopt(self, name: str, n: int) -> None:
        """Makes what the model holds now the average `name` of `n` members."""
        values: dict[str, Array] = {path: view(variable) for path, variable in self._variables.items()}
        self._where[name].adopt(name, n, values)

    def _refuse(self, path: str, when: str, times: int) -> None:
        message = (
            f"Expected finite weights, but tensor {path!r} holds NaN or infinity after {when} (or a number beyond half "
            "the range of the average's dtype). It was kept out of the averages, which are as they were."
        )
        if not self._skip:
            raise NonFiniteError(
                f"{message} Lower the learning rate or clip the gradients; on_nonfinite='skip' would train on."
            )
        logger.warning("%s Updates skipped: %d.", message, times)


def variables_by_path(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns every variable of the model by its path: weights, batch-norm statistics, seeds; shared ones once.

    Seed generators are numbered by Keras, not named by the user, so that two may have one path; the second is then
    called "PATH#2".

    Raises:
        ValueError: two variables that are averaged have the same path, so that they could not be told apart.
    """
    variables: dict[str, keras.Variable] = {}
    same: dict[str, int] = {}
    for variable in model.variables:
        same[variable.path] = same.get(variable.path, 0) + 1
        if same[variable.path] == 1:
            variables[variable.path] = variable
        elif not is_averaged(variable):
            variables[f"{variable.path}#{same[variable.path]}"] = variable
        else:
            raise ValueError(
                f"Expected variables with different paths, but model {model.name!r} has two of path "
                f"{variable.path!r}. Give each of its layers a name of its own."
            )
    return variables


@contextmanager
def unchanged(variables: Any) -> Iterator[None]:
    """Restores the values of Keras variables afterwards, bit for bit; costs memory only for those that change."""
    before = [(variable.value, present(variable.value)) for variable in variables]
    try:
        yield
    finally:
        for variable, value in before:
            put(variable, value)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done; only the main thread is ever interrupted."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received:
            signal.raise_signal(signal.SIGINT)
