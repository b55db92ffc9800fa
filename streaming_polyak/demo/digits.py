"""1,797 real handwritten digits: where averaging the second half of a run helps, and where it does not.

A small convolutional network with batch normalisation is trained at a constant learning rate, so that its weights
bounce around to the end; three averages start in mid-run. Batch-norm statistics are averaged with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from tqdm import tqdm

from streaming_polyak import LINEAR, MEAN, Average, Exponential, Trainer, plots
from streaming_polyak.files.storage import write_csv

Curves: TypeAlias = dict[str, NDArray[np.float64]]

RAW = "raw"


def run(
    output: Path,
    echo: Callable[[str], None],
    *,
    epochs: int = 40,
    repeats: int = 5,
    alpha: float = 2.0,
    seed: int = 0,
) -> list[Path]:
    """Trains the network with several seeds and compares raw weights and averages on the test rows.

    Args:
        output: folder for what is written; files of the same names are replaced.
        echo: takes each paragraph of the report.
        epochs: epochs to train; the averages start at `epochs // 2`.
        repeats: how many seeds.
        alpha: of the exponential weights, in epochs.
        seed: the first of the seeds.

    Returns:
        The files written.
    """
    train, test = load()
    start = epochs // 2
    weightings = {"mean": MEAN, "linear": LINEAR, f"exponential (alpha={alpha:g})": Exponential(alpha=alpha)}
    echo(
        f"Handwritten digits, 8 x 8 pixels: {len(train[0])} rows train, {len(test[0])} test; a convolutional network "
        f"with batch normalisation, SGD at a constant learning rate; {epochs} epochs, averages from epoch {start} on; "
        f"{repeats} seeds."
    )
    runs: list[dict[str, list[float]]] = []
    for number in tqdm(range(seed, seed + repeats), desc="digits", unit="seed", disable=None):
        keras.utils.set_random_seed(number)
        trainer = Trainer(
            network(), {name: Average(weighting, start=start) for name, weighting in weightings.items()}, seed=number
        )
        history = trainer.fit(*train, epochs=epochs, validation_data=test, progress=False)
        runs.append(history.history)

    names = {RAW: "", **{name: f"[{name}]" for name in weightings}}
    scores: dict[str, Curves] = {
        score: {name: np.array([run[f"val_{score}{suffix}"] for run in runs]) for name, suffix in names.items()}
        for score in ("accuracy", "loss")
    }
    echo(_table(scores))
    echo("\n".join(_verdict(score, lines) for score, lines in scores.items()))

    files = [output / "validation_curves.png", output / "scores.csv"]
    plots.curves(
        files[0],
        range(epochs),
        {f"test {score}": lines for score, lines in scores.items()},
        f"Digits: mean and standard deviation over {repeats} seeds",
        mark=(start, "averages start"),
        from_epoch={f"test {score}": epochs // 4 for score in scores},
    )
    rows = [
        [seed + run, epoch, name, *(float(lines[name][run, epoch]) for lines in scores.values())]
        for name in names
        for run in range(repeats)
        for epoch in range(epochs)
    ]
    write_csv(files[1], ["seed", "epoch", "weights", *(f"test_{score}" for score in scores)], rows)
    return files


def load() -> tuple[tuple[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]]:
    """Returns (train, test): images of shape (rows, 8, 8, 1) in [0, 1], float32, and int labels of shape (rows,)."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=600, random_state=0, stratify=y)
    return (x_train, y_train), (x_test, y_test)


def network() -> keras.Model:
    """Returns the compiled network: two convolutions with batch normalisation, dropout, softmax."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dropout(0.25),
            layers.Dense(10, activation="softmax"),
        ],
        name="convnet",
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def _table(scores: Mapping[str, Curves]) -> str:
    rows = []
    for name in scores["loss"]:
        accuracy, loss = scores["accuracy"][name][:, -1], scores["loss"][name][:, -1]
        rows.append([name, *(f"{values.mean():.4f} ± {_deviation(values):.4f}" for values in (accuracy, loss))])
    return "At the end of the run, mean ± standard deviation over the seeds\n\n" + tabulate(
        rows, ["weights", "test accuracy", "test loss"], disable_numparse=True
    )


def _verdict(score: str, lines: Curves) -> str:
    """Says for each average, against the raw weights of the same runs, whether it helped (5 % level)."""
    if len(lines[RAW]) < 2:
        return f"Does averaging help the test {score}? One seed cannot tell; take more with --repeats."
    sentences = []
    for name, values in lines.items():
        if name == RAW:
            continue
        gain = values[:, -1] - lines[RAW][:, -1]
        better = int((gain < 0).sum() if score == "loss" else (gain > 0).sum())
        p = float(ttest_rel(values[:, -1], lines[RAW][:, -1]).pvalue) if _deviation(gain) > 0 else 1.0
        helped = "no clear difference"
        if p < 0.05:
            helped = "helps" if (gain.mean() < 0) == (score == "loss") else "HURTS"
        by = f"{gain.mean():+.4f} against raw, better in {better} of {len(gain)} seeds, paired t-test p = {p:.2f}"
        sentences.append(f"  {name}: {helped} ({by})")
    return "\n".join([f"Does averaging help the test {score}?", *sentences])


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
