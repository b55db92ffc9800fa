"""A long run as an example to copy: a small transformer learns to write Python from Python's own library.

    python scripts/train_text.py --minutes 3
    python scripts/train_text.py --minutes 60 --width 128 --layers 4

The text is the source files of the standard library that runs this script, so nothing is downloaded; the model, a
decoder-only transformer of Keras' own layers, predicts the next character. It trains until `--minutes` are used up, all
sessions together. Stop it with Ctrl-C, kill it, lose power: the same command goes on. When the time is used up, it
shows the end again, and with more minutes it goes on. What to take over into a run of your own:

- The data set is finite and shuffled with a seed, and `steps_per_epoch` cuts it into epochs of some ten seconds, so
  that there are enough members for averages of epochs; a resumed run finds its place in it again. The buffer of the
  shuffle is saved with the run, so it is small, and the text is mixed as a whole beforehand.
- The learning rate is warmed up and then constant. How long the run will be need not be known, and the averages do
  what lowering the rate would do. On top of a rate that goes down to nothing they gained nothing (see README).
- Several averages at once, as they cost little: mean and linear of epochs, an exponential one of steps. Validation, on
  files that are not trained on, picks one; what it is worth is measured on still other files.
- What a callback remembers goes by `get_state` and `set_state` into each checkpoint: here the seconds used so far. It
  ends the run by raising, between two epochs. (Had it set `model.stop_training`, the run would be saved as ended.)
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tabulate import tabulate

import streaming_polyak as sp
from streaming_polyak import plots
from streaming_polyak.errors import Interrupted

Codes = NDArray[np.uint8]

RAW = "raw"
CHARACTERS = 128  # ASCII, by code; all others become "?"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
BATCH, EVALUATION_BATCH = 16, 100
SHUFFLED = 2000  # windows at a time; they are in each checkpoint
RATE = 0.004  # after the warm-up
HALF_LIFE = 200  # steps, of the exponential average
VALIDATION_WINDOWS, TEST_PARTS, PART_WINDOWS = 300, 10, 200
SAMPLE = 200  # characters
BIT = float(np.log(2))
PROMPT = "class Reader:\n    def __init__(self, "


class TimeUp(Exception):
    """The run has had its minutes."""


class Clock(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Prints a line an epoch and raises `TimeUp` before the next one when all sessions have used so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self._used, self._began = seconds, 0.0, time.monotonic()

    @property
    def used(self) -> float:
        """Seconds used so far, earlier sessions included."""
        return self._used + time.monotonic() - self._began

    def get_state(self) -> dict[str, float]:
        """Returns what is saved with the run."""
        return {"used": self.used}

    def set_state(self, state: dict[str, float]) -> None:
        """Takes what was saved, in a later session."""
        self._used, self._began = state["used"], time.monotonic()
        click.echo(f"Going on with the run: {self._used:.0f} seconds are used.")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Ends the run when it is time; the last epoch is saved."""
        if epoch and self.used >= self.seconds:
            raise TimeUp

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Prints the validation losses."""
        losses = {key[9:-1] or RAW: value / BIT for key, value in logs.items() if key.startswith("val_loss")}
        said = ", ".join(f"{name} {bits:.3f}" for name, bits in losses.items())
        click.echo(f"epoch {epoch}, {self.used:.0f} s: validation, bits per character: {said}")


def load(context: int) -> tuple[Codes, Codes, Codes]:
    """Reads the standard library's sources; returns windows that train, validate and test, of different files.

    Each is of shape (windows, context + 1); which file is for what is the same in each process.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(library.rglob("*.py")) if LEFT_OUT.isdisjoint(p.relative_to(library).parts)]
    texts = [path.read_text("utf-8", errors="replace").encode("ascii", "replace") for path in files]
    order = np.random.default_rng(0).permutation(len(files))
    parts = np.split(order, [-len(files) // 10, -len(files) // 20])
    train, validation, test = (_windows(b"\n".join(texts[i] for i in part), context) for part in parts)
    train, validation, test = (np.random.default_rng(1).permutation(part) for part in (train, validation, test))
    return train, validation[:VALIDATION_WINDOWS], test[: TEST_PARTS * PART_WINDOWS]


def _windows(text: bytes, context: int) -> Codes:
    rows = len(text) // (context + 1)
    return np.frombuffer(text, np.uint8, rows * (context + 1)).reshape(rows, context + 1)


def batches(windows: Codes, size: int, seed: int | None = None) -> tf.data.Dataset:
    """Returns one pass over the windows in batches (text, the same text one character on), shuffled by a seed."""
    data = tf.data.Dataset.from_tensor_slices(windows)
    if seed is not None:  # another order in each pass, the same in each process; no repeat: `fit` begins it anew
        data = data.shuffle(SHUFFLED, seed=seed)

    def split(window: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        codes = tf.cast(window, tf.int32)
        return codes[:, :-1], codes[:, 1:]

    return data.batch(size, drop_remainder=seed is not None).map(split, num_parallel_calls=2).prefetch(2)


def transformer(context: int, width: int, depth: int) -> keras.Model:
    """Returns the compiled model, of Keras' own layers alone, so that its exported file loads without this script."""
    layers, ops = keras.layers, keras.ops
    codes = keras.Input((context,), dtype="int32")
    places = ops.cumsum(ops.ones_like(codes), axis=1) - 1
    x = layers.Embedding(CHARACTERS, width)(codes) + layers.Embedding(context, width)(places)
    for _ in range(depth):
        heads = layers.MultiHeadAttention(max(1, width // 32), min(32, width))
        normal = layers.LayerNormalization(epsilon=1e-5)(x)
        x = x + heads(normal, normal, use_causal_mask=True)
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization(epsilon=1e-5)(x))
        x = x + layers.Dense(width)(hidden)
    model = keras.Model(codes, layers.Dense(CHARACTERS)(layers.LayerNormalization(epsilon=1e-5)(x)), name="text")
    # With alpha = 1 there is no decay after the warm-up.
    schedule = keras.optimizers.schedules.CosineDecay(0.0, 1, alpha=1.0, warmup_target=RATE, warmup_steps=100)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.01, beta_2=0.99, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # XLA compiles for longer than it saves in three minutes
    )
    return model


def sampler(model: keras.Model, context: int, temperature: float = 0.7) -> Any:
    """Returns a function (prompt, length, seed) that has the model, with the weights it has then, write on."""

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types
    def step(window: tf.Tensor, place: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        logits = model(window, training=False)[:, place] / temperature
        return tf.random.stateless_categorical(logits, 1, seed)[0, 0]

    def write(prompt: str, length: int, seed: int) -> str:
        codes = list(prompt.encode("ascii"))
        for number in range(length):
            recent = codes[-context:]
            window = np.array([recent + [0] * (context - len(recent))], np.int32)  # what comes later is not seen
            codes.append(int(step(window, tf.constant(len(recent) - 1), tf.constant([seed, number]))))
        return bytes(codes).decode("ascii")

    return write


def finish(trainer: sp.Trainer, history: sp.History, test: Codes, seed: int, folder: Path) -> None:
    """Shows what the averages are worth on the test files, and samples; writes the model and the learning curves."""
    parts = [batches(part, EVALUATION_BATCH) for part in np.array_split(test, TEST_PARTS)]
    begun = [name for name in trainer.averages if trainer.count(name)]
    scores: dict[str, NDArray[np.float64]] = {}  # of shape (parts, 2): bits per character, accuracy
    for name in (RAW, *begun):
        found = [trainer.evaluate(part, average=None if name == RAW else name) for part in parts]
        scores[name] = np.array([[score["loss"] / BIT, score["accuracy"]] for score in found])
    validation = {name: history.history[_key("loss", name)][-1] for name in scores}
    members = {RAW: "", **{name: trainer.count(name) for name in begun}}
    rows = [[name, members[name], validation[name] / BIT, *scores[name].mean(axis=0)] for name in scores]
    headers = ["weights", "members", "validation bits", "test bits", "test accuracy"]
    click.echo(f"\nAfter {len(history.epoch)} epochs, losses in bits per character\n")
    click.echo(tabulate(rows, headers, floatfmt=("", "", ".3f", ".3f", ".3f")))
    best = min(begun, key=lambda name: validation[name])  # that of steps has begun at the first one
    click.echo(f"\n{_verdict(best, scores)}")

    write = sampler(trainer.model, test.shape[1] - 1)
    for name in (RAW, best):
        with contextlib.nullcontext() if name == RAW else trainer.averaged(name):
            sample = write(PROMPT, SAMPLE, seed)
        click.echo(f"\n--- sample, {name} weights ---\n{sample}")

    curves, model = folder / "curves.png", folder / "text.keras"
    values = {name: np.array(history.history[_key("loss", name)]) / BIT for name in (RAW, *trainer.averages)}
    accuracies = {name: np.array(history.history[_key("accuracy", name)]) for name in values}
    panels = {"validation loss, bits per character": values, "validation accuracy": accuracies}
    late = dict.fromkeys(panels, min(len(history.epoch) // 4, 10))
    plots.curves(curves, history.epoch, panels, "A transformer on the standard library", from_epoch=late)
    trainer.export(model, average=best)
    click.echo(f"\nFiles written: {curves} {model} ({best} weights)")


def _verdict(best: str, scores: dict[str, NDArray[np.float64]]) -> str:
    """Says what the average that validation picked gained on the test files."""
    gains = (scores[RAW] - scores[best])[:, 0]
    gain, raw, better = float(gains.mean()), float(scores[RAW][:, 0].mean()), int((gains > 0).sum())
    what = f"averaging {'gained' if gain > 0 else 'lost'} {abs(gain):.3f} bits per character ({abs(gain) / raw:.1%})"
    return (
        f"On the test files {what}: {best}, picked by validation, against raw;\nbetter in {better} of {len(gains)} "
        "parts of the text. This is one run at a constant learning rate; another seed gives another figure."
    )


def _key(score: str, name: str) -> str:
    return f"val_{score}" + (f"[{name}]" if name != RAW else "")


@click.command()
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=3.0, help="To train, in all sessions.")
@click.option("--run-dir", type=click.Path(path_type=Path), default=Path("text_run"), help="Where the run is kept.")
@click.option("--width", type=click.IntRange(8), default=64, help="Of the model; above 32 a multiple of it.")
@click.option("--layers", type=click.IntRange(1), default=2, help="Attention blocks.")
@click.option("--context", type=click.IntRange(8), default=64, help="Characters that the model sees.")
@click.option("--steps", type=click.IntRange(1), default=400, help="Steps an epoch.")
@click.option("--epochs", type=click.IntRange(1), default=1_000_000, help="The most there may be, whatever the time.")
@click.option("--start", type=click.IntRange(0), default=5, help="First epoch in the averages of epochs.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, order and samples.")
def main(
    minutes: float,
    run_dir: Path,
    width: int,
    layers: int,
    context: int,
    steps: int,
    epochs: int,
    start: int,
    seed: int,
) -> None:
    """Trains a transformer on Python's own library for so many minutes, and shows what averaging is worth."""
    again = shlex.join(["python", *sys.argv])
    train, validation, test = load(context)
    click.echo(f"{train.size / 1e6:.1f} million characters to train on; everything is kept in {run_dir}.")
    keras.utils.set_random_seed(seed)
    trainer = sp.Trainer(
        transformer(context, width, layers),
        {
            "mean": sp.Average(sp.MEAN, start=start),
            "linear": sp.Average(sp.LINEAR, start=start),
            "ema": sp.Average(sp.Exponential(half_life=HALF_LIFE), unit="step"),
        },
        seed=seed,
        run_dir=run_dir,
        save_every="1 epoch",
    )
    try:
        trainer.fit(
            batches(train, BATCH, seed),
            epochs=epochs,
            steps_per_epoch=steps,
            validation_data=batches(validation, EVALUATION_BATCH),
            callbacks=[Clock(60 * minutes)],
            progress=False,  # the clock prints lines instead
        )
    except TimeUp:
        pass
    except Interrupted:
        click.echo(f"Stopped and saved. To go on: {again}")
        raise
    except sp.StreamingPolyakError as error:  # such as a run folder of a model of another width
        raise click.ClickException(str(error)) from error
    assert trainer.history is not None
    finish(trainer, trainer.history, test, seed, run_dir)
    click.echo(f"To see this again, or to go on with more --minutes: {again}")


if __name__ == "__main__":
    main()
