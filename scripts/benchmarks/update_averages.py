"""Times an update of averages against what a user would take instead, and against one copy of the model.

Each way runs in a child process of its own; as many as there is memory for take turns, round by round.
"copies" is the median of the seconds of updates over one numpy.copyto of the model's arrays in the same process and
round. "first" is the first update, with whatever is built or compiled for it; ours is made by NumPy, while a thread
compiles for a second what makes the others. "lasting" is the anonymous memory (RssAnon of /proc/PID/status, sampled
every 2 ms) that is there after it beyond that of the model and imports, in MiB, and "passing" the peak beyond that.

The weights are a Keras model's for the ways that average one (ours, TensorFlow's, NumPy by `get_weights`), and
torch's and JAX's own for theirs. Rivals that are not installed are left out.

    python scripts/benchmarks/update_averages.py
    python scripts/benchmarks/update_averages.py --case 1e6x20 --averages 3 --json
    python scripts/benchmarks/update_averages.py --steps
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
from measuring import MIB, SAMPLE_SECONDS, memory, model_of_vectors
from tabulate import tabulate

CASES = ("1e4x20", "1e6x20", "1e7x1000", "1e8x20")
STEP_CASES = ("1e6", "1e7")
DECAYS = (0.999, 0.99, 0.9)
ROUND_SECONDS = 0.3  # of updates in a round, at least three

Update = Callable[[], Any]


def ours(model: Any, count: int, **options: Any) -> Update:
    """Mean, linear and exponential averages by this library."""
    from streaming_polyak import LINEAR, MEAN, Average, Exponential
    from streaming_polyak.training.averages import Averages

    kinds = {"mean": MEAN, "linear": LINEAR, "exponential": Exponential(decay=DECAYS[0])}
    averages = Averages(model, {name: Average(kind, **options) for name, kind in [*kinds.items()][:count]})
    epoch = iter(range(10**9))
    return lambda: averages.update_epoch(k := next(epoch), k)


def only_numpy(model: Any, count: int) -> Update:
    """This library where Numba is not installed."""
    sys.modules["numba"] = None  # type: ignore[assignment]
    return ours(model, count)


def moving_average(model: Any, count: int) -> Update:
    """`tf.train.ExponentialMovingAverage`, one object an average."""
    import tensorflow as tf

    variables = [v.value for v in model.variables]
    averages = [tf.train.ExponentialMovingAverage(decay) for decay in DECAYS[:count]]

    @tf.function(autograph=False)
    def update() -> None:
        for average in averages:
            average.apply(variables)

    return update


def plain_function(model: Any, count: int) -> Update:
    """`assign_add` in one `tf.function`."""
    import tensorflow as tf

    variables = [v.value for v in model.variables]
    averages = [[tf.Variable(tf.zeros(v.shape)) for v in variables] for _ in range(count)]

    @tf.function(autograph=False)
    def update() -> None:
        for decay, means in zip(DECAYS, averages, strict=False):
            for m, w in zip(means, variables, strict=True):
                m.assign_add((1 - decay) * (w - m))

    return update


def by_numpy(model: Any, count: int) -> Update:
    """NumPy in place, on what `get_weights` gives."""
    averages = [[np.zeros(v.shape, np.float32) for v in model.variables] for _ in range(count)]

    def update() -> None:
        weights = model.get_weights()
        for decay, means in zip(DECAYS, averages, strict=False):
            for m, w in zip(means, weights, strict=True):
                difference = w - m
                difference *= np.float32(1 - decay)
                m += difference

    return update


def averaged_model(shapes: list[tuple[int, ...]], count: int) -> Update:
    """`torch.optim.swa_utils.AveragedModel` with its exponential average by foreach, one object an average."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = torch.nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"w{i}", torch.nn.Parameter(torch.randn(shape)))
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in DECAYS[:count]]

    def update() -> None:
        for average in averages:
            average.update_parameters(model)

    update()  # its first one copies
    return update


def incremental_update(shapes: list[tuple[int, ...]], count: int) -> Update:
    """`optax.incremental_update` under jit, the averages donated."""
    import jax
    import optax

    key = jax.random.key(0)
    weights = [jax.random.normal(key, shape) for shape in shapes]
    state = [[jax.numpy.zeros(shape) for shape in shapes] for _ in range(count)]

    @jax.jit
    def all_of(weights: Any, state: Any) -> Any:
        return [optax.incremental_update(weights, m, 1 - d) for m, d in zip(state, DECAYS, strict=False)]

    moved = jax.jit(all_of, donate_argnums=1)

    def update() -> None:
        nonlocal state
        state = jax.block_until_ready(moved(weights, state))

    return update


