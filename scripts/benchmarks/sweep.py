"""The demo's ten members, thirty averages of the last n and ten single models: in one pass, and the tutorial way.

The tutorial way loads all models, and for each of the forty evaluations averages all members layer by layer, clones a
model, sets the weights, compiles it and evaluates. Both ways run in one process after the imports, in turns, and their
accuracies are compared. Members come from a run of the demo's network (500 epochs, the last ten kept).

    python scripts/benchmarks/sweep.py
    python scripts/benchmarks/sweep.py --members 5 --epochs 50 --repeats 1 --json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time

import click
from tabulate import tabulate

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--members", type=click.IntRange(2), default=10, show_default=True)
@click.option("--epochs", type=click.IntRange(2), default=500, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(members: int, epochs: int, repeats: int, as_json: bool) -> None:
    import keras
    import numpy as np

    from streaming_polyak import LINEAR, MEAN, Exponential, KerasEvaluator, Members, Trainer, sweep_checkpoints
    from streaming_polyak.demo import blobs

    train, test = blobs.load()
    weightings = {"mean": MEAN, "linear": LINEAR, "exponential": Exponential(alpha=2)}
    scores: dict[str, dict[tuple[str, int], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        keras.utils.set_random_seed(0)
        trainer = Trainer(blobs.network("sgd"), {}, members=Members(folder, start=epochs - members))
        trainer.fit(*train, epochs=epochs, progress=False)
        paths = trainer.member_paths

        def ours() -> None:
            result = sweep_checkpoints(paths, weightings, KerasEvaluator(blobs.network("sgd"), *test))
            rows = [(("single", number), row) for number, row in enumerate(result.of("single"), start=1)]
            rows += [((name, row.n), row) for name in weightings for row in result.of(name)]
            scores["ours"] = {key: row.metrics["accuracy"] for key, row in rows}

        def tutorial() -> None:
            models = [keras.models.load_model(path) for path in reversed(paths)]  # newest first
            found: dict[tuple[str, int], float] = {}
            for n in range(1, len(models) + 1):
                found["single", n] = models[n - 1].evaluate(*test, verbose=0)[1]
                for name, weighting in weightings.items():
                    weights = weighting.weights(n)[::-1]
                    averaged = [
                        np.average(
                            np.array([model.get_weights()[layer] for model in models[:n]]), axis=0, weights=weights
                        )
                        for layer in range(len(models[0].get_weights()))
                    ]
                    model = keras.models.clone_model(models[0])
                    model.set_weights(averaged)
                    model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
                    found[name, n] = model.evaluate(*test, verbose=0)[1]
            scores["tutorial"] = found

        seconds: dict[str, list[float]] = {"ours": [], "tutorial": []}
        for _ in range(repeats):
            for way, work in (("ours", ours), ("tutorial", tutorial)):
                started = time.perf_counter()
                work()
                seconds[way].append(time.perf_counter() - started)
    assert scores["ours"].keys() == scores["tutorial"].keys()
    worst = max(abs(value - scores["tutorial"][key]) for key, value in scores["ours"].items())
    # One row of a thousand may fall on the other side of a boundary by the last bit of a weight.
    if worst > 0.0015:
        raise click.ClickException(f"The accuracies of the two ways differ by up to {worst}.")
    median = {way: statistics.median(times) for way, times in seconds.items()}
    rows = [
        {
            "way": way,
            "evaluations": len(scores[way]),
            "seconds": median[way],
            "times_ours": median[way] / median["ours"],
        }
        for way in median
    ]
    if as_json:
        click.echo(json.dumps({"rows": rows, "largest_difference": worst}, indent=1))
        return
    click.echo(
        f"{platform.platform()}, {os.cpu_count()} processors, Keras {keras.__version__}, NumPy {np.__version__}; "
        f"{members} members; accuracies of the two ways differ by at most {worst:.3f}\n"
    )
    header = ["way", "evaluations", "seconds", "x ours"]
    click.echo(
        tabulate([list(row.values()) for row in rows], header, tablefmt="github", floatfmt=("", "d", ".2f", ".1f"))
    )


if __name__ == "__main__":
    main()
