"""Times the compiled loop on a tiny model, where all that counts is the cost of a step's surroundings.

The network is the MLP of the blobs demo (178 parameters), batch 32, SGD with momentum; the rival is Keras' own `fit` on
the same data. Compiling is not counted: each way trains once before the clock starts. Seconds are medians.

    python scripts/benchmarks/train_loop.py
    python scripts/benchmarks/train_loop.py --repeats 1 --json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import click
from tabulate import tabulate

# rows of data, epochs
CASES = ((100, 500), (20_000, 5))


@click.command(help=__doc__)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(repeats: int, as_json: bool) -> None:
    """See the module."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import keras
    import numpy as np
    import tensorflow as tf

    from streaming_polyak import LINEAR, MEAN, Average, Exponential, Trainer
    from streaming_polyak.demo.blobs import network

    def ours(unit: str | None) -> Callable[..., object]:
        weightings = {"mean": MEAN, "linear": LINEAR, "exponential": Exponential(decay=0.99)} if unit else {}
        averages = {name: Average(weighting, unit=unit) for name, weighting in weightings.items()}
        trainer = Trainer(network("sgd"), averages)
        return lambda x, y, epochs: trainer.fit(x, y, epochs=epochs, progress=False)

    def rival() -> Callable[..., object]:
        model = network("sgd")
        return lambda x, y, epochs: model.fit(x, y, epochs=epochs, verbose=0)

    ways = {
        "Keras fit": rival,
        "Trainer": lambda: ours(None),
        "Trainer, 3 averages of epochs": lambda: ours("epoch"),
        "Trainer, 3 averages of steps": lambda: ours("step"),
    }
    rows = []
    for count, epochs in CASES:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(count, 2)).astype(np.float32)
        y = np.eye(3, dtype=np.float32)[rng.integers(0, 3, count)]
        for name, make in ways.items():
            keras.utils.set_random_seed(0)
            fit = make()
            fit(x, y, 2)
            seconds = []
            for _ in range(repeats):
                started = time.perf_counter()
                fit(x, y, epochs)
                seconds.append(time.perf_counter() - started)
            steps = epochs * -(-count // 32)
            rows.append({"way": name, "epochs": epochs, "steps": steps, "seconds": statistics.median(seconds)})
            rows[-1]["times_keras"] = next(r["seconds"] for r in rows if r["epochs"] == epochs) / rows[-1]["seconds"]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}; median of {repeats}\n"
    )
    click.echo(
        tabulate(
            [
                [r["way"], r["epochs"], r["steps"], r["seconds"], r["seconds"] / r["steps"] * 1e6, r["times_keras"]]
                for r in rows
            ],
            ["way", "epochs", "steps", "seconds", "us a step", "times as fast"],
            floatfmt=("", "d", "d", ".2f", ".0f", ".1f"),
        )
    )


if __name__ == "__main__":
    main()
