"""The outer loop: trains, keeps the averages, evaluates raw weights and averages, calls back, saves."""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from streaming_polyak.errors import NonFiniteError, SwapError
from streaming_polyak.files.meter import hidden
from streaming_polyak.files.run_folder import RunFolder
from streaming_polyak.schedule import Average, Members, check_averages
from streaming_polyak.training.averages import Averages, unchanged, variables_by_path
from streaming_polyak.training.data import Batches, make_batches
from streaming_polyak.training.history import History
from streaming_polyak.training.hooks import Hooks, scored_name
from streaming_polyak.training.loop import Loop, Scores, evaluation_step, train_step
from streaming_polyak.training.metrics import Metrics, call_symbolically, plain
from streaming_polyak.training.run import Position, Resume, Run, SaveEvery
from streaming_polyak.training.saving import MemberFiles, save
from streaming_polyak.training.state import Slot, variable_slots

logger = logging.getLogger("streaming_polyak")

_SMALL = 10_000  # parameters of a model whose steps run in one thread, see `Compiled`
_CALL_SECONDS = 0.5  # of compiled steps between two looks at the clock, the bar and Ctrl-C
_EVALUATION_STEPS = 128  # in one call, without a look at the clock


class _Signalled(Exception):
    """A signal came while scores were computed."""


