"""Three classes of points in the plane: the last ten models of a run, their averages, and the streaming averages.

The set-up (data, network, 500 epochs, last ten models) is the problem that tutorials on averaging weights use; here
the members are swept in one pass, each file read once, and the same averages are there anyway, kept up to date while
training, without any file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import make_blobs
from tabulate import tabulate

from streaming_polyak import (
    LINEAR,
    MEAN,
    Average,
    Exponential,
    KerasEvaluator,
    Members,
    SweepResult,
    Trainer,
    plots,
    sweep_checkpoints,
)
from streaming_polyak.files.storage import write_csv
from streaming_polyak.files.sweep import Tensors
from streaming_polyak.files.sweep_result import SINGLE

Data: TypeAlias = tuple[NDArray[Any], NDArray[Any]]

TRAIN_ROWS = 100


@dataclass(frozen=True)
class Score:
    """One row of `scores.csv`: what was evaluated, and how it did."""

    source: str
    weighting: str
    n: int
    train_accuracy: float
    test_accuracy: float
    train_loss: float
    test_loss: float


def run(
    output: Path,
    echo: Callable[[str], None],
    *,
    epochs: int = 500,
    members: int = 10,
    optimizer: str = "sgd",
    alpha: float = 2.0,
    seed: int = 0,
) -> list[Path]:
    """Trains, evaluates members, their averages and the streaming averages, and draws three figures.

    Args:
        output: folder for what is written; files of the same names are replaced.
        echo: takes each paragraph of the report.
        epochs: epochs to train.
        members: how many of the last epochs are averaged, at most `epochs`.
        optimizer: "sgd" (learning rate 0.01, momentum 0.9) or "adam".
        alpha: of the exponential weights, in epochs.
        seed: of initial weights and of the order of samples.

    Returns:
        The files written, members last.
    """
    train, test = load()
    start = epochs - members
    weightings = {"mean": MEAN, "linear": LINEAR, f"exponential (alpha={alpha:g})": Exponential(alpha=alpha)}
    keras.utils.set_random_seed(seed)
    trainer = Trainer(
        network(optimizer),
        {name: Average(weighting, start=start) for name, weighting in weightings.items()},
        seed=seed,
        members=Members(output / "members", start=start, overwrite=True),
    )
    echo(
        f"Three blobs in the plane: {TRAIN_ROWS} rows train, {len(test[0])} test; MLP 2-25-3, {optimizer}; "
        f"{epochs} epochs, of which the last {members} are averaged and kept as files."
    )
    history = trainer.fit(*train, epochs=epochs, validation_data=test)

    def score(source: str, scored: Trainer, weighting: str = "", n: int = 1, average: str | None = None) -> Score:
        return Score(source, weighting, n, **_both(scored, train, test, average))

    raw = score("raw", trainer)
    streaming = {name: score("streaming", trainer, name, trainer.count(name), average=name) for name in weightings}
    scorer = Trainer(network(optimizer))
    put = KerasEvaluator(scorer.model, *test).assign

    def evaluate(tensors: Tensors) -> dict[str, float]:
        put(tensors)
        return _both(scorer, train, test)

    swept = sweep_checkpoints(trainer.member_paths, weightings, evaluate)
    singles = [Score(row.members[0].name, "", 1, **row.metrics) for row in swept.of(SINGLE)]
    saved = {
        name: [Score("saved members", name, row.n, **row.metrics) for row in swept.of(name)] for name in weightings
    }

    echo(_members_table(raw, singles))
    echo(_last_n_table(saved))
    echo(_agreement(trainer, streaming, swept, scorer.model))
    echo(_verdict(raw, singles, saved))

    everything = [raw, *singles, *(s for scores in saved.values() for s in scores), *streaming.values()]
    files = [output / name for name in ("data.png", "learning_curves.png", "last_n.png", "scores.csv", "history.csv")]
    panels = {f"{name}: {len(x)} rows": (x, y.argmax(axis=1)) for name, (x, y) in (("train", train), ("test", test))}
    plots.scatter(files[0], panels, "Three blobs, standard deviation 2")
    _draw_curves(files[1], history, f"{epochs} epochs with {optimizer}")
    plots.last_n(
        files[2],
        [s.test_accuracy for s in singles],
        {name: [s.test_accuracy for s in scores] for name, scores in saved.items()},
        f"Single models and averages of the last n of {epochs} epochs ({optimizer})",
        f"test accuracy ({len(test[0])} rows)",
    )
    write_csv(files[3], [field.name for field in fields(Score)], [astuple(score) for score in everything])
    history.to_csv(files[4])
    return files + trainer.member_paths


def load() -> tuple[Data, Data]:
    """Returns (train, test): points of shape (rows, 2), float32, and one-hot labels of shape (rows, 3)."""
    x, y = make_blobs(n_samples=1100, centers=3, n_features=2, cluster_std=2, random_state=2)
    x, one_hot = x.astype(np.float32), np.eye(3, dtype=np.float32)[y]
    return (x[:TRAIN_ROWS], one_hot[:TRAIN_ROWS]), (x[TRAIN_ROWS:], one_hot[TRAIN_ROWS:])


def network(optimizer: str) -> keras.Model:
    """Returns the compiled MLP 2 -> 25 ReLU -> 3 softmax, its layers named, so that the files of one fit another."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(25, activation="relu", name="hidden"),
            keras.layers.Dense(3, activation="softmax", name="classes"),
        ],
        name="mlp",
    )
    rule = keras.optimizers.Adam() if optimizer == "adam" else keras.optimizers.SGD(0.01, momentum=0.9)
    rule.build(model.trainable_variables)  # so that whole files of members load, its state too
    model.compile(optimizer=rule, loss="categorical_crossentropy", metrics=["accuracy"])
    return model


