"""A run that can be killed at any moment: when it saves, what it saves, and how a later process goes on with it.

What is saved is every slot of the trainer (see `state`), where in which epoch it is, and what data, callbacks and
history remember. What another run would have to have the same is saved as well, and compared before anything is
loaded: model, optimizer, averages, data, seed, versions.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import FrameType
from typing import Any, Literal, NoReturn

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from streaming_polyak.errors import CheckpointError, Interrupted, NonFiniteError
from streaming_polyak.files.run_checkpoint import Part, RunCheckpoint
from streaming_polyak.files.run_folder import RunFolder, RunLock
from streaming_polyak.files.storage import write_csv
from streaming_polyak.files.tensors import FLOATS
from streaming_polyak.training.data import Batches
from streaming_polyak.training.history import History
from streaming_polyak.training.hooks import Hooks
from streaming_polyak.training.state import Slot, decode, differences, encode, make_keras_generator, random_slots

logger = logging.getLogger("streaming_polyak")

Array = NDArray[Any]
Resume = Literal["auto", "must", "never"]

_EVERY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step|min|minute)s?\s*", re.IGNORECASE)
_LEAST_SECONDS = 60.0  # between two saves of whole epochs, if the user has not said how often
_LINES = 200  # of differences in a message
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class SaveEvery:
    """How often a run is saved.

    Args:
        count: of the unit.
        unit: "epoch", "step" or "min".
        least_seconds: not before so many seconds after the last save.
    """

    count: float
    unit: Literal["epoch", "step", "min"]
    least_seconds: float = 0.0

    @classmethod
    def parse(cls, text: str | None) -> SaveEvery:
        """Reads "1 epoch", "500 steps" or "10 min"; `None` is each epoch, but at most once a minute.

        Raises:
            ValueError: it is none of these.
        """
        if text is None:
            return cls(1, "epoch", _LEAST_SECONDS)
        found = _EVERY.fullmatch(text) if isinstance(text, str) else None
        if found is None or float(found[1]) <= 0 or (not found[2].lower().startswith("min") and "." in found[1]):
            raise ValueError(f'Expected save_every such as "1 epoch", "500 steps" or "10 min", got {text!r}.')
        unit = "min" if found[2].lower().startswith("min") else found[2].lower()
        return cls(float(found[1]), unit)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Args:
        epoch: the epoch it is in, or will begin with.
        done: how many of its batches have been trained on.
        phase: "train": there may be more batches; "validate": all is trained and averaged, scores are next.
        steps: how many batches it has trained on in all.
        logs: in the phase "validate", the scores of the training.
        stopped: the epoch to train to when a callback stopped the training; 0 if none did.
    """

    epoch: int
    done: int = 0
    phase: Literal["train", "validate"] = "train"
    steps: int = 0
    logs: dict[str, Any] = field(default_factory=dict)
    stopped: int = 0


