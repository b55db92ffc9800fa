"""Keras callbacks in our loop: who is called when, and what a callback that monitors an average gets to see.

A callback whose `monitor` names an average, such as "val_loss[mean]", works on that average: when an epoch ends, it
finds the average in the model and the average's scores under the plain names, so that `ModelCheckpoint` saves and
`EarlyStopping(restore_best_weights=True)` gives back what was scored, and not the raw weights of that epoch. Before the
average has begun it is not called at the end of an epoch. All other callbacks see the raw weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
from numpy.typing import NDArray

from streaming_polyak.training.averages import Averages
from streaming_polyak.training.state import decode, encode, plain_attributes

_FIXED_COLUMNS = (keras.callbacks.History, keras.callbacks.CSVLogger)

_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


class Hooks:
    """Calls the callbacks of one `fit`.

    Args:
        callbacks: in the order in which they are called.
        model: the model that is trained.
        averages: its averages.
        names: under which scores are logged, of averages that have not begun too.
        params: as Keras' `Callback.params`.

    Raises:
        TypeError: one is no callback.
        ValueError: a callback monitors a score of an average that will not be there, or would save raw weights
            for it.
    """

    def __init__(
        self,
        callbacks: Sequence[keras.callbacks.Callback],
        model: keras.Model,
        averages: Averages,
        names: Iterable[str],
        params: dict[str, Any],
    ) -> None:
        self._callbacks, self._averages = list(callbacks), averages
        self._counts: dict[tuple[str, int], int] = {}
        self._at_first: list[dict[str, Any]] = []  # the plain attributes of each
        names = list(names)
        for callback in self._callbacks:
            _check(callback, names)
        for callback in self._callbacks:
            callback.set_params(params)
            callback.set_model(model)
        self._on_batches = [c for c in self._callbacks if any(_overrides(c, hook) for hook in _BATCH_HOOKS)]
        self._watches_batches = not all(map(_can_wait, self._on_batches))

    @property
    def watches_batches(self) -> bool:
        """Whether some callback needs to be called at every batch, and not just now and then."""
        return self._watches_batches

    @property
    def has_batch_hooks(self) -> bool:
        """Whether some callback is called at batches at all."""
        return bool(self._on_batches)

    def begin(self, saved: bool) -> None:
        """Calls `on_train_begin`; `saved` tells that `state` will be asked for, which is what changes from now on."""
        self.call("on_train_begin")
        if saved:
            self._at_first = [
                plain_attributes(callback, f"callbacks/{k}") for k, callback in enumerate(self._callbacks)
            ]

    def state(self, arrays: dict[str, NDArray[Any]]) -> list[Any]:
        """Returns what the callbacks remember, as JSON; arrays in it are put into `arrays`.

        Of a callback with `get_state` it is what that gives, else those of its attributes that are plain (numbers,
        texts, arrays, and lists, tuples, dicts and sets of them) and not what they were when the training began.
        """
        said: list[Any] = [encode([[*key, n] for key, n in self._counts.items()], "callbacks/counts", arrays)]
        for (k, callback), before in zip(enumerate(self._callbacks), self._at_first, strict=True):
            if hasattr(callback, "get_state"):
                said.append(encode(callback.get_state(), f"callbacks/{k}", arrays))
                continue
            changed = {}
            for name, (encoded, held) in plain_attributes(callback, f"callbacks/{k}").items():
                if held or name not in before or before[name][0] != encoded:
                    changed[name] = encoded
                    arrays.update(held)
            said.append(changed)
        return said

    def restore(self, said: list[Any], read: Callable[[str], NDArray[Any]]) -> None:
        """Has the callbacks remember what they did when `state` was called; after `begin`."""
        self._counts = {(name, epoch): n for name, epoch, n in decode(said[0], read)}
        for callback, state in zip(self._callbacks, said[1:], strict=True):
            if hasattr(callback, "set_state"):
                callback.set_state(decode(state, read))
            else:
                vars(callback).update({name: decode(value, read) for name, value in state.items()})

    @property
    def kinds(self) -> list[str]:
        """The kinds of the callbacks, in order."""
        return [type(callback).__name__ for callback in self._callbacks]

    def batch_begin(self, batch: int) -> None:
        """Before the steps from batch number `batch` of the epoch on."""
        for callback in self._on_batches:
            callback.on_train_batch_begin(batch, logs={})

    def batch_end(self, batch: int, logs: dict[str, Any]) -> None:
        """After the steps up to batch number `batch` of the epoch."""
        for callback in self._on_batches:
            callback.on_train_batch_end(batch, logs=logs)

    def call(self, hook: str, *arguments: Any) -> None:
        """Calls the method `hook` of each callback."""
        for callback in self._callbacks:
            getattr(callback, hook)(*arguments)

    def epoch_end(self, epoch: int, logs: dict[str, Any], missing: set[str]) -> None:
        """After an epoch.

        Args:
            epoch: its number.
            logs: all names of the run; what callbacks add to it others see.
            missing: names that have no value this time (NaN in `logs`): an average that has not begun, an epoch
                without validation. Only callbacks that write a table with fixed columns get these.
        """
        for callback in self._callbacks:
            if isinstance(callback, _FIXED_COLUMNS):
                callback.on_epoch_end(epoch, logs=logs)
                continue
            present = {name: value for name, value in logs.items() if name not in missing}
            of = _average_of(callback)
            if of is None:
                callback.on_epoch_end(epoch, logs=present)
            elif callback.monitor in present:
                name = of[1]
                self._counts[name, epoch] = self._averages.count(name)
                present.update(_scores_of(name, present))
                with self._showing(callback, name):
                    callback.on_epoch_end(epoch, logs=present)
            logs.update({name: value for name, value in present.items() if name not in logs})

    def train_end(self, logs: dict[str, Any]) -> None:
        """After the last epoch; an average that `EarlyStopping` restores replaces the one that went on."""
        for callback in self._callbacks:
            of = _average_of(callback)
            if of is None or not self._averages.count(of[1]):
                callback.on_train_end(logs)
                continue
            name = of[1]
            best = getattr(callback, "best_epoch", None) if getattr(callback, "best_weights", None) else None
            with self._showing(callback, name):
                callback.on_train_end(logs)
                if best is not None and self._counts[name, best] != self._averages.count(name):
                    self._averages.adopt(name, self._counts[name, best])

    @contextmanager
    def _showing(self, callback: keras.callbacks.Callback, name: str) -> Iterator[None]:
        monitor = callback.monitor
        with self._averages.swapped(name):
            callback.monitor = monitor.removesuffix(f"[{name}]")
            try:
                yield
            finally:
                callback.monitor = monitor


def scored_name(name: str, average: str) -> str:
    """Returns the name under which a score of an average is logged: "val_loss[mean]"."""
    return f"val_{name}[{average}]"


def _scores_of(average: str, logs: dict[str, Any]) -> dict[str, Any]:
    suffix = f"[{average}]"
    return {name.removesuffix(suffix): value for name, value in logs.items() if name.endswith(suffix)}


def _average_of(callback: keras.callbacks.Callback) -> tuple[str, str] | None:
    """(plain name, average) if the callback monitors an average."""
    monitor = getattr(callback, "monitor", None)
    match = re.fullmatch(r"(.+)\[(.+)\]", monitor) if isinstance(monitor, str) else None
    return (match[1], match[2]) if match else None


def _check(callback: Any, names: Sequence[str]) -> None:
    kind = type(callback).__name__
    if not isinstance(callback, keras.callbacks.Callback):
        raise TypeError(f"Expected callbacks to be keras.callbacks.Callback, got {callback!r}.")
    of = _average_of(callback)
    checkpoint = isinstance(callback, keras.callbacks.ModelCheckpoint)
    if of is not None and callback.monitor not in names:
        raise ValueError(
            f"Expected {kind} to monitor a score that there will be, got monitor={callback.monitor!r}. The scores are "
            f"{', '.join(names)}; averages are scored on validation_data."
        )
    if of is not None and checkpoint and callback.save_freq != "epoch":
        raise ValueError(
            f"Expected ModelCheckpoint to save at the end of epochs, where the average {of[1]!r} that it monitors is "
            f"scored, got save_freq={callback.save_freq!r}. Leave save_freq out."
        )
    if of is not None and checkpoint and "[" in callback.filepath:
        raise ValueError(
            f"Expected a filepath without brackets, got {callback.filepath!r}. A callback that monitors an average "
            "finds its scores under plain names: write {val_loss:.3f}."
        )


def _can_wait(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback of Keras does nothing at batches, or nothing that every batch is needed for."""
    kind = type(callback)
    if kind is keras.callbacks.ModelCheckpoint:
        return bool(callback.save_freq == "epoch")
    return kind is keras.callbacks.TerminateOnNaN  # the running loss stays NaN


def _overrides(callback: keras.callbacks.Callback, hook: str) -> bool:
    method = getattr(callback, hook)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, hook)
