"""The compiled loop against Keras' own `fit`: the same model, data, batch and compiled metrics.

Each case runs in a process of its own; each run of it in a process forked from that one after the imports and before
TensorFlow does anything, so that none finds anything traced, compiled or allocated by another. The ways take turns.
Figures are medians over the repeats:

- "seconds": from the call of `fit` to its return, tracing and compiling included;
- "ms an epoch": once running, the median of the second half of the epochs;
- "start s": from the call of `fit` to the end of the first step, which a callback then stops;
- "x best fit": seconds, and those of an epoch, divided by those of the best `fit` with the same data, which is the
  default one or the one with the best `steps_per_execution` of those tried; below 1 is faster. As `auto` compiles
  nothing with XLA without a GPU, "mlp" has rows with `jit_compile=True` as well, compared with one another;
- "peak MiB": the largest anonymous memory of the process (RssAnon of /proc/PID/status, every 5 ms), imports included.

What three averages add is written without the time of the evaluations they ask for: three times what the evaluation of
the raw weights takes in the run without averages. The case "input" feeds the text transformer's step from its tf.data
pipeline, and in turns, epoch by epoch in one process, a second model's same step from one constant batch. The case
"whole" is the tutorial from beginning to end: 500 epochs, ten members kept as files, the averages of the last
n = 1..10 under three weightings and the ten single models evaluated; the tutorial's way only with --slow.

    python scripts/benchmarks/train_loop.py
    python scripts/benchmarks/train_loop.py --slow
    python scripts/benchmarks/train_loop.py --case digits --repeats 1 --json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from measuring import MIB, resident
from tabulate import tabulate

SAMPLE_SECONDS = 0.005
LONG_SECONDS = 4.0  # a way that takes longer is not repeated
EXECUTIONS = (4, 25)  # steps_per_execution tried, as far as an epoch has so many steps
CASES = ("tiny", "tutorial", "mlp", "digits", "text", "input", "whole")
TRIAL_EPOCHS = 3  # with each
CONTEXT, WIDTH, DEPTH, TEXT_BATCH = 32, 32, 1, 16
INPUT_STEPS = 200
FIT, TRAINER = "fit", "Trainer"


class Case:
    """What is trained: `model` makes the compiled network, `data` what it trains on and what validates."""

    def __init__(self, name: str) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        self.name, self.batch_size, self.steps = name, 32, 0
        if name in ("tutorial", "tiny", "whole"):
            from streaming_polyak.demo import blobs

            self.train, self.test = blobs.load()
            self.make: Callable[[], Any] = lambda: blobs.network("sgd")
            self.epochs = 6 if name == "tiny" else 500
        elif name == "mlp":
            x, y = rng.normal(size=(1920, 256)).astype(np.float32), np.eye(10, dtype=np.float32)
            y = y[rng.integers(0, 10, len(x))]
            self.train, self.test = (x[:1600], y[:1600]), (x[1600:], y[1600:])
            self.make, self.epochs = _mlp, 16  # Numba compiles during the first ones
        elif name == "digits":
            from streaming_polyak.demo import digits

            self.train, self.test = digits.load()
            self.make, self.epochs = digits.network, 10
        else:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            import train_text

            self.text = train_text
            self.windows = train_text.load(CONTEXT)[:2]
            self.make = lambda: train_text.transformer(CONTEXT, WIDTH, DEPTH)
            self.epochs, self.steps, self.batch_size = 6, 100, TEXT_BATCH
        self.steps_an_epoch = self.steps or -(-len(self.train[0]) // self.batch_size)

    def model(self, **options: Any) -> Any:
        """Returns the network, compiled with other options."""
        import keras

        keras.utils.set_random_seed(0)
        model = self.make()
        options = {"jit_compile": False, **options}
        model.compile(model.optimizer, model.loss, metrics=["accuracy"], **options)
        return model

    def arguments(self, validated: bool) -> dict[str, Any]:
        """Returns what both `fit` take."""
        if self.steps:
            train, test = self.windows
            given = {"x": self.text.batches(train, self.batch_size, 0), "steps_per_epoch": self.steps}
            test = self.text.batches(test, self.text.EVALUATION_BATCH)
        else:
            given = {"x": self.train[0], "y": self.train[1], "batch_size": self.batch_size}
            test = self.test
        return {**given, "validation_data": test} if validated else given


def _mlp() -> Any:
    import keras

    layers = [keras.layers.Dense(width, activation="relu") for width in (1024, 512, 384)]
    model = keras.Sequential([keras.Input((256,)), *layers, keras.layers.Dense(10, activation="softmax")])
    model.compile("adam", "categorical_crossentropy")
    return model


def fit(case: Case, way: str, options: dict[str, Any], validated: bool, epochs: int, averages: bool) -> dict[str, Any]:
    """Makes one run of `fit`; 0 epochs is its first step alone."""
    import keras

    import streaming_polyak as sp

    ends: list[float] = []
    tests: list[float] = []

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            ends.append(time.perf_counter())

        def on_test_begin(self, logs: Any = None) -> None:
            self.began = time.perf_counter()

        def on_test_end(self, logs: Any = None) -> None:
            tests.append(time.perf_counter() - self.began)

    class First(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if not ends:
                ends.append(time.perf_counter())
            self.model.stop_training = True

    given = {**case.arguments(validated), "epochs": epochs or 1, "callbacks": [Clock() if epochs else First()]}
    model = case.model(**options)
    weightings = (sp.MEAN, sp.LINEAR, sp.Exponential(decay=0.9)) if averages else ()
    trainer = sp.Trainer(model, {str(weighting): sp.Average(weighting) for weighting in weightings})
    started = time.perf_counter()
    if way == FIT:
        model.fit(**given, verbose=0)
    else:
        trainer.fit(**given, progress=False)
    seconds = time.perf_counter() - started
    if not epochs:
        return {"start": ends[0] - started}
    late = len(ends) // 2
    found = {
        "seconds": seconds,
        "epoch": statistics.median(b - a for a, b in zip(ends[late - 1 :], ends[late:], strict=False)),
    }
    return {**found, "test": statistics.median(tests[late:])} if tests else found


def feed(case: Case) -> dict[str, Any]:
    """Returns the seconds of an epoch fed by tf.data and of as many steps on one constant batch, in turns."""
    import keras
    import tensorflow as tf

    from streaming_polyak import Trainer
    from streaming_polyak.training.loop import train_step

    trainer = Trainer(case.model())
    constant = case.model()
    constant.optimizer.build(constant.trainable_variables)
    dataset = case.text.batches(case.windows[0], case.batch_size, 0)
    batch = next(iter(dataset))
    step = train_step(constant, keras.metrics.Mean())
    constant.compute_metrics(batch[0], batch[1], constant(batch[0]))  # its variables

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types
    def steps() -> None:
        tf.while_loop(lambda i: i < INPUT_STEPS, lambda i: (step(batch), (i + 1,))[1], (0,), parallel_iterations=1)

    times: dict[str, list[float]] = {"tf.data": [], "constant": []}

    class Turns(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            started = time.perf_counter()
            steps()
            constant.optimizer.iterations.numpy()  # waits
            self.began = time.perf_counter()
            times["constant"].append(self.began - started)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            times["tf.data"].append(time.perf_counter() - self.began)

    trainer.fit(dataset, steps_per_epoch=INPUT_STEPS, epochs=14, callbacks=[Turns()], progress=False)
    found = {way: statistics.median(seconds[4:]) for way, seconds in times.items()}
    return {**found, "rate": found["constant"] / found["tf.data"]}


def tutorial(case: Case, way: str, folder: Path) -> dict[str, Any]:
    """Does all of the tutorial; returns the seconds and the accuracies by (weighting, n)."""
    import keras
    import numpy as np

    import streaming_polyak as sp

    weightings = {"mean": sp.MEAN, "linear": sp.LINEAR, "exponential": sp.Exponential(alpha=2)}
    first, found = case.epochs - 10, {}
    started = time.perf_counter()
    model = case.model()
    if way == TRAINER:
        trainer = sp.Trainer(model, members=sp.Members(folder, start=first))
        trainer.fit(*case.train, epochs=case.epochs, progress=False)
        result = sp.sweep_checkpoints(trainer.member_paths, weightings, sp.KerasEvaluator(model, *case.test))
        found = {f"{name} {row.n}": row.metrics["accuracy"] for name in weightings for row in result.of(name)}
        found |= {f"single {k}": row.metrics["accuracy"] for k, row in enumerate(result.of("single"), start=1)}
        return {"seconds": time.perf_counter() - started, "accuracies": found}
    for epoch in range(case.epochs):
        model.fit(*case.train, epochs=1, verbose=0)
        if epoch >= first:
            model.save(folder / f"epoch-{epoch}.keras")
    paths = [folder / f"epoch-{epoch}.keras" for epoch in range(first, case.epochs)]
    models = [keras.models.load_model(path) for path in reversed(paths)]  # newest first
    for n in range(1, len(models) + 1):
        found[f"single {n}"] = models[n - 1].evaluate(*case.test, verbose=0)[1]
        for name, weighting in weightings.items():
            layers = zip(*(m.get_weights() for m in models[:n]), strict=True)
            averaged = [np.average(np.array(layer), axis=0, weights=weighting.weights(n)[::-1]) for layer in layers]
            clone = keras.models.clone_model(models[0])
            clone.set_weights(averaged)
            clone.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
            found[f"{name} {n}"] = clone.evaluate(*case.test, verbose=0)[1]
    return {"seconds": time.perf_counter() - started, "accuracies": found}


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Does the work in a fork of this process; returns what it gives and the peak of its memory."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            import tensorflow as tf

            tf.zeros(1)  # TensorFlow starts now, and not on anyone's clock
            os.write(writer, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    peak = 0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, resident(pid)[0])
        time.sleep(SAMPLE_SECONDS)
    with os.fdopen(reader) as answer:
        text = answer.read()
    if status:
        raise RuntimeError(f"A run ended with status {status}.")
    return {**json.loads(text), "mib": peak / MIB}


def child(name: str, repeats: int, slow: bool) -> list[dict[str, Any]]:
    """Runs all ways of a case; returns a row each."""
    import tensorflow  # noqa: F401  # before the forks

    import streaming_polyak

    streaming_polyak.Trainer  # noqa: B018  # imported when it is first asked for
    case = Case(name)
    if name == "input":
        return [{"case": name, "way": "tf.data", **_median([forked(partial(feed, case)) for _ in range(repeats)])}]
    if name == "whole":
        return _whole(case, repeats, slow)
    tried = {
        k: forked(partial(fit, case, FIT, {"steps_per_execution": k}, False, TRIAL_EPOCHS, False))["epoch"]
        for k in EXECUTIONS
        if k <= case.steps_an_epoch
    }
    best = {"steps_per_execution": min(tried, key=tried.__getitem__)}
    rows = []
    for validated in (False, True):
        ways = [(FIT, {}, False), (FIT, best, False), (TRAINER, {}, False)]
        if validated:
            ways.append((TRAINER, {}, True))
        elif name == "mlp":
            ways += [(way, {"jit_compile": True}, False) for way in (FIT, TRAINER)]
        found: list[list[dict[str, Any]]] = [[] for _ in ways]
        for _ in range(repeats):
            for (way, options, averages), runs in zip(ways, found, strict=True):
                if runs and runs[0]["seconds"] > LONG_SECONDS:
                    continue
                runs.append(forked(partial(fit, case, way, options, validated, case.epochs, averages)))
                if not averages:
                    runs[-1] |= {"start": forked(partial(fit, case, way, options, validated, 0, False))["start"]}
        for (way, options, averages), runs in zip(ways, found, strict=True):
            said = [f"{key}={value}" for key, value in options.items()] + ["3 averages"] * averages
            row = {"case": name, "validated": validated, "way": ", ".join([way, *said]), "repeats": len(runs)}
            rows.append({**row, **_median(runs)})
        _compare(rows[-len(ways) :])
    return rows


def _compare(rows: list[dict[str, Any]]) -> None:
    """Adds the ratios to the best `fit`; with XLA, to the one with XLA."""
    for row in rows:
        jit = "jit_compile" in row["way"]
        rivals = [r for r in rows if r["way"].startswith(FIT) and ("jit_compile" in r["way"]) == jit]
        for key in ("seconds", "epoch", "start"):
            if key in row:
                row[f"{key}_times_best_fit"] = row[key] / min(r[key] for r in rivals)
    raw = next(row for row in rows if row["way"] == TRAINER)
    for row in rows:
        if "averages" in row["way"]:
            row["epoch_times_raw_beyond_evaluation"] = (row["epoch"] - 3 * raw["test"]) / raw["epoch"]


def _whole(case: Case, repeats: int, slow: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for way in (TRAINER, FIT) if slow else (TRAINER,):
        runs = []
        for _ in range(repeats if way == TRAINER else 1):
            with tempfile.TemporaryDirectory(prefix="train_loop-") as folder:
                runs.append(forked(partial(tutorial, case, way, Path(folder))))
        assert runs[0]["accuracies"].keys() == runs[-1]["accuracies"].keys()
        row = {"case": case.name, "way": way if way == TRAINER else "the tutorial's way", "repeats": len(runs)}
        rows.append({**row, "evaluations": len(runs[0].pop("accuracies")), **_median(runs)})
    for row in rows[1:]:
        row["times_ours"] = row["seconds"] / rows[0]["seconds"]
    return rows


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "accuracies"}


def _report(rows: list[dict[str, Any]], slow: bool) -> None:
    def shown(value: Any, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    table = [
        [
            row["case"] + (", validated" if row["validated"] else ""), row["way"], row["repeats"],
            shown(row["seconds"], 2), shown(row["epoch"] * 1e3, 2), shown(row.get("start"), 2),
            shown(row["seconds_times_best_fit"], 3), shown(row["epoch_times_best_fit"], 3),
            shown(row.get("start_times_best_fit"), 2), shown(row.get("epoch_times_raw_beyond_evaluation"), 3),
            shown(row["mib"], 0),
        ]
        for row in rows if "validated" in row
    ]  # fmt: skip
    header = [
        "case", "way", "repeats", "seconds", "ms an epoch", "start s", "seconds x best fit", "epoch x best fit",
        "start x best fit", "epoch x raw, beyond evaluation", "peak MiB",
    ]  # fmt: skip
    if table:
        click.echo(tabulate(table, header, tablefmt="github", disable_numparse=True))
    for row in rows:
        if row["case"] == "input":
            click.echo(
                f"\n{INPUT_STEPS} steps of the text transformer: {row['tf.data']:.3f} s from tf.data, "
                f"{row['constant']:.3f} s from a constant tensor, that is {row['rate']:.1%} of the rate."
            )
        elif row["case"] == "whole":
            times = f", {row['times_ours']:.1f} times ours" if "times_ours" in row else ""
            click.echo(f"\nThe whole tutorial, {row['way']}: {row['seconds']:.2f} s{times}; peak {row['mib']:.0f} MiB.")
    if not slow and any(row["case"] == "whole" for row in rows):
        click.echo("The tutorial's way is left out; --slow runs it.")


@click.command(help=__doc__)
@click.option("--case", "cases", type=click.Choice(CASES), multiple=True, help="Only this; default all but tiny.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--slow", is_flag=True, help="Do the whole tutorial in its own way too, about two minutes.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(cases: tuple[str, ...], repeats: int, slow: bool, as_json: bool) -> None:
    """See the module."""
    rows: list[dict[str, Any]] = []
    for name in cases or CASES[1:]:
        program = [sys.executable, __file__, "--child", name, str(repeats), str(int(slow))]
        run = subprocess.run(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        rows += json.loads(run.stdout.splitlines()[-1])
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from importlib.metadata import version

    click.echo(
        f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}, "
        f"TensorFlow {version('tensorflow')}, Keras {version('keras')}; medians of up to {repeats} runs\n"
    )
    _report(rows, slow)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        print(json.dumps(child(sys.argv[2], int(sys.argv[3]), bool(int(sys.argv[4])))), flush=True)
    else:
        main()