class Run:
    """The saving side of one `fit`.

    Args:
        folder: of the run.
        every: how often it is saved.
        memory: "low": what is saved goes from where it is to the disk, while training waits; "high": it is copied,
            into memory that is kept, and written while training goes on.
        skip_nonfinite: whether a state with NaN or infinity is left unsaved, with a warning, or is an error.
    """

    def __init__(
        self, folder: RunFolder, every: SaveEvery, memory: Literal["low", "high"], skip_nonfinite: bool
    ) -> None:
        self._folder, self._every, self._memory, self._skip = folder, every, memory, skip_nonfinite
        self._slots: Callable[[], dict[str, Slot]]
        self._variables: dict[str, Slot] | None = None
        self._batches: Batches
        self._hooks: Hooks
        self._history: History
        self._signature: dict[str, Any]
        self._saves = 0
        self._last_save = time.monotonic()
        self._last_steps = 0
        self._epochs_since = 0
        self._disk = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._copies: dict[str, Array] = {}
        self._signal = 0
        self._resumed: RunCheckpoint | None = None
        self._lock: RunLock

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes out of the folder, and SIGTERM and Ctrl-C from ending this one in the middle."""
        with ExitStack() as stack:
            self._lock = stack.enter_context(self._folder.lock())
            self._folder.clean()
            stack.callback(self._disk.shutdown)
            if threading.current_thread() is threading.main_thread():
                for number in _SIGNALS:
                    previous = signal.signal(number, self._received)
                    stack.callback(signal.signal, number, previous)
            yield
            self._wait()

    def find(self, resume: Resume) -> None:
        """Looks for what there is to go on with.

        Raises:
            CheckpointError: none of the checkpoints is whole; or there is none and there must be.
            FileExistsError: there is one, and there must not be.
        """
        if resume == "never" and self._folder.saved():
            raise FileExistsError(
                f'{self._folder.path} has a run in it, and resume="never". Choose another folder, or resume it.'
            )
        self._resumed = self._folder.latest()
        if resume == "must" and self._resumed is None:
            raise CheckpointError("no-run", self._folder.path, 'it has no checkpoint to go on with, and resume="must".')

    def attach(
        self,
        slots: Callable[[], dict[str, Slot]],
        batches: Batches,
        hooks: Hooks,
        history: History,
        signature: dict[str, Any],
    ) -> None:
        """Tells what the run consists of.

        Args:
            slots: gives its tensors.
            batches: its data.
            hooks: its callbacks.
            history: its history, which is written to the folder with each save.
            signature: what a resumed run must have the same of.
        """
        batches.check_resumable()
        self._slots, self._batches, self._hooks, self._history = slots, batches, hooks, history
        self._signature = {**signature, **_flat("data", batches.describe()), "callbacks": hooks.kinds, **_versions()}

    @property
    def resumes(self) -> bool:
        """Whether `find` found something to go on with."""
        return self._resumed is not None

    @property
    def signalled(self) -> bool:
        """Whether a signal asks to come to an end."""
        return bool(self._signal)

    def restore(self) -> Position:
        """Loads what `find` found, all or nothing; returns where to go on.

        Raises:
            CheckpointError: it is of another run; the message has every difference.
        """
        checkpoint = self._resumed
        assert checkpoint is not None
        state = checkpoint.state
        if "random/keras" in state["slots"] and "random/keras" not in random_slots():
            make_keras_generator()  # it comes into being when a step that draws from it is traced, which is later
        slots = self._all_slots()
        saved = {name: tensor.describe() for name, tensor in checkpoint.tensors.items() if name in state["slots"]}
        lines = differences(state["signature"], self._signature, "setting")
        lines += differences(saved, {name: slot.describe() for name, slot in slots.items()}, "tensor")
        if lines:
            more = [f"  ... and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
            raise CheckpointError(
                "other-run",
                checkpoint.path,
                "it is of another run than this one:\n"
                + "\n".join([*lines[:_LINES], *more])
                + "\nMake them the same, or "
                "start a new run in another folder.",
            )
        with checkpoint:
            for name, slot in slots.items():
                slot.assign(checkpoint.read(name))
            self._batches.restore({name: checkpoint.read(f"data/{name}") for name in state["data"]})
            self._hooks.restore(state["callbacks"], checkpoint.read)
            position = Position(**decode(state["position"], checkpoint.read))
        self._saves = checkpoint.save
        self._last_steps = position.steps
        logger.info("Going on with %s: epoch %d, batch %d.", checkpoint.path, position.epoch, position.done)
        return position

    def steps_until_save(self, position: Position, steps: int) -> int:
        """Returns how many of `steps` steps to make at once."""
        if self._every.unit != "step":
            return steps
        return max(1, min(steps, self._last_steps + int(self._every.count) - position.steps))

    def after_steps(self, position: Position) -> None:
        """Is called after each call of compiled steps; saves if it is time.

        Raises:
            Interrupted: SIGTERM or SIGINT came; all is saved.
            OSError: the last save failed.
        """
        self._check_writing()
        if self._signal:
            self.end(position)
        unit, count = self._every.unit, self._every.count
        by_steps = unit == "step" and position.steps - self._last_steps >= count
        if by_steps or (unit == "min" and time.monotonic() - self._last_save >= 60 * count):
            self.save(position)

    def after_epoch(self, position: Position, last: bool) -> None:
        """Is called after each epoch, scores and callbacks included; `position` is the beginning of the next."""
        self._check_writing()
        self._epochs_since += 1
        waited = time.monotonic() - self._last_save >= self._every.least_seconds
        due = self._every.unit == "epoch" and self._epochs_since >= self._every.count and waited
        if last or due or self._signal:
            self.save(position)
        else:
            self.after_steps(position)
        if self._signal:
            self.end(None)

    def save(self, position: Position) -> None:
        """Saves the run as it is.

        Raises:
            NonFiniteError: something in it is not finite, and that is no reason to skip it.
            OSError: the disk refused, or the folder is gone.
        """
        self._wait()
        slots = self._all_slots()
        arrays: dict[str, Array] = {}
        data = self._batches.state()
        state = {
            "signature": self._signature,
            "slots": list(slots),
            "data": list(data),
            "position": encode(asdict(position), "position", arrays),
            "callbacks": self._hooks.state(arrays),
        }
        parts = [slot.part(name) for name, slot in slots.items()]
        kept = [Part.of(name, array) for name, array in arrays.items()]  # what callbacks keep may be a whole model
        if self._memory == "high":
            parts, kept = ([self._copied(part) for part in some] for some in (parts, kept))
        kept += [Part.of(f"data/{name}", array) for name, array in data.items()]
        history = self._history.rows()

        def write() -> None:
            self._lock.check()
            checked = [replace(part, read=_finite(part)) for part in parts]
            try:
                self._folder.commit(position.steps, [*checked, *kept], state, save=self._saves + 1)
                self._saves += 1
                write_csv(self._folder.path / "history.csv", *history)
            finally:
                self._lock.check()  # if it went away meanwhile, that is the reason

        try:
            if self._memory == "high":
                self._writing = self._disk.submit(write)
            else:
                write()
        except NonFiniteError as error:
            if not self._skip:
                raise
            logger.warning("The run was not saved: %s", error)
        self._last_save, self._last_steps, self._epochs_since = time.monotonic(), position.steps, 0

    def _all_slots(self) -> dict[str, Slot]:
        if self._variables is None:  # they are the same to the end of the run
            self._variables = self._slots()
        return {**self._variables, **random_slots()}

    def _copied(self, part: Part) -> Part:
        """Returns a part whose array is a copy of the present one, in the memory that the last save's copy had."""
        array = part.read()
        copy = self._copies.get(part.name)
        if copy is None or (copy.dtype, copy.shape) != (array.dtype, array.shape):
            copy = self._copies[part.name] = np.empty_like(array)
        np.copyto(copy, array)
        return Part(part.name, part.dtype, part.shape, lambda: copy)

    def _check_writing(self) -> None:
        if self._writing is not None and self._writing.done():
            self._wait()

    def _wait(self) -> None:
        """Waits for the writer; raises what it raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except NonFiniteError as error:
                if not self._skip:
                    raise
                logger.warning("The run was not saved: %s", error)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._signal:  # the second one: now
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)
        self._signal = number

    def end(self, position: Position | None) -> NoReturn:
        """Saves the run, unless `position` is `None` because it is saved already, and ends as the signal asked.

        Raises:
            Interrupted: always.
        """
        if position is not None:
            self.save(position)
        self._wait()
        name = signal.Signals(self._signal).name
        logger.warning("%s: the run in %s is saved; the same call goes on with it.", name, self._folder.path)
        raise Interrupted(self._signal, self._folder.path)


def _finite(part: Part) -> Callable[[], Array]:
    """Returns the reading of a part, which must be finite: no run is saved with NaN in its weights."""
    if part.dtype not in FLOATS or part.name.startswith(("random/", "metrics/")):
        return part.read

    def read() -> Array:
        array = part.read()
        flat = array.reshape(-1)
        with np.errstate(invalid="ignore"):
            finite = all(np.isfinite(flat[lo : lo + (1 << 20)]).all() for lo in range(0, flat.size, 1 << 20))
        if not finite:
            raise NonFiniteError(f"Expected finite numbers in what is saved, but {part.name!r} holds NaN or infinity.")
        return array

    return read


def _flat(prefix: str, described: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix} {key}": json.loads(json.dumps(value)) for key, value in described.items()}


def _versions() -> dict[str, Any]:
    return {"version of Keras": keras.__version__, "version of TensorFlow": tf.__version__}