def _both(scored: Trainer, train: Data, test: Data, average: str | None = None) -> dict[str, float]:
    """Returns accuracy and loss on the rows that train and on those that test, by the names of `Score`."""
    of = {name: scored.evaluate(*data, average=average) for name, data in (("train", train), ("test", test))}
    return {f"{data}_{metric}": of[data][metric] for metric in ("accuracy", "loss") for data in of}


def _members_table(raw: Score, singles: Sequence[Score]) -> str:
    rows = [[s.source, s.train_accuracy, s.test_accuracy, s.train_loss, s.test_loss] for s in [raw, *reversed(singles)]]
    headers = ["single models", "train accuracy", "test accuracy", "train loss", "test loss"]
    return tabulate(rows, headers, floatfmt=("", ".3f", ".3f", ".4f", ".4f"))


def _last_n_table(saved: Mapping[str, Sequence[Score]]) -> str:
    columns = [[f"{s.train_accuracy:.3f}  {s.test_accuracy:.3f}" for s in scores] for scores in saved.values()]
    rows = [[n, *row] for n, row in enumerate(zip(*columns, strict=True), start=1)]
    headers = ["last n averaged", *(f"{name}\ntrain  test" for name in saved)]
    return "Accuracy of averages of saved members\n\n" + tabulate(
        rows, headers, disable_numparse=True, colalign=["right", *["left"] * len(saved)]
    )


def _agreement(trainer: Trainer, streaming: Mapping[str, Score], swept: SweepResult, model: keras.Model) -> str:
    """Compares the streaming averages with exact ones of the saved members, written to files that Keras loads."""
    rows: list[list[Any]] = []
    worst = 0.0
    with TemporaryDirectory() as folder:
        for name, now in streaming.items():
            newest = swept.of(name)[-1]
            model.load_weights(swept.export(newest, Path(folder) / f"{len(rows)}.keras").output)
            exact = {variable.path: variable.numpy() for variable in model.variables}
            with trainer.averaged(name):
                differences = [np.abs(v.numpy() - exact[v.path]).max() for v in trainer.model.variables]
            worst = max(worst, *differences)
            accuracy = newest.metrics["test_accuracy"]
            rows.append([name, now.n, now.train_accuracy, now.test_accuracy, accuracy, max(differences)])
    headers = ["streaming average", "n", "train accuracy", "test accuracy", "test, from files", "largest difference"]
    table = tabulate(rows, headers, floatfmt=("", "d", ".3f", ".3f", ".3f", ".1e"))
    agree = "agree" if worst < 1e-5 else "DO NOT agree"  # float32 rounding of weights near 1: below 1e-6
    return (
        f"The averages kept while training, without any file\n\n{table}\n\n"
        f"Streaming averages and averages of the saved members {agree}: no weight differs by more than {worst:.1e}."
    )


def _verdict(raw: Score, singles: Sequence[Score], saved: Mapping[str, Sequence[Score]]) -> str:
    accuracies = [s.test_accuracy for s in singles]
    best = max((s for scores in saved.values() for s in scores[1:]), key=lambda s: s.test_accuracy, default=None)
    lines = [
        f"Single models reach a test accuracy of {min(accuracies):.3f} to {max(accuracies):.3f}, the last one "
        f"{raw.test_accuracy:.3f}."
    ]
    if best is not None:
        than_single = best.test_accuracy - max(accuracies)
        beats = f"{than_single:+.3f} against" if than_single > 0 else "no better than"
        lines.append(
            f"The best average (picked on the test rows, which flatters it), {best.weighting} of the last {best.n}, "
            f"reaches {best.test_accuracy:.3f}: "
            f"{beats} the best single model, {best.test_accuracy - raw.test_accuracy:+.3f} against the last one."
        )
        if abs(than_single) < 0.01:
            lines.append("On this small problem averaging mostly steadies the result; it does not raise it much.")
    return "\n".join(lines)


def _draw_curves(path: Path, history: keras.callbacks.History, title: str) -> None:
    scores = {name: np.asarray(values) for name, values in history.history.items()}
    panels = {
        label: {"train (running)": scores[name], "test": scores[f"val_{name}"]}
        for name, label in (("loss", "loss"), ("accuracy", "accuracy"))
    }
    plots.curves(path, history.epoch, panels, title)