ON_KERAS = {
    "streaming_polyak": ours,
    "streaming_polyak without Numba": only_numpy,
    "streaming_polyak, float64": lambda model, count: ours(model, count, dtype="float64"),
    "streaming_polyak, compensated": lambda model, count: ours(model, count, compensated=True),
    "tf.train.ExponentialMovingAverage": moving_average,
    "tf.function": plain_function,
    "NumPy": by_numpy,
}
ON_SHAPES = {"torch AveragedModel": averaged_model, "optax incremental_update": incremental_update}
NEEDS = {"torch AveragedModel": "torch", "optax incremental_update": "optax", "streaming_polyak": "numba"}
OURS = [way for way in ON_KERAS if way.startswith("streaming_polyak")]


def shapes_of(case: str) -> list[tuple[int, ...]]:
    """Reads "1e6x20": so many parameters in so many tensors."""
    parameters, _, tensors = case.partition("x")
    return [(int(float(parameters)) // int(tensors),)] * int(tensors)


def child(way: str, case: str, count: int) -> None:
    """Makes an update for each line that it reads, and prints what it took."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    shapes = shapes_of(case)
    if way in ON_KERAS:
        import tensorflow  # noqa: F401

        model = model_of_vectors(sum(size for (size,) in shapes), len(shapes))
    sources = [np.ones(shape, np.float32) for shape in shapes]
    targets = [np.zeros(shape, np.float32) for shape in shapes]
    print("imported", flush=True)
    sys.stdin.readline()
    update = ON_KERAS[way](model, count) if way in ON_KERAS else ON_SHAPES[way](shapes, count)
    print("made", flush=True)
    for line in sys.stdin:
        seconds, copies = [], []
        end = time.perf_counter() + ROUND_SECONDS
        while len(seconds) < (1 if line == "first\n" else 3) or (line == "round\n" and time.perf_counter() < end):
            started = time.perf_counter()
            for target, source in zip(targets, sources, strict=True):
                np.copyto(target, source)
            between = time.perf_counter()
            update()
            seconds.append(time.perf_counter() - between)
            copies.append(between - started)
        if way in OURS:
            from streaming_polyak.training.kernels import finish_compiling

            finish_compiling()  # what a thread compiles meanwhile
        print(json.dumps([statistics.median(seconds), statistics.median(copies)]), flush=True)


class Child:
    """A way to update averages, in a process of its own."""

    def __init__(self, way: str, case: str, count: int) -> None:
        program = [sys.executable, __file__, "--child", way, case, str(count)]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        self.peak = 0

    def anonymous(self) -> int:
        """Returns its anonymous memory in bytes."""
        return memory(self.process.pid)[0]

    def read(self) -> str:
        """Returns the next line, sampling memory until it is there."""
        assert self.process.stdout is not None
        while not select.select([self.process.stdout], [], [], SAMPLE_SECONDS)[0]:
            self.peak = max(self.peak, self.anonymous())
        line = self.process.stdout.readline().strip()
        if not line:
            raise click.ClickException(f"a measured process ended early: {' '.join(map(str, self.process.args[-3:]))}")  # type: ignore[misc]
        return line

    def ask(self, word: str) -> Any:
        """Sends a line and returns the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        return self.read()


def measure(case: str, count: int, ways: list[str], rounds: int) -> list[dict[str, Any]]:
    """Runs the ways of a case in turns, as many at once as there is memory for."""
    each = sum(4 * shape[0] for shape in shapes_of(case)) * (4 + 3 * count) + 500 * MIB
    at_once = max(1, int(0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / each))
    rows = [
        row for k in range(0, len(ways), at_once) for row in measure_some(case, count, ways[k : k + at_once], rounds)
    ]
    best = min((row["copies"] for row in rows if row["way"] not in OURS), default=None)
    for row in rows:
        row["times_best_rival"] = None if best is None else row["copies"] / best
    return rows


def measure_some(case: str, count: int, ways: list[str], rounds: int) -> list[dict[str, Any]]:
    """Runs ways in turns."""
    rows: list[dict[str, Any]] = []
    children = {way: Child(way, case, count) for way in ways}
    for way, made in children.items():
        assert made.read() == "imported"
        before = made.anonymous()
        assert made.ask("make") == "made"
        made.peak = 0
        first, _ = json.loads(made.ask("first"))
        after = made.anonymous()
        rows.append(
            {
                "case": case,
                "averages": count,
                "way": way,
                "first_seconds": first,
                "lasting_mib": (after - before) / MIB,
                "passing_mib": (max(made.peak, after) - after) / MIB,
                "rounds": [],
            }
        )
    for k in range(rounds):
        for row in rows:
            made = children[row["way"]]
            before, made.peak = made.anonymous(), 0
            row["rounds"].append(json.loads(made.ask("round")))
            if k == 0:
                row["later_passing_mib"] = max(0, made.peak - before) / MIB
    for row in rows:
        made = children[row["way"]].process
        made.kill()
        made.communicate()
        row["seconds"] = statistics.median(seconds for seconds, _ in row["rounds"])
        row["copies"] = statistics.median(seconds / copy for seconds, copy in row.pop("rounds"))
    return rows


def step_child(case: str, rounds: int) -> None:
    """Prints the seconds a training step takes with and without a step-wise average, ours and Keras' own."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras

    import streaming_polyak as sp

    width = int((float(case) / 3) ** 0.5)
    x = np.random.default_rng(0).normal(size=(32 * 40, width)).astype(np.float32)

    def model(use_ema: bool) -> Any:
        layers = [keras.layers.Dense(width, activation="relu") for _ in range(3)]
        made = keras.Sequential([keras.Input((width,)), *layers])
        made.compile(keras.optimizers.Adam(1e-4, use_ema=use_ema, ema_momentum=DECAYS[0]), "mse")
        return made

    def trained(averages: dict[str, Any]) -> Update:
        trainer = sp.Trainer(model(False), averages)
        return lambda: trainer.fit(x, x, batch_size=32, epochs=1, progress=False)

    def fitted(use_ema: bool) -> Update:
        made = model(use_ema)
        return lambda: made.fit(x, x, batch_size=32, epochs=1, verbose=0)

    ema = sp.Average(sp.Exponential(decay=DECAYS[0]), unit="step")
    ways = {
        "Trainer": trained({}),
        "Trainer, step average": trained({"ema": ema}),
        "Keras fit": fitted(False),
        "Keras fit, use_ema": fitted(True),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for k in range(rounds + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            if k:
                seconds[way].append((time.perf_counter() - started) / 40)
    target, source, copies = np.zeros(3 * width * width, np.float32), np.ones(3 * width * width, np.float32), []
    for _ in range(21):
        started = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - started)
    print(json.dumps([{way: statistics.median(s) for way, s in seconds.items()}, statistics.median(copies)]))


def measure_steps(case: str, rounds: int) -> list[dict[str, Any]]:
    """Runs the ways to train a step in one child, in turns."""
    program = [sys.executable, __file__, "--step-child", case, str(rounds)]
    run = subprocess.run(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    seconds, copy = json.loads(run.stdout.splitlines()[-1])
    pairs = (("Trainer", "Trainer, step average"), ("Keras fit", "Keras fit, use_ema"))
    return [
        {
            "parameters": case,
            "way": extra,
            "without_seconds": seconds[way],
            "with_seconds": seconds[extra],
            "adds_seconds": seconds[extra] - seconds[way],
            "adds_copies": (seconds[extra] - seconds[way]) / copy,
        }
        for way, extra in pairs
    ]


@click.command(help=__doc__)
@click.option("--case", "cases", multiple=True, help="PARAMETERSxTENSORS; several times. [default: all four]")
@click.option("--averages", "counts", multiple=True, type=click.IntRange(1, 3), help="[default: 1 and 3]")
@click.option("--way", "ways", multiple=True, type=click.Choice([*ON_KERAS, *ON_SHAPES]), help="[default: all]")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--steps", is_flag=True, help="Measure what a step-wise average adds to a training step instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(
    cases: tuple[str, ...],
    counts: tuple[int, ...],
    ways: tuple[str, ...],
    rounds: int,
    steps: bool,
    as_json: bool,
) -> None:
    """See the module."""
    if steps:
        rows = [row for case in cases or STEP_CASES for row in measure_steps(case, rounds)]
        header = {
            "parameters": "parameters", "way": "way", "without_seconds": "without, s", "with_seconds": "with, s",
            "adds_seconds": "adds, s", "adds_copies": "adds, copies",
        }  # fmt: skip
    else:
        wanted = [*(ways or [*ON_KERAS, *ON_SHAPES])]
        missing = [way for way in wanted if way in NEEDS and importlib.util.find_spec(NEEDS[way]) is None]
        for way in missing:
            click.echo(f"left out: {way}, as {NEEDS[way]} is not installed", err=True)
        wanted = [way for way in wanted if way not in missing]
        rows = [
            row for case in cases or CASES for count in counts or (1, 3) for row in measure(case, count, wanted, rounds)
        ]
        header = {
            "case": "parameters x tensors", "averages": "averages", "way": "way", "copies": "copies",
            "times_best_rival": "x best rival", "seconds": "s", "first_seconds": "first, s", "lasting_mib": "lasting",
            "passing_mib": "first passing", "later_passing_mib": "later passing",
        }  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}\n")
    shown = [{name: row[key] for key, name in header.items()} for row in rows]
    click.echo(tabulate(shown, "keys", tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["--step-child"]:
        step_child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