class Trainer:
    """Trains a compiled Keras model and keeps running averages of its weights.

    Args:
        model: Sequential, functional or subclassed, compiled: its optimizer, loss, loss weights, metrics and `add_loss`
            terms are used.
        averages: running averages by name. All variables of the model are averaged, batch-norm statistics too.
        seed: the order of samples in each epoch is a pure function of (seed, epoch), >= 0.
        members: which raw weights to keep as files.
        on_nonfinite: when NaN or infinity in a weight keeps an update of the averages from being made: "raise" a
            `NonFiniteError`, or "skip" that update and log a warning.
        run_dir: the folder of the run. With it, the run is saved as it goes, and the same call of `fit` in another
            process goes on where this one was killed, with the same bits. `None` saves nothing.
        save_every: how often: "1 epoch", "500 steps", "10 min". `None` is each epoch, but at most once a minute. The
            end of a run is always saved.
        keep: how many of the newest checkpoints are kept, at least 2.
        keep_every: besides, every so many saves is kept for good; `None` for none.
        memory: "low": training waits while it is saved, from where things are to the disk; "high": things are copied
            once, and written while training goes on.

    Raises:
        ValueError: the model is not compiled, Keras does not run on TensorFlow, the model has a training step of its
            own, or an argument is out of range.
        TypeError: an argument is of the wrong kind.

    Source: B. Polyak and A. Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim.
    30 (1992), for the idea; `weighting` for the rules.
    """

    def __init__(
        self,
        model: keras.Model,
        averages: Mapping[str, Average] | None = None,
        *,
        seed: int = 0,
        members: Members | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        run_dir: str | PathLike[str] | None = None,
        save_every: str | None = None,
        keep: int = 3,
        keep_every: int | None = None,
        memory: Literal["low", "high"] = "low",
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                f"Expected Keras to run on TensorFlow, got the backend {keras.backend.backend()!r}. Set the "
                "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
            )
        if not isinstance(model, keras.Model):
            raise TypeError(f"Expected a keras.Model, got {type(model).__name__}.")
        if not model.compiled or model.optimizer is None:
            raise ValueError(
                f"Expected a compiled model, but {model.name!r} is not. Call "
                "model.compile(optimizer=..., loss=..., metrics=[...]) first."
            )
        for step in ("train_step", "test_step"):
            if getattr(type(model), step) is not getattr(keras.Model, step):
                raise ValueError(
                    f"Expected a model that is trained by its loss, but {type(model).__name__} overrides {step}, which "
                    "this loop would not call. Override compute_loss or compute_metrics, or call add_loss instead."
                )
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"Expected seed as an int >= 0, got seed={seed!r}.")
        if members is not None and not isinstance(members, Members):
            raise TypeError(f"Expected members as Members(folder, start=...), got {members!r}.")
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f'Expected on_nonfinite="raise" or "skip", got on_nonfinite={on_nonfinite!r}.')
        self.model = model
        self.history: History | None = None
        self.averages = check_averages(averages or {})
        self.seed = int(seed)
        self.members = members
        self._on_nonfinite = on_nonfinite
        if memory not in ("low", "high"):
            raise ValueError(f'Expected memory="low" or "high", got memory={memory!r}.')
        self._save_every, self._memory = SaveEvery.parse(save_every), memory
        self._run_folder = None if run_dir is None else RunFolder(run_dir, keep=keep, keep_every=keep_every)
        self._run: Run | None = None
        self._member_files = MemberFiles(members)
        self._state: Averages | None = None
        self._metrics = Metrics(model)
        self._made_for: list[Any] = []
        self._steps_a_call = 1
        self._train_loop: Loop
        self._evaluation_loop: Loop

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run, if there is one."""
        return None if self._run_folder is None else self._run_folder.path

    @property
    def member_paths(self) -> list[Path]:
        """The files of members kept so far and still there, oldest first."""
        return self._member_files.paths

    def count(self, name: str) -> int:
        """Returns n, the number of members in the average `name`; 0 before it has begun."""
        if name not in self.averages:
            raise ValueError(f"Expected an average of {list(self.averages)}, got {name!r}.")
        return 0 if self._state is None else self._state.count(name)

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        initial_epoch: int = 0,
        shuffle: bool = True,
        validation_data: Any = None,
        validation_freq: int | Sequence[int] = 1,
        steps_per_epoch: int | None = None,
        callbacks: keras.callbacks.Callback | Iterable[keras.callbacks.Callback] | None = None,
        progress: bool = True,
        resume: Resume = "auto",
    ) -> History:
        """Trains the model.

        With a run folder: SIGTERM and Ctrl-C end it after the steps that are being made, saved, with `Interrupted` (a
        `SystemExit` of status 143 or 130); a second one ends the process at once. What the callbacks of Keras remember
        (`EarlyStopping`, `ReduceLROnPlateau`, `ModelCheckpoint`, ...) is saved with the run, as are the plain
        attributes of other callbacks, or what their `get_state` gives to be handed to their `set_state`. `CSVLogger`
        needs `append=True`, and `BackupAndRestore` is not needed.

        Args:
            x: arrays, tuples, lists or dicts of arrays with one row a sample, a `tf.data.Dataset` of batches, or a
                `keras.utils.PyDataset`. Arrays are not to be changed meanwhile; give what changes as a PyDataset.
            y: targets, for arrays.
            sample_weight: weights of the samples in the loss, for arrays.
            batch_size: samples a step, for arrays; `None` for 32. The last batch of an epoch may be smaller and counts
                with its size.
            epochs: the epoch to train to: epochs `initial_epoch` .. `epochs` - 1 are done.
            initial_epoch: number of the first epoch.
            shuffle: see the samples of arrays (the batches of a PyDataset) in another order in each epoch, which
                depends on (seed, epoch) alone. A `tf.data.Dataset` keeps its own order.
            validation_data: (x, y), (x, y, sample_weight), a `tf.data.Dataset` or a PyDataset; evaluated with the raw
                weights and with every average that has begun.
            validation_freq: validate every so many epochs, or after the epochs (counted from 1) in a list.
            steps_per_epoch: batches an epoch; `None` for all there are. A data set is then read on across epochs and
                from its beginning when it runs out.
            callbacks: `keras.callbacks`. One that monitors an average, such as "val_loss[mean]", works on the average
                (see `streaming_polyak.training.hooks`).
            progress: show a bar over the epochs, if the error output is a terminal.
            resume: with a run folder: "auto" goes on with the run in it, if there is one; "must" insists on one;
                "never" refuses a folder that has one.

        Returns:
            The history; `trainer.history` has it too, as far as it came if `fit` raises. `history.history` has a list
            with one value an epoch for each of "loss" and the metrics, with "val_" before it for the raw weights, and
            "val_...[NAME]" for the average NAME; NaN where there is none.

        Raises:
            NonFiniteError: a weight became NaN or infinite; the averages are as they were before.
            SwapError: an average is in the model.
            FileExistsError: a member's file is there already; nothing was trained.
            ValueError: arguments that do not go together, or data that does not fit.
            CheckpointError: the run in the folder is another one, or none of its checkpoints is whole.
            RunLockedError: another process is at work in the folder.
            Interrupted: a signal came; the run is saved.
        """
        self._refuse_inside("fit")
        if resume not in ("auto", "must", "never"):
            raise ValueError(f'Expected resume="auto", "must" or "never", got resume={resume!r}.')
        if not (isinstance(epochs, int) and isinstance(initial_epoch, int) and 0 <= initial_epoch < epochs):
            raise ValueError(
                f"Expected 0 <= initial_epoch < epochs, got initial_epoch={initial_epoch}, epochs={epochs}."
            )
        seed = self.seed if shuffle else None
        batches = make_batches(x, y, sample_weight, batch_size=batch_size, seed=seed, steps=steps_per_epoch)
        validation = None if validation_data is None else _validation_batches(validation_data, batch_size)
        validates = _predicate(validation_freq)
        callbacks = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks or [])
        if self._run_folder is None:
            return self._fit(batches, validation, validates, Position(initial_epoch), epochs, callbacks, progress)
        skip = self._on_nonfinite == "skip"
        self._run = Run(self._run_folder, self._save_every, self._memory, skip_nonfinite=skip)
        try:
            with self._run.held():
                self._run.find(resume)
                return self._fit(batches, validation, validates, Position(initial_epoch), epochs, callbacks, progress)
        finally:
            self._run = None

    def _fit(
        self,
        batches: Batches,
        validation: Batches | None,
        validates: Callable[[int], bool],
        position: Position,
        epochs: int,
        callbacks: list[keras.callbacks.Callback],
        progress: bool,
    ) -> History:
        run = self._run
        if run is None or not run.resumes:
            self._member_files.check(range(position.epoch, epochs))
        self._build(batches)
        averages = self._built_averages()
        history = self.history = self.model.history = History()
        params = {"epochs": epochs, "steps": batches.steps, "verbose": 0}
        trained = list(self._metrics.results())
        scored = [] if validation is None else [f"val_{name}" for name in trained]
        if validation is not None:
            scored += [scored_name(name, average) for average in self.averages for name in trained]
        hooks = Hooks([*callbacks, history], self.model, averages, [*trained, *scored], params)
        self.model.stop_training = False
        if run is not None:
            run.attach(self._slots, batches, hooks, history, {**self._signature(), "scores": [*trained, *scored]})
        hooks.begin(saved=run is not None)
        if run is not None and run.resumes:
            position = run.restore()
            self._member_files.resume(position.epoch + (position.phase == "validate"))
        logs = dict(position.logs)
        bar = tqdm(
            total=epochs,
            initial=position.epoch,
            unit="epoch",
            disable=hidden(progress),
            dynamic_ncols=True,
        )
        with bar:
            # Stopped by a callback it stays, unless it is asked for more epochs than then.
            while position.epoch < epochs and position.stopped < epochs:
                epoch = position.epoch
                if position.phase == "train":
                    position, complete, logs = self._train_epoch(batches, position, hooks, bar)
                    batches.end_epoch()
                    if complete:
                        self._average(epoch)
                        self._member_files.keep(self.model, epoch)
                    position = replace(position, phase="validate", logs=dict(logs))
                scores: dict[str, Any] = {}
                if validation is not None and validates(epoch):
                    hooks.call("on_test_begin")
                    try:
                        scores = self._validate(validation)
                    except _Signalled:
                        assert run is not None
                        run.end(position)
                    hooks.call("on_test_end", {name: scores[f"val_{name}"] for name in logs})
                missing = set(scored) - set(scores)
                logs |= dict.fromkeys(scored, math.nan) | scores
                hooks.epoch_end(epoch, logs, missing)
                bar.update()
                bar.set_postfix_str(_postfix(logs, missing))
                stopped = epochs if self.model.stop_training else 0
                position = Position(epoch + 1, steps=position.steps, logs=dict(logs), stopped=stopped)
                if run is not None:
                    run.after_epoch(position, last=bool(stopped) or epoch + 1 == epochs)
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)
        hooks.train_end(logs)
        return history

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int | None = None,
        average: str | None = None,
    ) -> dict[str, float]:
        """Evaluates the model, or one of its averages; leaves all weights and seeds as they are, to the bit.

        Args:
            x: as for `fit`.
            y: as for `fit`.
            sample_weight: as for `fit`.
            batch_size: samples a step, for arrays; `None` for 32.
            average: name of the average; `None` for the weights that the model holds.

        Returns:
            "loss" and each metric by name.

        Raises:
            ValueError: there is no such average, or it has no member yet; or the data does not fit.
            SwapError: `average` is given inside the block of `averaged`.
        """
        batches = make_batches(x, y, sample_weight, batch_size=batch_size)
        self._build(batches)
        with nullcontext() if average is None else self.averaged(average):
            return self._evaluate(batches)

    def averaged(self, name: str) -> AbstractContextManager[None]:
        """Returns a context in which the model holds the average `name`; the raw weights return bit for bit after it.

        They also return when the body raises. Costs one more copy of the model while it lasts.

        Raises:
            ValueError: there is no such average, or it has no member yet.
            SwapError: on entering, if an average is in the model already.
        """
        return self._built_averages().swapped(name)

    def export(self, path: str | PathLike[str], average: str | None = None, *, overwrite: bool = True) -> Path:
        """Saves the model with the raw weights or with an average as a file that Keras alone loads.

        Killed at any moment, there is under `path` what was there before or the whole new file.

        Args:
            path: ".keras" (the whole model), ".weights.h5" (weights and optimizer) or ".h5" (Keras' legacy format; not
                for bfloat16, and of a subclassed model only `load_weights` can read it).
            average: name of the average; `None` for the weights that the model holds.
            overwrite: whether to replace an existing file, as Keras does.

        Returns:
            `path`.

        Raises:
            ValueError: another suffix, no such average, or no member in it yet.
            FileExistsError: the file exists and `overwrite` is false.
        """
        path = Path(path)
        with nullcontext() if average is None else self.averaged(average):
            save(self.model, path, overwrite=overwrite)
        return path

    def _train_epoch(
        self, batches: Batches, position: Position, hooks: Hooks, bar: tqdm[Any]
    ) -> tuple[Position, bool, dict[str, Any]]:
        """Makes the steps of an epoch that are not done; returns where it ended, whether none were left, and scores."""
        if not position.done:
            hooks.call("on_epoch_begin", position.epoch)
            self._metrics.reset()
        feed = batches.epoch(position.epoch, position.done)
        while feed.more() and not self.model.stop_training:
            steps = self.model.steps_per_execution if hooks.watches_batches else self._steps_a_call
            if self._run is not None:
                steps = self._run.steps_until_save(position, steps)
            hooks.batch_begin(position.done)
            started = time.perf_counter()
            made, scores = self._train_loop(feed, steps)
            seconds = time.perf_counter() - started
            if made:
                # With the scores, as computed anew by a resumed run they would be the same but for the last bit.
                logs = plain(scores)
                position = replace(position, done=position.done + made, steps=position.steps + made, logs=logs)
                if hooks.has_batch_hooks:
                    hooks.batch_end(position.done - 1, logs)
            if made == self._steps_a_call:
                # Twice as many at the most, so that one quick call does not lead to a very long one.
                self._steps_a_call = max(1, min(2 * steps, int(steps * _CALL_SECONDS / max(seconds, 1e-9))))
            if self._on_nonfinite == "raise":
                self._report(self._built_averages().check_steps)
            bar.set_description(f"step {position.done}/{batches.steps or '?'}", refresh=False)
            if self._run is not None and not self.model.stop_training:
                self._run.after_steps(position)
        self._report(self._built_averages().check_steps)
        return position, not feed.more(), dict(position.logs) if position.done else plain(self._metrics.results())

    def _slots(self) -> dict[str, Slot]:
        """Returns all tensors that the training consists of."""
        return {
            **variable_slots("model", variables_by_path(self.model).values()),
            **variable_slots("optimizer", self.model.optimizer.variables),
            **variable_slots("metrics", self._metrics.variables),
            **self._built_averages().slots(),
        }

    def _signature(self) -> dict[str, Any]:
        """Returns what a resumed run must have the same of."""
        optimizer = self.model.optimizer
        config = {k: v for k, v in optimizer.get_config().items() if k not in ("learning_rate", "name")}
        return {
            "seed": self.seed,
            "optimizer": type(optimizer).__name__,
            **{f"optimizer {k}": v for k, v in config.items() if v is None or isinstance(v, (bool, int, float, str))},
            "jit_compile": bool(self.model.jit_compile),
            **{f"average {name}": _described(average) for name, average in self.averages.items()},
        }

    def _average(self, epoch: int) -> None:
        if self._built_averages().due(epoch):
            step = int(self.model.optimizer.iterations) - 1  # the last one, counted from 0
            self._report(lambda: self._built_averages().update_epoch(epoch, step))

    def _report(self, check: Any) -> None:
        """Lets a `NonFiniteError` pass, unless a callback has stopped the training already, for the same reason."""
        try:
            check()
        except NonFiniteError as error:
            if not self.model.stop_training:
                raise
            logger.warning("%s", error)

    def _validate(self, batches: Batches) -> dict[str, Any]:
        scores = {f"val_{name}": value for name, value in self._evaluate(batches).items()}
        for average in self._built_averages().begun():
            with self.averaged(average):
                results = self._evaluate(batches)
            scores |= {scored_name(name, average): value for name, value in results.items()}
        return scores

    def _evaluate(self, batches: Batches) -> dict[str, Any]:
        with unchanged(self.model.non_trainable_variables):
            self._metrics.reset()
            feed = batches.epoch(0)
            scores: Scores = {}
            while feed.more():
                _, scores = self._evaluation_loop(feed, _EVALUATION_STEPS)
                if self._run is not None and self._run.signalled:
                    raise _Signalled
            return plain(scores)

    def _build(self, batches: Batches) -> None:
        """Makes what does not exist yet: variables of model, optimizer, metrics and averages, the compiled loops."""
        model = self.model
        specs = batches.specs()
        if not model.built:
            call_symbolically(model, specs)
        if model.loss is not None and keras.utils.unpack_x_y_sample_weight(specs)[1] is None:
            raise ValueError(f"Expected targets y, as {model.name!r} is compiled with loss={model.loss!r}, got none.")
        if not model.trainable_variables:
            raise ValueError(f"Expected a model with trainable weights, but {model.name!r} has none.")
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        if self._state is None:
            self._state = Averages(model, self.averages, self._on_nonfinite)
        self._state.check_model(model)
        # Compiled anew or with other trainable weights, a model has other objects here; its first metric is the loss's.
        made_for = [model.optimizer, *model.metrics[:1], *model.trainable_variables]
        if len(made_for) == len(self._made_for) and all(map(operator.is_, made_for, self._made_for)):
            return
        self._metrics.make(specs)
        small = model.count_params() < _SMALL and len(tf.config.list_logical_devices()) == 1
        # XLA's step and the condition of an average of steps are calls of functions.
        one_thread = small and not model.jit_compile and self._state.step_update is None
        options = {"jit_compile": model.jit_compile, "run_eagerly": model.run_eagerly, "one_thread": one_thread}
        train = train_step(model, self._metrics.loss, self._state.step_update)
        self._train_loop = Loop(train, self._metrics.results, **options)
        self._evaluation_loop = Loop(evaluation_step(model, self._metrics.loss), self._metrics.results, **options)
        self._made_for = made_for
        self._steps_a_call = 1

    def _built_averages(self) -> Averages:
        if self._state is None:
            raise ValueError("Expected a trainer that has trained, but there are no averages yet. Call fit first.")
        return self._state

    def _refuse_inside(self, verb: str) -> None:
        if self._state is not None and self._state.in_model is not None:
            raise SwapError(
                f"Expected the raw weights in the model, but the average {self._state.in_model!r} is in it. "
                f"Call {verb} outside of the block of averaged()."
            )


def _validation_batches(data: Any, batch_size: int | None) -> Batches:
    if isinstance(data, (tuple, list)):
        data = tuple(data)
        return make_batches(*keras.utils.unpack_x_y_sample_weight(data), batch_size=batch_size)
    return make_batches(data)


def _predicate(validation_freq: int | Sequence[int]) -> Any:
    if isinstance(validation_freq, (int, np.integer)):
        if validation_freq < 1:
            raise ValueError(f"Expected validation_freq >= 1, got validation_freq={validation_freq}.")
        return lambda epoch: (epoch + 1) % validation_freq == 0
    if not isinstance(validation_freq, (list, tuple, set, range)):
        raise TypeError(f"Expected validation_freq as an int or a list of epochs, got {validation_freq!r}.")
    return lambda epoch: epoch + 1 in validation_freq


def _described(average: Average) -> str:
    """Returns in words what makes two averages the same."""
    words = f"{average.weighting} of every {average.every} {average.unit}s from {average.start}"
    wide = f" in {average.dtype}" if average.dtype else ""
    return f"{words}{wide}{' compensated' if average.compensated else ''}"


def _postfix(logs: dict[str, Any], missing: set[str]) -> str:
    shown = {
        name: value
        for name, value in logs.items()
        if name not in missing and (name in ("loss", "val_loss") or name.startswith("val_loss["))
    }
    return ", ".join(f"{name}={value:.4g}" for name, value in shown.items())
